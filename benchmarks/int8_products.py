"""Products with packed weights and with weights of 8 bits, by oneDNN and by the compiled kernels, by number of rows.

    python benchmarks/int8_products.py
    python benchmarks/int8_products.py --dtype bfloat16 --output benchmarks/results/int8_products_bfloat16.json

All ways in turn, medians, milliseconds for the products of a layer of SmolLM2-135M; thirty layers, so that weights come
from memory. The bounds `MOST_INT8_ROWS` and `MOST_VECTOR_ROWS` of gircse/fast/step_kernels.py are made of this. Writes
benchmarks/results/int8_products.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
from arguments import at_least_one, output_file
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gircse.fast import step_kernels
from gircse.fast.int8 import Int8Linear
from gircse.fast.packed_linear import KernelLinear, PackedLinear

SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))  # out, in
LAYERS = 30
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def by_kernels(layers: Sequence[KernelLinear], inputs: dict[int, Tensor], most_vector_rows: int | None = None) -> None:
    """All products, whatever the bounds say; weights of 8 bits by vectors up to so many rows."""
    most = step_kernels.MOST_VECTOR_ROWS if most_vector_rows is None else most_vector_rows
    with mock.patch.object(step_kernels, "MOST_VECTOR_ROWS", most):
        for layer in layers:
            layer._by_kernels(inputs[layer.in_features], [layer])


def by_onednn(layers: Sequence[KernelLinear], inputs: dict[int, Tensor]) -> None:
    """All products by layers that no kernel reads."""
    for layer in layers:
        layer(inputs[layer.in_features])


def hidden(layers: Sequence[KernelLinear]) -> Sequence[KernelLinear]:
    """The same layers, not to be read by kernels."""
    for layer in layers:
        layer.place = None
    return layers


def ways_of(dtype: torch.dtype) -> dict[str, Callable[[dict[int, Tensor]], None]]:
    """What is compared, each with weights of its own."""
    weights = [torch.randn(shape) for _ in range(LAYERS) for shape in SHAPES]
    packed = [PackedLinear(weight, dtype=dtype) for weight in weights]
    small = [Int8Linear(weight) for weight in weights]
    if not (packed[0].takes(dtype) and small[0].takes(dtype)):
        raise SystemExit("no kernels for weights of 8 bits on this machine (gircse info), or oneDNN packs otherwise")
    other = hidden([PackedLinear(weight, dtype=dtype) for weight in weights])
    other_small = hidden([Int8Linear(weight) for weight in weights])
    ways = {
        "oneDNN": lambda x: by_onednn(other, x),
        "kernels": lambda x: by_kernels(packed, x),
        "8 bits, oneDNN": lambda x: by_onednn(other_small, x),
        "8 bits, vectors": lambda x: by_kernels(small, x, sys.maxsize),
    }
    if step_kernels.matrix_library() is not None:
        ways["8 bits, AMX"] = lambda x: by_kernels(small, x, 0)
    return ways


@torch.inference_mode()
def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=at_least_one, default=7)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the inputs")
    default = Path(__file__).parent / "results" / "int8_products.json"
    parser.add_argument("--output", type=output_file, default=default)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    ways = ways_of(dtype)
    table, entries = Table("rows", *(f"{way}, ms" for way in ways)), []
    for rows in ROWS:
        inputs = {width: torch.randn(rows, width).to(dtype) for width in (576, 1536)}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for round_ in range(arguments.repeats + 1):
            for way, run in ways.items():
                started = time.perf_counter()
                run(inputs)
                if round_:
                    seconds[way].append((time.perf_counter() - started) / LAYERS)
        medians = {way: 1e3 * statistics.median(found) for way, found in seconds.items()}
        entries.append({"rows": rows, **medians})
        table.add_row(str(rows), *(f"{found:.2f}" for found in medians.values()))
    Console().print(table)
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": arguments.dtype}
    arguments.output.write_text(json.dumps({"machine": machine, "entries": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
