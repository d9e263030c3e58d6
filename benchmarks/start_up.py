"""How long a verb takes that has almost nothing to do: `gircse similarity` of two texts, from the shell to the shell.

    python benchmarks/start_up.py

In turn as it is, and as it would be with garbage collection while libraries and weights are loaded, with an orderly end
of the interpreter, and with both, which is what Python does by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from arguments import at_least_one, output_file
from rich.console import Console
from rich.table import Table

VERB = "import sys; sys.argv = ['gircse', 'similarity', 'a cat sleeps', 'a kitten naps']\n"
COLLECTED = "import gc; gc.disable = lambda: None\n"
WAYS = {
    "as it is": VERB + "from gircse.cli import run; run()",
    "garbage collected": VERB + COLLECTED + "from gircse.cli import run; run()",
    "an orderly end": VERB + "from gircse.cli import main; main()",
    "both": VERB + COLLECTED + "from gircse.cli import main; main()",
}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeats", type=at_least_one, default=5)
    parser.add_argument("--output", "-o", type=output_file, default=Path("benchmarks/results/start_up.json"))
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(given.repeats + 1):  # the first reads all files from the disk
        for way, program in WAYS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
            seconds[way].append(time.perf_counter() - started)
    found = {way: round(statistics.median(own[1:]), 2) for way, own in seconds.items()}
    table = Table("", "seconds")
    for way, median in found.items():
        table.add_row(way, f"{median:.2f}")
    Console().print(table)
    facts = {"command": "python benchmarks/start_up.py", "cores": os.cpu_count(), "repeats": given.repeats}
    given.output.write_text(json.dumps(facts | {"seconds": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
