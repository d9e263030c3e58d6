"""`encode` with and without compiled kernels, in turn in one process, medians.

    python benchmarks/compiled_kernels.py --data DATA/eval
    python benchmarks/compiled_kernels.py --data DATA/eval --dtype float32 -o FILE

One short query, eight of them, and the three mixes of encode_speed.py, by the shipped model with packed weights,
without soft tokens and with five and twenty. Writes benchmarks/results/compiled_kernels.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from arguments import at_least_one, data_folder, output_file
from mixes import INSTRUCTION, read_mix
from rich.console import Console
from rich.table import Table

from gircse import step_kernels
from gircse.model import GIRCSE

STEPS = (0, 5, 20)
TEXTS = {
    "one": ("short", 1),
    "eight": ("short", 8),
    "short": ("short", 192),
    "medium": ("medium", 48),
    "long": ("long", 20),
}


@contextmanager
def without_kernels() -> Iterator[None]:
    """PyTorch's operations alone."""
    none = dict.fromkeys(step_kernels.MOST_PRODUCT_ROWS, 0)
    with (
        mock.patch.object(step_kernels, "serves", return_value=False),
        mock.patch.object(step_kernels, "MOST_PRODUCT_ROWS", none),
    ):
        yield


def measure(model: GIRCSE, texts: list[str], prompt: str | None, repeats: int) -> dict[int, dict[str, list[float]]]:
    """Seconds of every round, by K, with and without; the first round does not count."""
    times: dict[int, dict[str, list[float]]] = {steps: {"with": [], "without": []} for steps in STEPS}
    for round_ in range(repeats + 1):
        for steps, found in times.items():
            for how, seconds in found.items():
                with nullcontext() if how == "with" else without_kernels():
                    started = time.perf_counter()
                    model.encode(texts, prompt=prompt, num_steps=steps)
                if round_:
                    seconds.append(time.perf_counter() - started)
    return times


def main() -> None:
    """Measure, print a table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=data_folder, required=True, help="folder of the evaluation data")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--texts", choices=tuple(TEXTS), nargs="*", default=list(TEXTS), help="which of them")
    parser.add_argument("--repeats", type=at_least_one, default=7)
    default = Path(__file__).parent / "results" / "compiled_kernels.json"
    parser.add_argument("-o", "--output", type=output_file, default=default, help="JSON file")
    arguments = parser.parse_args()
    if step_kernels.library() is None:
        parser.error("no kernels were compiled for this machine; install gircse where there is a C++ compiler")
    model = GIRCSE(dtype=getattr(torch, arguments.dtype)).pack_weights()
    title = f"Seconds of encode in {arguments.dtype}, medians of {arguments.repeats}"
    table = Table("texts", "K", "with kernels", "without", "ratio", "to K = 5", "without", title=title)
    entries = []
    for name in arguments.texts:
        mix, count = TEXTS[name]
        prompt = None if mix == "long" else model.format_instruction(INSTRUCTION)
        times = measure(model, read_mix(arguments.data, mix, count), prompt, arguments.repeats)
        for steps, found in times.items():
            seconds = {how: statistics.median(values) for how, values in found.items()}
            paired = {
                how: statistics.median(a / b for a, b in zip(values, times[5][how], strict=True))
                for how, values in found.items()
            }
            entries.append(
                {"texts": name, "count": count, "num_steps": steps, "seconds": seconds, "to_five_steps": paired}
            )
            ratio = seconds["with"] / seconds["without"]
            numbers = f"{seconds['with']:.3f}", f"{seconds['without']:.3f}", f"{ratio:.2f}"
            table.add_row(name, str(steps), *numbers, *(f"{value:.2f}" for value in paired.values()))
    Console().print(table)
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": arguments.dtype}
    arguments.output.write_text(json.dumps({"machine": machine, "entries": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
