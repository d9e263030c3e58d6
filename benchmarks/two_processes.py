"""What two commands at once cost each other on a CPU, by how long libgomp's threads wait busily.

    python benchmarks/two_processes.py

Embeds sentences of the demo's corpus, in one process and in two at once, with GOMP_SPINCOUNT as libgomp has it (300000)
and as the command line sets it. Seconds are those of whole commands, loading included. Writes
benchmarks/results/two_processes.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

from arguments import output_file

SPINS = "300000", "1000"


def seconds_of(processes: int, spins: str, corpus: Path) -> float:
    """Until the last of them has ended."""
    environment = os.environ | {"GOMP_SPINCOUNT": spins, "GIRCSE_OFFLINE": "1"}
    call = [sys.executable, "-m", "gircse", "embed", str(corpus), "--overwrite", "-o"]
    begun = time.perf_counter()
    running = [
        subprocess.Popen([*call, f"{corpus}.{i}.npy"], env=environment, stderr=subprocess.DEVNULL)
        for i in range(processes)
    ]
    if any(process.wait() for process in running):
        raise SystemExit("gircse embed failed")
    return time.perf_counter() - begun


def main() -> None:
    """Measure in turn, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    results = Path(__file__).parent / "results"
    parser.add_argument("-o", "--output", type=output_file, default=results / "two_processes.json")
    arguments = parser.parse_args()
    taken: dict[tuple[int, str], list[float]] = {(count, spins): [] for spins in SPINS for count in (1, 2)}
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "texts.jsonl"
        lines = (files("gircse") / "data" / "demo_corpus.jsonl").read_text(encoding="utf-8").splitlines()
        corpus.write_text("\n".join(lines[: arguments.texts]), encoding="utf-8")
        for _ in range(arguments.repeats):
            for (count, spins), times in taken.items():
                times.append(seconds_of(count, spins, corpus))
                print(f"{count} at once, GOMP_SPINCOUNT={spins}: {times[-1]:.1f} s", file=sys.stderr)
    rows = [
        {"processes": count, "spins": int(spins), "seconds": round(statistics.median(times), 2)}
        for (count, spins), times in taken.items()
    ]
    for row in rows:
        print("{processes} at once, GOMP_SPINCOUNT={spins}: {seconds} s".format(**row))
    facts = {"command": " ".join(sys.argv), "machine": platform.machine(), "cpus": os.cpu_count(), "results": rows}
    arguments.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
