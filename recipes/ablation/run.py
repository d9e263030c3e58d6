"""Train and score a grid of short runs that differ in one thing each: same rows, order, seed and steps.

    python recipes/ablation/run.py --data DATA/train --evaluate DATA/eval -o runs/ablation
    python recipes/ablation/run.py ... --only encoder-only,stepwise+penalty --set data.examples=800 --suite quick

Every run goes to OUTPUT/NAME; finished ones are skipped, broken ones resumed. Scores and their 95 % intervals go to
OUTPUT/scores; the table at the end is that of `gircse report`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent


def gircse(*arguments: str) -> None:
    """Run a verb; its failure ends the grid."""
    subprocess.run([sys.executable, "-m", "gircse", *arguments], check=True)


def main() -> None:
    """Train, then score, then show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the training files")
    parser.add_argument("--evaluate", required=True, help="folder of the evaluation data")
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=HERE / "base.yaml")
    parser.add_argument("--grid", type=Path, default=HERE / "grid.yaml")
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of the grid, separated by commas")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every run; repeatable")
    parser.add_argument("--suite", default="quick", help="of `gircse evaluate`")
    parser.add_argument("--num-steps", default="1,2,3,5,10,20", help="K to score")
    arguments = parser.parse_args()
    grid = yaml.safe_load(arguments.grid.read_text(encoding="utf-8"))
    unknown = set(arguments.only or ()) - set(grid)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))} is not in {arguments.grid}; there is {', '.join(grid)}")
    names = arguments.only or list(grid)
    for name in names:
        folder = arguments.output / name
        if not (folder / "gircse_config.json").exists():
            changes = [f"{key}={yaml.safe_dump(value).splitlines()[0]}" for key, value in grid[name].items()]
            options = [option for change in [*arguments.set, *changes] for option in ("--set", change)]
            gircse("train", str(arguments.base), "--data", arguments.data, "-o", str(folder), "--resume", *options)
        steps = "0" if grid[name].get("model.num_steps") == 0 else arguments.num_steps
        scores = str(arguments.output / "scores")
        gircse(
            "evaluate", "--suite", arguments.suite, "--data", arguments.evaluate, "--model", str(folder),
            "--num-steps", steps, "-o", scores,
        )  # fmt: skip
    gircse("report", str(arguments.output / "scores"), "-o", str(arguments.output / "report.html"))


if __name__ == "__main__":
    main()
