"""What a trained adapter does on three held-out tasks, against the untrained model and an encoder-only twin.

    python benchmarks/adapter_quality.py --data DATA/eval --model shipped --model untrained --model k0=runs/first-k0

Every model is scored at K = 0 (the prompt's last state) and at the given steps from one run a text. The tasks follow
MTEB's protocol: Spearman correlation of cosine similarity (STSBenchmark); accuracy of a logistic regression on 8
examples a label, mean over experiments (Banking77Classification); mean average precision (TRECQA-Reranking).
`--limit` takes the same rows for every model. 95 % intervals are bootstraps over pairs, test texts and queries.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import data_folder, output_file
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression

from gircse.model import GIRCSE
from gircse.pooling import pool_steps

INSTRUCTIONS = {
    "STSBenchmark": "Retrieve semantically similar text",
    "Banking77Classification": "Given a bank customer's question, retrieve questions with the same intent",
    "TRECQA-Reranking": "Given a question, retrieve a sentence that answers it",
}
SAMPLES_PER_LABEL = 8
Encoder = Callable[[list[str], str], np.ndarray]  # texts, prompt -> (n, len(steps), d), L2-normalised


def read_rows(path: Path, limit: int | None, seed: int) -> list[dict[str, Any]]:
    """The task's rows, or a deterministic sample of them."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return rows if limit is None or limit >= len(rows) else random.Random(seed).sample(rows, limit)


def sts(encode: Encoder, folder: Path, limit: int | None, seed: int) -> list[tuple[float, np.ndarray]]:
    """Per step: the score and its bootstrap samples."""
    rows = read_rows(folder / "test.jsonl", limit, seed)
    texts = sorted({row[side] for row in rows for side in ("sentence1", "sentence2")})
    place = {text: index for index, text in enumerate(texts)}
    vectors = encode(texts, INSTRUCTIONS["STSBenchmark"])
    a = vectors[[place[row["sentence1"]] for row in rows]]
    b = vectors[[place[row["sentence2"]] for row in rows]]
    gold = np.array([row["score"] for row in rows])
    cosine = (a * b).sum(-1)  # (rows, steps)
    draws = np.random.default_rng(seed).integers(0, len(rows), (500, len(rows)))
    return [(correlation(c, gold), np.array([correlation(c[d], gold[d]) for d in draws])) for c in cosine.T]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation."""
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def classification(
    encode: Encoder, folder: Path, limit: int | None, seed: int, experiments: int
) -> list[tuple[float, np.ndarray]]:
    """Per step: mean accuracy over the experiments, and bootstrap samples over test texts."""
    train, test = read_rows(folder / "train.jsonl", None, seed), read_rows(folder / "test.jsonl", limit, seed)
    by_label: dict[str, list[int]] = {}
    for index, row in enumerate(train):
        by_label.setdefault(row["label"], []).append(index)
    generator = random.Random(seed)
    draws = [
        [i for label in sorted(by_label) for i in generator.sample(by_label[label], SAMPLES_PER_LABEL)]
        for _ in range(experiments)
    ]
    used = sorted({index for draw in draws for index in draw})
    prompt = INSTRUCTIONS["Banking77Classification"]
    train_vectors = dict(zip(used, encode([train[index]["text"] for index in used], prompt), strict=True))
    test_vectors = encode([row["text"] for row in test], prompt)  # (n, steps, d)
    gold = np.array([row["label"] for row in test])
    resamples = np.random.default_rng(seed).integers(0, len(test), (500, len(test)))
    results = []
    for step in range(test_vectors.shape[1]):
        correct = np.zeros(len(test))
        for draw in draws:
            classifier = LogisticRegression(max_iter=100, random_state=seed)
            classifier.fit([train_vectors[i][step] for i in draw], [train[i]["label"] for i in draw])
            correct += classifier.predict(test_vectors[:, step]) == gold
        accuracy = correct / experiments
        results.append((float(accuracy.mean()), accuracy[resamples].mean(axis=1)))
    return results


def reranking(
    encode: Encoder, queries: Encoder, folder: Path, limit: int | None, seed: int
) -> list[tuple[float, np.ndarray]]:
    """Per step: mean average precision over queries, and its bootstrap samples."""
    rows = read_rows(folder / "test.jsonl", limit, seed)
    documents = sorted({text for row in rows for text in (*row["positive"], *row["negative"])})
    place = {text: index for index, text in enumerate(documents)}
    passage_vectors = encode(documents, "")
    query_vectors = queries([row["query"] for row in rows], INSTRUCTIONS["TRECQA-Reranking"])
    precisions = np.zeros((len(rows), passage_vectors.shape[1]))
    for index, row in enumerate(rows):
        candidates = [place[text] for text in (*row["positive"], *row["negative"])]
        relevant = np.array([True] * len(row["positive"]) + [False] * len(row["negative"]))
        for step in range(passage_vectors.shape[1]):
            order = (passage_vectors[candidates, step] @ query_vectors[index, step]).argsort(kind="stable")[::-1]
            hits = relevant[order]
            precisions[index, step] = (hits.cumsum() / np.arange(1, len(hits) + 1))[hits].mean()
    draws = np.random.default_rng(seed).integers(0, len(rows), (500, len(rows)))
    return [(float(p.mean()), p[draws].mean(axis=1)) for p in precisions.T]


def make_encoder(model: GIRCSE, steps: list[int]) -> Encoder:
    """Every asked step from one run: h_0 for K = 0, prefix pools for the others."""
    encoder = model.encoder

    def encode(texts: list[str], instruction: str) -> np.ndarray:
        prompt = model.format_instruction(instruction) if instruction else ""
        states = model.encode_states(texts, prompt=prompt, num_steps=max(steps))  # (n, K + 1, d)
        pooled = (
            torch.cat([states[:, :1], pool_steps(states, encoder.refinement.pooling)], dim=1) if max(steps) else states
        )
        return torch.nn.functional.normalize(pooled[:, steps], dim=-1).numpy()

    return encode


def load(spec: str) -> tuple[str, GIRCSE]:
    """``shipped``, ``untrained``, or ``name=folder``."""
    if spec == "shipped":
        return spec, GIRCSE()
    if spec == "untrained":
        return spec, GIRCSE.from_backbone("smollm2-135m")
    name, _, folder = spec.rpartition("=")
    return name or folder, GIRCSE(folder)


def evaluate(name: str, model: GIRCSE, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All tasks of one model; one entry a task and step."""
    steps = [0] if model.num_steps == 0 else args.steps
    encode = make_encoder(model, steps)
    tasks = {
        "STSBenchmark": lambda folder: sts(encode, folder, args.limit, args.seed),
        "Banking77Classification": lambda folder: classification(
            encode, folder, args.limit, args.seed, args.experiments
        ),
        "TRECQA-Reranking": lambda folder: reranking(encode, encode, folder, args.limit, args.seed),
    }
    entries = []
    for task, score in tasks.items():
        started = time.perf_counter()
        results = score(args.data / task)
        seconds = time.perf_counter() - started
        for step, (value, samples) in zip(steps, results, strict=True):
            low, high = np.percentile(samples, [2.5, 97.5])
            entry = {"model": name, "task": task, "num_steps": step, "score": 100 * value}
            entries.append(entry | {"low": 100 * low, "high": 100 * high, "seconds_of_all_steps": seconds})
        Console(stderr=True).print(f"{name} {task}: {seconds:.0f} s")
    return entries


