"""The soft token on a GPU: plain products against the fused kernels, forward alone and with backward.

    python benchmarks/soft_token.py                                   SmolLM2-135M's and Gemma 3 270M's sizes
    python benchmarks/soft_token.py --sizes 49152x576 --rows 64,1024

Random weights in bfloat16, in turn within one process, medians; peak memory beyond the weights. Prints a table and
writes benchmarks/results/soft_token.json. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from arguments import at_least_one, output_file
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gircse.fast.fused_soft_token import fused_soft_token
from gircse.soft_tokens import Vocabulary


def run(soft_token: Callable[[Tensor], Tensor], hidden: Tensor, train: bool) -> tuple[float, int]:
    """Milliseconds and peak bytes of one soft token of all rows."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.set_grad_enabled(train):
        out = soft_token(hidden)
        if train:
            out.sum().backward()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started), torch.cuda.max_memory_allocated() - before


def compare(tokens: int, width: int, rows: int, train: bool, repeats: int) -> dict[str, float]:
    """Medians of both, in turn."""
    weight = nn.Parameter(torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) / 8, requires_grad=False)
    head, embedding = nn.Linear(width, tokens, bias=False, device="meta"), nn.Embedding(tokens, width, device="meta")
    head.weight = embedding.weight = weight
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=train)
    variants = {
        "plain": partial(Vocabulary(head, embedding).by_products, temperature=1.0),
        "fused": partial(fused_soft_token, head=weight, table=weight, scale=1.0),
    }
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in variants}
    for _ in range(repeats + 1):
        for name, soft_token in variants.items():
            found[name].append(run(soft_token, hidden, train))
    result: dict[str, float] = {"tokens": tokens, "width": width, "rows": rows, "train": train}
    for name, rounds in found.items():
        result[f"{name}_ms"] = statistics.median(milliseconds for milliseconds, _ in rounds[1:])  # the first compiles
        result[f"{name}_mib"] = rounds[-1][1] / 2**20
    return result


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="49152x576,262144x640", help="VxD, several separated by commas")
    parser.add_argument("--rows", default="16,64,256,1024")
    parser.add_argument("--repeats", type=at_least_one, default=20)
    parser.add_argument("--output", "-o", type=output_file, default=Path("benchmarks/results/soft_token.json"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here; the kernels are for one")
    columns = ("plain_ms", "fused_ms", "plain_mib", "fused_mib")
    table = Table("V x d", "rows", "backward", *columns)
    results = []
    for size in arguments.sizes.split(","):
        tokens, width = map(int, size.split("x"))
        for rows in map(int, arguments.rows.split(",")):
            for train in (False, True):
                results.append(compare(tokens, width, rows, train, arguments.repeats))
                table.add_row(size, str(rows), str(train), *(f"{results[-1][column]:.2f}" for column in columns))
    Console().print(table)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    arguments.output.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
