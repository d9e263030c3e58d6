"""How long a passage may be before its vector gets worse: retrieval with texts cut, whole, and by their best chunk.

    python benchmarks/passage_length.py --data DATA/eval
    python benchmarks/passage_length.py --data DATA/eval --models shipped,runs/mine

SciFact and FeedbackQARetrieval: sampled queries against their relevant documents and random others, so the scores are
higher than on the whole task, and comparable with each other only. A document is read up to so many tokens, or cut into
chunks as `gircse index` does, where its score is that of its best chunk. 95 % intervals of the gain over the first
line of a task are bootstraps over queries.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytrec_eval
import torch
from arguments import data_folder, output_file
from rerank_gain import INSTRUCTIONS, METRICS, Task, retrieval, summarize
from rich.console import Console
from rich.table import Table

from gircse.hardware import fastest_dtype
from gircse.model import GIRCSE
from gircse.search.chunks import split_text

TASKS = ("SciFact", "FeedbackQARetrieval")


def numbers(text: str) -> list[int]:
    """Whole numbers that are separated by commas; none of an empty text."""
    return [int(part) for part in text.split(",") if part]


def whole(model: GIRCSE, texts: list[str], tokens: int, queries: np.ndarray, num_steps: int) -> np.ndarray:
    """(queries, documents) scores of texts that are read up to so many tokens."""
    tokenized = model.tokenize_texts(texts, max_length=tokens)
    vectors = torch.nn.functional.normalize(model.encode_tokenized(tokenized, num_steps=num_steps), dim=1)
    return queries @ vectors.numpy().T


def best_chunk(model: GIRCSE, texts: list[str], tokens: int, queries: np.ndarray, num_steps: int) -> np.ndarray:
    """(queries, documents) scores of texts by their best chunk of at most so many tokens, an eighth overlapping."""
    chunks = [split_text(text, model.tokenizer, tokens, tokens // 8) for text in texts]
    vectors = model.encode([chunk for own in chunks for chunk in own], num_steps=num_steps, normalize_embeddings=True)
    owners = np.repeat(np.arange(len(texts)), [len(own) for own in chunks])
    scores = np.full((len(texts), len(queries)), -np.inf, dtype=np.float32)
    np.maximum.at(scores, owners, vectors @ queries.T)
    return scores.T


def measure(model: GIRCSE, task: Task, instruction: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Per way of reading: seconds, and per metric the value of every query, in the order of the queries."""
    names, texts = list(task.documents), list(task.documents.values())
    queries = model.encode_query(
        list(task.queries.values()), instruction=instruction, num_steps=options.num_steps, normalize_embeddings=True
    )
    evaluator = pytrec_eval.RelevanceEvaluator(task.relevant, set(METRICS))
    ways = [("cut at", tokens, whole) for tokens in options.cut] + [
        ("best chunk of", tokens, best_chunk) for tokens in options.chunks
    ]
    found = {}
    for what, tokens, score in ways:
        started = time.perf_counter()
        scores = score(model, texts, tokens, queries, options.num_steps)
        seconds = time.perf_counter() - started
        run = {
            query: {name: float(value) for name, value in zip(names, row, strict=True)}
            for query, row in zip(task.queries, scores, strict=True)
        }
        values = evaluator.evaluate(run)
        found[f"{what} {tokens}"] = {
            "seconds": round(seconds, 1),
            "values": {metric: [values[query][metric] for query in task.queries] for metric in METRICS},
        }
    return found


def main() -> None:
    """Measure, print a table, write a JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=data_folder, required=True, help="folder with a folder a task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--models", default="shipped", help="separated by commas; folders, or shipped")
    parser.add_argument("--limit", type=int, default=250, help="queries of a task")
    parser.add_argument("--documents", type=int, default=800, help="of a task's corpus")
    parser.add_argument("--num-steps", type=int, default=5)
    parser.add_argument("--cut", type=numbers, default=[512, 256, 128], help="tokens, separated by commas")
    parser.add_argument("--chunks", type=numbers, default=[256, 128], help="tokens, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=output_file, default=Path("benchmarks/results/passage_length.json"))
    options = parser.parse_args()
    table = Table("task", "model", "documents", "s", *(f"{name} (gain, 95 %)" for name in METRICS.values()), box=None)
    results: dict[str, Any] = {}
    for name in options.tasks:
        task = retrieval(options.data / name, options.limit, options.documents, random.Random(options.seed))
        found = {}
        for place in options.models.split(","):
            model = GIRCSE(None if place == "shipped" else place, dtype=fastest_dtype("cpu")[0])
            model.pack_weights()
            for way, own in measure(model, task, INSTRUCTIONS[name], options).items():
                found[f"{place}, {way}"] = own
        summary = summarize({way: own["values"] for way, own in found.items()}, options.seed)
        for way, metrics in summary.items():
            metrics["seconds"] = found[way]["seconds"]
            cells = [
                f"{m['mean']:.1f} ({m['gain']:+.1f}, {m['interval'][0]:+.1f} to {m['interval'][1]:+.1f})"
                for m in (metrics[metric] for metric in METRICS)
            ]
            table.add_row(name, *way.split(", "), f"{metrics['seconds']:.0f}", *cells)
        results[name] = {"queries": len(task.queries), "documents": len(task.documents), "scores": summary}
    Console().print(table)
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("data", "output")}
    options.output.write_text(json.dumps({"settings": settings, "tasks": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
