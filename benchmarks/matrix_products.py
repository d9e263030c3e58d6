"""What a dtype buys on this machine, and what int8 costs: the decoder's own shapes, in turn, medians.

    python benchmarks/matrix_products.py

Times are CPU time on one thread. int8 is torch's dynamic quantisation: weights beforehand, activations at each call
with one scale for the whole batch. ``neighbour`` is how far a row's result moves (relative L2) when another row of its
batch becomes ten times as large: 0 for the other two, and why int8 is not offered. Writes
benchmarks/results/matrix_products.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from arguments import at_least_one, output_file
from rich.console import Console
from rich.table import Table
from torch import nn

SHAPES = ((1024, 576, 1536), (1024, 1536, 576), (256, 576, 576), (64, 576, 49152))  # rows, in, out: SmolLM2-135M's


def neighbour_effect(layer: nn.Module, inputs: torch.Tensor) -> float:
    """Relative change of the first row's result when the last row grows tenfold."""
    changed = inputs.clone()
    changed[-1] *= 10
    before, after = layer(inputs)[0].float(), layer(changed)[0].float()
    return float((after - before).norm() / before.norm())


@torch.inference_mode()
def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=at_least_one, default=9)
    parser.add_argument(
        "-o", "--output", type=output_file, default=Path(__file__).parent / "results" / "matrix_products.json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table("rows × in × out", "dtype", "ms", "to float32", "neighbour")
    entries = []
    for rows, width, out in SHAPES:
        plain, inputs = nn.Linear(width, out, bias=False), torch.randn(rows, width)
        variants = {
            "float32": (plain, inputs),
            "bfloat16": (copy.deepcopy(plain).bfloat16(), inputs.bfloat16()),
            "int8": (torch.ao.quantization.quantize_dynamic(nn.Sequential(plain), {nn.Linear}), inputs),
        }
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(arguments.repeats + 1):
            for name, (layer, given) in variants.items():
                started = time.process_time()
                layer(given)
                times[name].append(time.process_time() - started)
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        for name, (layer, given) in variants.items():
            ratio, effect = medians[name] / medians["float32"], neighbour_effect(layer, given)
            shape = f"{rows} × {width} × {out}"
            table.add_row(shape, name, f"{medians[name] * 1000:.1f}", f"{ratio:.2f}", f"{effect:.0e}")
            entries.append({"shape": shape, "dtype": name, "ms": medians[name] * 1000, "ratio": ratio, "moved": effect})
    Console(width=100).print(table)
    facts = {"machine": platform.machine(), "cpu": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps({**facts, "rows": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
