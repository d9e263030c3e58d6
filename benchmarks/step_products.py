"""Three choices of a soft token's products on a CPU, each both ways in turn, medians.

    python benchmarks/step_products.py
    python benchmarks/step_products.py --dtype float32 --output benchmarks/results/step_products_float32.json

Attention to what all rows begin with by products of its own, or to a copy in every row (`COPIED_PREFIX` in
gircse/refiner.py); attention by products or by PyTorch's (`FEW_ROWS` there), both of twenty steps; logits with the rows
or the table as the factor that oneDNN packs (`MOST_ROWS_ON_THE_RIGHT` in gircse/fast/packed_linear.py). Sizes are
SmolLM2-135M's. Writes benchmarks/results/step_products.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from arguments import at_least_one, output_file
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gircse.fast import packed_linear
from gircse.fast.grouped_steps import DecodeGroup, ProductsDecodeGroup
from gircse.fast.packed_linear import TableLinear

LAYERS, HEADS, SHARED_HEADS, WIDTH, STATE, VOCABULARY, STEPS = 30, 9, 3, 64, 576, 49152, 20
PREFIXED = ((37, 80, 13), (11, 190, 13), (4, 150, 13), (160, 20, 13), (37, 80, 80), (160, 20, 40), (37, 80, 160))
"""Rows, tokens of their own, tokens of the prefix."""
WHOLE = ((1, 30), (4, 30), (8, 30), (16, 30), (32, 30), (64, 30), (4, 200), (16, 200), (32, 100))
"""Rows, tokens."""
HEAD_ROWS = (4, 16, 48, 64, 128)


def caches(rows: int, length: int, dtype: torch.dtype, *, columns: bool) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of all layers."""
    states = torch.randn(2 * LAYERS, rows, SHARED_HEADS, length, WIDTH).to(dtype)
    keys, values = states.chunk(2)
    return [(k.mT.contiguous() if columns else k, v) for k, v in zip(keys, values, strict=True)]


def attend(group: DecodeGroup, dtype: torch.dtype) -> None:
    """All steps of a batch through all layers, so that no keys stay in the processor's caches."""
    query, (key, value) = torch.ones(group.rows, HEADS, WIDTH), torch.ones(2, group.rows, SHARED_HEADS, WIDTH)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    for _ in range(STEPS):
        for layer in range(LAYERS):
            group.attend(layer, query, key, value, WIDTH**-0.5)


def prefixed_runs(rows: int, own: int, prefix: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """By products, with a prefix that lies apart or in every row."""
    apart = caches(rows, own + STEPS, dtype, columns=True)
    shared = [(keys[0], values[0]) for keys, values in caches(1, prefix, dtype, columns=True)]
    copied = caches(rows, prefix + own + STEPS, dtype, columns=True)
    own_mask, mask = torch.ones(rows, own), torch.ones(rows, prefix + own)
    return {
        "apart": lambda: attend(ProductsDecodeGroup(apart, own_mask, shared), dtype),
        "copied": lambda: attend(ProductsDecodeGroup(copied, mask), dtype),
    }


def whole_runs(rows: int, own: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Without a prefix, by products and by PyTorch's attention."""
    columns, rows_of_keys = (caches(rows, own + STEPS, dtype, columns=columns) for columns in (True, False))
    mask = torch.ones(rows, own)
    return {
        "products": lambda: attend(ProductsDecodeGroup(columns, mask), dtype),
        "attention": lambda: attend(DecodeGroup(rows_of_keys, mask), dtype),
    }


def head_runs(rows: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Logits of a step, by the layer of a tied head."""
    layer = TableLinear(nn.Parameter(torch.randn(VOCABULARY, STATE).to(dtype), requires_grad=False))
    states = torch.randn(rows, STATE).to(dtype)

    def run(most: int) -> Tensor:
        packed_linear.MOST_ROWS_ON_THE_RIGHT = most
        return layer(states)

    return {"table packed": lambda: run(0), "rows packed": lambda: run(rows)}


def medians(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Milliseconds of each, taken in turn; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if round_:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def main() -> None:
    """Measure, print a table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=at_least_one, default=5)
    default = Path(__file__).parent / "results" / "step_products.json"
    parser.add_argument("--output", type=output_file, default=default, help="JSON file")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    title = f"Twenty steps' attention through 30 layers, and a step's head, in {arguments.dtype}"
    table = Table("what", "rows", "own tokens", "prefix", "ms", "ms", "ratio", title=title)
    entries = []

    def measure(what: str, runs: Mapping[str, Callable[[], Any]], **sizes: int) -> None:
        found = medians(runs, arguments.repeats)
        entries.append({"what": what, **sizes, "ms": found})
        (first, before), (second, after) = found.items()
        shown = [str(sizes.get(name, "")) for name in ("rows", "own", "prefix")]
        table.add_row(what, *shown, f"{first} {before:.1f}", f"{second} {after:.1f}", f"{after / before:.2f}")

    for rows, own, prefix in PREFIXED:
        measure("prefix", prefixed_runs(rows, own, prefix, dtype), rows=rows, own=own, prefix=prefix)
    for rows, own in WHOLE:
        measure("few rows", whole_runs(rows, own, dtype), rows=rows, own=own)
    if dtype == torch.bfloat16:  # of float32 the table is always packed
        for rows in HEAD_ROWS:
            measure("head", head_runs(rows, dtype), rows=rows)
    Console().print(table)
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": arguments.dtype}
    arguments.output.write_text(json.dumps({"machine": machine, "entries": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