def main() -> None:
    """Score, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=data_folder, required=True, help="folder of the evaluation data")
    parser.add_argument(
        "--model", action="append", required=True, help="shipped, untrained, or name=folder; repeatable"
    )
    parser.add_argument(
        "--steps", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2, 3, 5, 10]
    )
    parser.add_argument("--limit", type=int, help="rows a task (test rows in classification); all where not given")
    parser.add_argument("--experiments", type=int, default=10, help="logistic regressions; MTEB takes 10")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("-o", "--output", type=output_file, default=Path("benchmarks/results/adapter_quality.json"))
    args = parser.parse_args()
    entries: list[dict[str, Any]] = []
    if args.output.exists():
        kept = json.loads(args.output.read_text())
        same = all(kept["settings"][key] == getattr(args, key) for key in ("limit", "experiments", "seed"))
        entries = kept["entries"] if same else []
    for spec in args.model:
        name, model = load(spec)
        entries = [entry for entry in entries if entry["model"] != name] + evaluate(name, model, args)
        settings = {
            "limit": args.limit,
            "experiments": args.experiments,
            "seed": args.seed,
            "instructions": INSTRUCTIONS,
        }
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        args.output.write_text(
            json.dumps({"settings": settings, "machine": machine, "entries": entries}, indent=1) + "\n"
        )
    table = Table("model", "K", *INSTRUCTIONS, "mean")
    for name, step in dict.fromkeys((entry["model"], entry["num_steps"]) for entry in entries):
        row = {e["task"]: e for e in entries if (e["model"], e["num_steps"]) == (name, step)}
        cells = [f"{row[t]['score']:.1f} ({row[t]['low']:.1f} to {row[t]['high']:.1f})" for t in INSTRUCTIONS]
        table.add_row(name, str(step), *cells, f"{np.mean([row[t]['score'] for t in INSTRUCTIONS]):.1f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
