"""What scoring K = 1..20 costs compared with K = 20 alone, worked out from the clocks of an evaluation.

    gircse evaluate --suite dev --data DATA/eval --num-steps 0,1,3,5,10,20 -o runs/eval
    python benchmarks/evaluate_steps.py runs/eval

One encode serves every step, and the evaluators run once for each: with E seconds of encoding at the largest K and s
seconds of scoring one step, K = 1..20 costs E + 20 s and K = 20 alone E + s. Both come from one run, because two runs
on a busy machine differ by more than what is measured. Writes benchmarks/results/evaluate_steps.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from arguments import output_file
from rich.console import Console
from rich.table import Table

from gircse.evaluate.results import Result, read_results

STEPS = 20


def seconds(results: list[Result]) -> tuple[float, float]:
    """Encoding at the largest K, and scoring of one step: the median of those that found the texts encoded."""
    cost = max(results, key=lambda result: result.num_steps or 0).facts["cost"]
    first = max(result.facts["seconds"] for result in results)  # which encoded
    scoring = [result.facts["seconds"] for result in results if result.facts["seconds"] < first]
    return cost["texts"] * cost["seconds_per_text"], statistics.median(scoring)


def main() -> None:
    """Read, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of an evaluation at several K up to 20")
    parser.add_argument("--output", type=output_file, default=Path(__file__).parent / "results" / "evaluate_steps.json")
    args = parser.parse_args()
    found: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in read_results(args.results).plain:
        if result.num_steps is not None:
            found[result.facts["kind"], result.task].append(result)
    measured = {key: seconds(results) for key, results in sorted(found.items()) if len(results) > 2}
    measured["all", ""] = (sum(e for e, _ in measured.values()), sum(s for _, s in measured.values()))
    table = Table("kind", "task", "encoding, s", "scoring a step, s", f"K = 1..{STEPS} / K = {STEPS}")
    rows = []
    for (kind, task), (encoding, scoring) in measured.items():
        ratio = (encoding + STEPS * scoring) / (encoding + scoring)
        rows.append({"kind": kind, "task": task, "encoding": encoding, "scoring": scoring, "ratio": ratio})
        table.add_row(kind, task, f"{encoding:.1f}", f"{scoring:.2f}", f"{ratio:.3f}")
    Console(width=110).print(table)
    args.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
