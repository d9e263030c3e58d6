"""Whether `gircse embed` survives being killed: kill -9 at random moments, resume, compare with an uninterrupted run.

    python benchmarks/embed_kills.py                        ten kills, 640 short texts
    python benchmarks/embed_kills.py --limit 160 --kills 4 --num-steps 1

Prints every kill and whether the two outputs are the same bytes, and writes benchmarks/results/embed_kills.json. Exits
with 1 where they are not.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import typer
from embed_memory import RESULTS, short_texts

COMMAND = [sys.executable, "-m", "gircse", "embed"]


def main(
    kills: Annotated[int, typer.Option(min=1)] = 10,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    texts: Annotated[Path | None, typer.Option(help="A .txt or .jsonl file of sentences.")] = None,
    limit: Annotated[int, typer.Option(min=48, help="Texts to embed.")] = 640,
    shard_size: Annotated[int, typer.Option(min=1)] = 16,
    num_steps: Annotated[int | None, typer.Option(min=0, help="K; the model's where not given.")] = None,
    model: Annotated[str | None, typer.Option(help="A saved model; the shipped one where not given.")] = None,
    suffix: Annotated[str, typer.Option(help="Of the output: parquet, npy or jsonl.")] = "parquet",
    result: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "embed_kills.json",
) -> None:
    """Embed a corpus twice, once in peace."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, whole, output = folder / "corpus.txt", folder / f"whole.{suffix}", folder / f"killed.{suffix}"
        corpus.write_text("".join(f"{text}\n" for text in short_texts(texts, limit)), encoding="utf-8")
        options = ["--shard-size", str(shard_size)]
        options += [] if num_steps is None else ["--num-steps", str(num_steps)]
        options += [] if model is None else ["--model", model]

        peaceful = [*COMMAND, str(corpus), "-o", str(whole), "--json", *options]
        summary = json.loads(subprocess.run(peaceful, check=True, stdout=subprocess.PIPE).stdout)

        shards = -(-limit // shard_size)
        # A kill comes a random moment after a random number of shards is there: sorted, so that each run gets further.
        targets = sorted(generator.randrange(shards - 1) for _ in range(kills))
        resume = [*COMMAND, str(corpus), "-o", str(output), "--resume", *options]
        killed = []
        for target in targets:
            moment = generator.uniform(0, summary["seconds"] / shards)
            killed.append(_run_and_kill(resume, output, target, moment))
            print(f"killed with {killed[-1]} of {shards} shards finished", flush=True)
        subprocess.run(resume, check=True)
        checksums = [sha256(path.read_bytes()).hexdigest() for path in (whole, output)]

    same = checksums[0] == checksums[1]
    print(f"{len(killed)} kills, seed {seed}: the output is {'the same, byte for byte' if same else 'DIFFERENT'}")
    values = {
        "kills": len(killed),
        "seed": seed,
        "texts": limit,
        "shards": shards,
        "shards_finished_at_each_kill": killed,
        "seconds_uninterrupted": round(summary["seconds"], 1),
        "sha256_uninterrupted": checksums[0],
        "sha256_killed_and_resumed": checksums[1],
        "identical": same,
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(values, indent=2) + "\n")
    raise typer.Exit(0 if same else 1)


def _run_and_kill(command: list[str], output: Path, target: int, moment: float) -> int:
    parts = output.with_name(output.name + ".parts")

    def finished() -> int:
        return len(list(parts.glob("part-*.parquet")))

    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    before = finished()
    while process.poll() is None and finished() < target:
        time.sleep(0.01)
    time.sleep(moment)
    if process.poll() is not None:
        raise SystemExit(f"the run ended by itself ({process.returncode}) before it was killed; give more --limit")
    process.kill()  # SIGKILL
    process.wait()
    return max(before, finished())


if __name__ == "__main__":
    typer.run(main)
