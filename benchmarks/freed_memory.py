"""`encode` in a process that keeps what it has freed, and in one that gives it back, as glibc does by itself.

    python benchmarks/freed_memory.py --data DATA/eval

glibc returns large blocks to the system, which clears as much memory anew, page by page, for the next layer; two of its
variables let it keep them. Two processes with packed weights embed the same texts in turn, so that what else the
machine does meets both. Medians of the rounds; the ratio is the median of each round's. Pages that the system cleared
are counted in one call, memory is the most that the process has held, loading included. Linux. Writes
benchmarks/results/freed_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from arguments import at_least_one, data_folder, output_file
from mixes import INSTRUCTION, MIXES, read_mix
from rich.console import Console
from rich.table import Table

COUNTS = {"short": 192, "medium": 48, "long": 20}
VARIABLES = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}  # bytes


def answer(arguments: argparse.Namespace) -> None:
    """In a process of its own: embeds the mix that a line names, and prints what that took as JSON."""
    import torch

    from gircse import GIRCSE
    from gircse.fast.kernel_caches import limit_kernel_caches

    limit_kernel_caches()
    model = GIRCSE(dtype=getattr(torch, arguments.dtype), device="cpu").pack_weights()
    texts = {mix: read_mix(arguments.data, mix, count) for mix, count in COUNTS.items()}
    prompt = f"Instruct: {INSTRUCTION}\nQuery: "
    for line in sys.stdin:
        mix = line.strip()
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        model.encode(texts[mix], prompt="" if mix == "long" else prompt, num_steps=arguments.num_steps)
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        pages, peak = after.ru_minflt - before.ru_minflt, after.ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "pages": pages, "peak": peak}), flush=True)


def ask(process: subprocess.Popen[str], mix: str) -> dict[str, float]:
    """What one call took."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(mix + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def measure(arguments: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """An entry for each mix and process."""
    command = [sys.executable, __file__, "--data", str(arguments.data), "--num-steps", str(arguments.num_steps)]
    command += ["--answer", "--dtype", dtype]
    processes = {
        what: subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | variables
        )
        for what, variables in (("given back", {}), ("kept", VARIABLES))
    }
    entries = []
    for mix in MIXES:
        rounds = []
        for turn in range(arguments.repeats + 1):
            order = list(processes) if turn % 2 else list(reversed(processes))
            rounds.append({what: ask(processes[what], mix) for what in order})
        del rounds[0]
        for what in processes:
            middle = {name: statistics.median(turn[what][name] for turn in rounds) for name in rounds[0][what]}
            ratio = statistics.median(turn[what]["seconds"] / turn["given back"]["seconds"] for turn in rounds)
            entries.append({"dtype": dtype, "mix": mix, "what": what, **middle, "ratio": ratio})
    for process in processes.values():
        process.communicate()
    return entries


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=data_folder, required=True, help="folder of the evaluation data")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["bfloat16", "float32"])
    parser.add_argument("--num-steps", type=int, default=5, help="K")
    parser.add_argument("--repeats", type=at_least_one, default=7, help="rounds that count")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument(
        "-o", "--output", type=output_file, default=Path(__file__).parent / "results" / "freed_memory.json"
    )
    arguments = parser.parse_args()
    if arguments.answer:
        answer(arguments)
        return
    entries = []
    table = Table("dtype", "texts", "freed memory", "s", "pages cleared", "peak MiB", "ratio")
    for dtype in arguments.dtypes:
        for entry in measure(arguments, dtype):
            entries.append(entry)
            numbers = (f"{entry['seconds']:.2f}", f"{entry['pages']:,.0f}", f"{entry['peak']:,.0f}")
            table.add_row(dtype, entry["mix"], entry["what"], *numbers, f"{entry['ratio']:.2f}")
    facts = {"machine": platform.machine(), "num_steps": arguments.num_steps, "texts": COUNTS}
    arguments.output.write_text(json.dumps({"facts": facts, "entries": entries}, indent=1) + "\n")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
