"""`encode` with and without compiled kernels, and with all but those for AMX and AVX512-BF16, in turn, medians.

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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from arguments import at_least_one, data_folder, output_file
from mixes import INSTRUCTION, read_mix
from rich.console import Console
from rich.table import Table

from gircse.fast import step_kernels
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
def kernels(which: str) -> Iterator[None]:
    """All of them, those that every processor has, or PyTorch's operations alone."""
    without = {"all": (), "without AMX": ("matrix_library",)}.get(which, ("matrix_library", "bfloat16_library"))
    with ExitStack() as stack:
        for library in without:
            stack.enter_context(mock.patch.object(step_kernels, library, return_value=None))
        if which == "none":
            none = dict.fromkeys(step_kernels.MOST_PRODUCT_ROWS, 0)
            stack.enter_context(mock.patch.object(step_kernels, "serves", return_value=False))
            stack.enter_context(mock.patch.object(step_kernels, "MOST_PRODUCT_ROWS", none))
            stack.enter_context(mock.patch.object(step_kernels, "MOST_NARROW_ROWS", 0))
        forget()
        yield
    forget()


def forget() -> None:
    """Which functions a dtype has."""
    for function in (step_kernels._product_function, step_kernels.most_product_rows, step_kernels.most_soft_tokens):
        function.cache_clear()


def measure(
    model: GIRCSE, texts: list[str], prompt: str | None, ways: list[str], repeats: int
) -> dict[int, dict[str, list[float]]]:
    """Seconds of every round, by K and kernels; the first round does not count."""
    times: dict[int, dict[str, list[float]]] = {steps: {which: [] for which in ways} for steps in STEPS}
    for round_ in range(repeats + 1):
        for steps, found in times.items():
            for which, seconds in found.items():
                with kernels(which):
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
    ways = ["all", "none"]
    if arguments.dtype == "bfloat16":
        libraries = {"without AMX": step_kernels.matrix_library(), "without either": step_kernels.bfloat16_library()}
        ways[1:1] = [without for without, library in libraries.items() if library is not None]
    model = GIRCSE(dtype=getattr(torch, arguments.dtype)).pack_weights()
    title = f"Seconds of encode in {arguments.dtype}, medians of {arguments.repeats}"
    table = Table("texts", "K", *ways, *(f"{which} to none" for which in ways[:-1]), title=title)
    table.add_column("to K = 5")
    entries = []
    for name in arguments.texts:
        mix, count = TEXTS[name]
        prompt = None if mix == "long" else model.format_instruction(INSTRUCTION)
        times = measure(model, read_mix(arguments.data, mix, count), prompt, ways, arguments.repeats)
        for steps, found in times.items():
            seconds = {how: statistics.median(values) for how, values in found.items()}
            paired = {
                how: statistics.median(a / b for a, b in zip(values, times[5][how], strict=True))
                for how, values in found.items()
            }
            entries.append(
                {"texts": name, "count": count, "num_steps": steps, "seconds": seconds, "to_five_steps": paired}
            )
            numbers = [f"{value:.3f}" for value in seconds.values()]
            numbers += [f"{seconds[which] / seconds['none']:.2f}" for which in ways[:-1]]
            table.add_row(name, str(steps), *numbers, f"{paired['all']:.2f}")
    Console().print(table)
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": arguments.dtype}
    arguments.output.write_text(json.dumps({"machine": machine, "entries": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
