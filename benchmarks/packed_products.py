"""What packed weights buy by number of rows: a decoder's own products, plain and packed in turn, medians.

    python benchmarks/packed_products.py
    python benchmarks/packed_products.py --dtype bfloat16 --output benchmarks/results/packed_products_bfloat16.json

Each product goes through many different matrices, as in a decoder, so that none stays in the processor's caches. Writes
benchmarks/results/packed_products.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arguments import at_least_one, output_file
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from gircse.fast import packed_weights
from gircse.fast.packed_weights import PackedWeights

SHAPES = ((576, 1536), (1536, 576), (576, 576), (576, 49152))  # in, out: SmolLM2-135M's
ROWS = (1, 4, 16, 48, 128, 512, 1024)


def _without_bounds(dtype: torch.dtype) -> Callable[[torch.dtype], Any]:
    library = packed_weights.packing_library(dtype)
    if library is None:
        raise SystemExit(f"this processor packs no {dtype}")
    unbounded = replace(library, fewest=1, most=sys.maxsize)
    return lambda _: unbounded


@torch.inference_mode()
def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=at_least_one, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--output", type=output_file, default=Path(__file__).parent / "results" / "packed_products.json"
    )
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    packed_weights.packing_library = _without_bounds(dtype)  # where the bounds should be is what is asked
    table = Table("in", "out", "rows", "plain, ms", "packed, ms", "ratio")
    entries = []
    for width, out in SHAPES:
        with torch.inference_mode(False):
            weights = [nn.Parameter(torch.randn(out, width, dtype=dtype)) for _ in range(20 if out < 10_000 else 1)]
        packed = PackedWeights()
        for rows in ROWS:
            x = torch.randn(rows, width, dtype=dtype)
            runs = {
                "plain": lambda x=x, weights=weights: [F.linear(x, weight) for weight in weights],
                "packed": lambda x=x, weights=weights, packed=packed: [packed.product(x, weight) for weight in weights],
            }
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            for round_ in range(arguments.repeats + 1):
                for name, run in runs.items():
                    started = time.perf_counter()
                    run()
                    if round_:  # the first packs
                        seconds[name].append((time.perf_counter() - started) / len(weights))
            plain, fast = (statistics.median(seconds[name]) * 1e3 for name in runs)
            entries.append({"in": width, "out": out, "rows": rows, "plain_ms": plain, "packed_ms": fast})
            table.add_row(str(width), str(out), str(rows), f"{plain:.2f}", f"{fast:.2f}", f"{fast / plain:.2f}")
    Console().print(table)
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": arguments.dtype}
    arguments.output.write_text(json.dumps({"machine": machine, "entries": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
