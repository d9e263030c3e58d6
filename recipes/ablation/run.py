"""Train and score a grid of short runs that differ in one thing each: same rows, order, seed and steps.

    python recipes/ablation/run.py --data DATA/train --evaluate DATA/eval -o runs/ablation
    python recipes/ablation/run.py ... --only encoder-only,stepwise+penalty --set data.examples=800 --suite dev
    python recipes/ablation/run.py ... --seeds 17,18,19

Every run goes to OUTPUT/NAME, with --seeds to OUTPUT/NAME-sSEED; finished ones are skipped, broken ones resumed. Scores
and their 95 % intervals go to OUTPUT/scores; the table at the end is that of `gircse report`. A run that fails does not
keep the others from being made: failures are listed at the end, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """One run of the grid.

    Attributes:
        name: Of its folder.
        changes: KEY=VALUE, as ``gircse train --set`` takes them.
        encoder_only: Whether it can be scored without soft tokens only.
    """

    name: str
    changes: list[str]
    encoder_only: bool


def runs_of(grid: dict[str, dict[str, Any]], output: Path, seeds: Sequence[int] = ()) -> Iterator[Run]:
    """The runs of a grid, seed by seed.

    Args:
        grid: Changes by name. ``{output}/NAME`` in a value is the folder of the run NAME, of the same seed.
        output: Folder of all runs.
        seeds: One run with each; none: the base recipe's.
    """
    for seed in seeds or (None,):
        suffix = "" if seed is None else f"-s{seed}"
        for name, values in grid.items():
            changes = [f"{key}={_as_text(value, output, suffix)}" for key, value in values.items()]
            if seed is not None:
                changes.append(f"seed={seed}")
            yield Run(name + suffix, changes, values.get("model.num_steps") == 0)


def _as_text(value: Any, output: Path, suffix: str) -> str:
    """On one line, as JSON, which is YAML too."""
    if isinstance(value, str):
        value = re.sub(r"\{output\}/([^/]+)", lambda found: f"{output / found[1]}{suffix}", value)
    return json.dumps(value)


def gircse(*arguments: str) -> bool:
    """Run a verb; whether it went well."""
    return subprocess.run([sys.executable, "-m", "gircse", *arguments], check=False).returncode == 0


def train_and_score(run: Run, arguments: argparse.Namespace) -> str | None:
    """Make a run where it is not finished, and its scores; returns what failed, or None."""
    folder = arguments.output / run.name
    if not (folder / "gircse_config.json").exists():
        options = [option for change in [*arguments.set, *run.changes] for option in ("--set", change)]
        if not gircse("train", str(arguments.base), "--data", arguments.data, "-o", str(folder), "--resume", *options):
            return "training"
    scored = gircse(
        "evaluate", "--suite", arguments.suite, "--data", arguments.evaluate, "--model", str(folder),
        "--num-steps", "0" if run.encoder_only else arguments.num_steps, "-o", str(arguments.output / "scores"),
    )  # fmt: skip
    return None if scored else "scoring"


def main() -> None:
    """Train, then score, then show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the training files")
    parser.add_argument("--evaluate", required=True, help="folder of the evaluation data")
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=HERE / "base.yaml")
    parser.add_argument("--grid", type=Path, default=HERE / "grid.yaml")
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of the grid, separated by commas")
    parser.add_argument(
        "--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[], help="one run with each"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every run; repeatable")
    parser.add_argument("--suite", default=str(HERE / "suite.yaml"), help="of `gircse evaluate`")
    parser.add_argument("--num-steps", default="1,2,3,5,10,20", help="K to score")
    arguments = parser.parse_args()
    grid = yaml.safe_load(arguments.grid.read_text(encoding="utf-8"))
    unknown = set(arguments.only or ()) - set(grid)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))} is not in {arguments.grid}; there is {', '.join(grid)}")
    wanted = {name: grid[name] for name in arguments.only or grid}
    runs = list(runs_of(wanted, arguments.output, arguments.seeds))
    failed = {run.name: problem for run in runs if (problem := train_and_score(run, arguments)) is not None}
    if len(failed) < len(runs):
        gircse("report", str(arguments.output / "scores"), "-o", str(arguments.output / "report.html"))
    if failed:
        sys.exit("failed: " + ", ".join(f"{name} ({problem})" for name, problem in failed.items()))


if __name__ == "__main__":
    main()
