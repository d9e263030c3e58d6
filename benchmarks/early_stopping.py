"""What it would buy to stop writing where an embedding no longer moves, against one K for all texts.

    python benchmarks/early_stopping.py --data DATA/eval

A text stops after the first step k >= 2 whose embedding has a cosine of at least the threshold to the one before. One
run of K = 20 yields all embeddings, so stopping is simulated: mean steps written and Spearman's correlation on two STS
tasks, for every threshold and for every fixed K. Stopping is worth something only where it scores higher than the
fixed K of as many steps; what it would cost to regroup a batch is not counted.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from arguments import data_folder, output_file
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from gircse.model import GIRCSE

TASKS = ("STSBenchmark", "STS13")
INSTRUCTION = "Retrieve semantically similar text"
STEPS = 20
THRESHOLDS = (0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)


def stopping_steps(embeddings: np.ndarray, threshold: float) -> np.ndarray:
    """The step after which each text stops, (n,), from 2 to K; ``embeddings`` are normalised, (n, K, d)."""
    still = np.einsum("nkd,nkd->nk", embeddings[:, 1:], embeddings[:, :-1]) >= threshold  # (n, K - 1)
    return np.where(still.any(axis=1), still.argmax(axis=1) + 2, embeddings.shape[1])


def score(embeddings: np.ndarray, steps: np.ndarray, pairs: np.ndarray, gold: np.ndarray) -> float:
    """Spearman's correlation × 100 of cosines with the gold scores, each text after its own steps."""
    chosen = embeddings[np.arange(len(embeddings)), steps - 1]  # (n, d)
    cosines = np.einsum("nd,nd->n", chosen[pairs[:, 0]], chosen[pairs[:, 1]])
    found: Any = spearmanr(cosines, gold)
    return 100 * float(found.statistic)


def main() -> None:
    """Encode, simulate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=data_folder, required=True, help="folder of task folders")
    parser.add_argument("--limit", type=int, default=300, help="pairs of each task")
    parser.add_argument("--model", help="a folder or hub id; the shipped model where not given")
    parser.add_argument("--output", type=output_file, default=Path(__file__).parent / "results" / "early_stopping.json")
    args = parser.parse_args()
    model = GIRCSE(args.model) if args.model else GIRCSE()
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for task in TASKS:
        lines = (args.data / task / "test.jsonl").read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines]
        items = random.Random(42).sample(items, min(args.limit, len(items)))
        texts = list(dict.fromkeys(item[side] for item in items for side in ("sentence1", "sentence2")))
        place = {text: at for at, text in enumerate(texts)}
        pairs = np.array([[place[item["sentence1"]], place[item["sentence2"]]] for item in items])
        gold = np.array([item["score"] for item in items])
        embeddings = model.encode_steps(
            texts, num_steps=STEPS, instruction=INSTRUCTION, normalize_embeddings=True, show_progress_bar=True
        )
        ways = {f"K = {k}": np.full(len(texts), k) for k in (1, 2, 3, 5, 8, 10, 15, 20)}
        ways |= {f"stop at {t}": stopping_steps(embeddings, t) for t in THRESHOLDS}
        for name, steps in ways.items():
            found = {"mean_steps": float(steps.mean()), "spearman": score(embeddings, steps, pairs, gold)}
            rows.setdefault(name, {})[task] = found
    table = Table("", *(f"{task}: {what}" for task in TASKS for what in ("mean steps", "Spearman")))
    for name, found in rows.items():
        values = [found[task] for task in TASKS]
        table.add_row(name, *(f"{value[key]:.1f}" for value in values for key in ("mean_steps", "spearman")))
    Console(width=110).print(table)
    args.output.write_text(json.dumps({"limit": args.limit, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
