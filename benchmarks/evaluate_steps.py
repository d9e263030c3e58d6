"""What scoring K = 1..20 costs compared with K = 20 alone: one encode serves every step, the evaluators run for each.

    python benchmarks/evaluate_steps.py --data DATA/eval

Prints a table and writes benchmarks/results/evaluate_steps.json. Costs are CPU seconds of the process, without loading
mteb and the model. Both come from one run, because two runs on a busy machine differ by more than what is measured:
encoding is the same run at K = 20 in either case, and of everything else K = 20 alone is given a twentieth. Reading the
data is among that, so the ratio is slightly too high.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from gircse.evaluate.encoder import TextSource, load_source
from gircse.evaluate.run import EvaluationSettings, evaluate_model
from gircse.evaluate.suites import TaskRequest

TASKS = {"STSBenchmark": 400, "TRECQA-Reranking": 20, "StackOverflowShortText": 400, "NewsClassification": 200}
LARGEST = 20


def cpu_seconds(source: TextSource, task: TaskRequest, data: Path) -> tuple[float, float]:
    """CPU seconds of scoring a task at all of the source's steps: encoding, and everything else."""
    encode, encoding = source.embed, 0.0

    def timed(texts: Sequence[str], prompt: str) -> Any:
        nonlocal encoding
        started = time.process_time()
        result = encode(texts, prompt)
        encoding += time.process_time() - started
        return result

    with tempfile.TemporaryDirectory(prefix="gircse-benchmark-") as output, mock.patch.object(source, "embed", timed):
        started = time.process_time()
        failed = evaluate_model(source, [task], Path(output), EvaluationSettings(data=data), lambda event: None)
        total = time.process_time() - started
    if failed:
        raise RuntimeError(f"{task.name} failed")
    return encoding, total - encoding


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of task folders")
    parser.add_argument("--tasks", nargs="*", default=[f"{name}={limit}" for name, limit in TASKS.items()])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "evaluate_steps.json")
    args = parser.parse_args()
    logging.getLogger("mteb").setLevel(logging.ERROR)
    source = load_source(None, range(1, LARGEST + 1))
    cpu_seconds(source, TaskRequest("MRPC", limit=2), args.data)  # imports, first allocations
    rows: list[dict[str, Any]] = []
    table = Table("task", "items", f"K = {LARGEST} alone, CPU s", f"K = 1..{LARGEST}, CPU s", "ratio")
    for spec in args.tasks:
        name, _, limit = spec.partition("=")
        encoding, rest = cpu_seconds(source, TaskRequest(name, limit=int(limit)), args.data)
        alone, together = encoding + rest / LARGEST, encoding + rest
        rows.append({"task": name, "limit": int(limit), "alone": alone, "together": together})
        table.add_row(name, limit, f"{alone:.1f}", f"{together:.1f}", f"{together / alone:.3f}")
        Console(stderr=True).print(f"{name}: {together / alone:.3f}")
    alone, together = sum(row["alone"] for row in rows), sum(row["together"] for row in rows)
    table.add_row("all", "", f"{alone:.1f}", f"{together:.1f}", f"{together / alone:.3f}")
    Console(width=110).print(table)
    facts = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps({**facts, "rows": rows, "ratio": together / alone}, indent=1) + "\n")


if __name__ == "__main__":
    main()
