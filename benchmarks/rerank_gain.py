"""What a second stage with more refinement steps gains: nDCG@10 and MAP of K=1, of K=5, and of K=1 then K=5.

    python benchmarks/rerank_gain.py --data DATA/eval --limit 60 --documents 600

Retrieval tasks (SciFact, FeedbackQARetrieval): every query against the corpus; a document's score is its best chunk's,
as in an index. With --limit and --documents the corpus is the relevant documents of the sampled queries and random
others, so the scores are higher than on the whole task, and comparable with each other only. TRECQA-Reranking: the
candidates given. One run of the model yields the vectors after every step, so all methods rank by the same vectors.
95 % intervals of the gain over K=1 are bootstraps over queries. Scores are pytrec_eval's, as in MTEB.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytrec_eval
from arguments import data_folder, output_file
from rich.console import Console
from rich.table import Table

from gircse.model import GIRCSE
from gircse.search import DEFAULT_CHUNK_OVERLAP, DEFAULT_CHUNK_TOKENS
from gircse.search.chunks import split_text

INSTRUCTIONS = {
    "SciFact": "Given a scientific claim, retrieve documents that support or refute the claim",
    "FeedbackQARetrieval": "Given a question, retrieve passages that answer it",
    "TRECQA-Reranking": "Given a question, retrieve a sentence that answers it",
}
METRICS = {"ndcg_cut_10": "nDCG@10", "map": "MAP"}


@dataclass(frozen=True)
class Task:
    """Queries, documents, which documents each query may choose from (None: all), and which are relevant."""

    queries: dict[str, str]
    documents: dict[str, str]
    candidates: dict[str, list[str]] | None
    relevant: dict[str, dict[str, int]]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def retrieval(folder: Path, limit: int, documents: int, generator: random.Random) -> Task:
    """A sample of queries over their relevant documents and others."""
    relevant: dict[str, dict[str, int]] = {}
    with (folder / "qrels.tsv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream, delimiter="\t"):
            if int(row["score"]) > 0:
                relevant.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    queries = {row["id"]: row["text"] for row in read_lines(folder / "queries.jsonl") if row["id"] in relevant}
    chosen = generator.sample(sorted(queries), min(limit, len(queries)))
    corpus = {row["id"]: f"{row['title']} {row['text']}".strip() for row in read_lines(folder / "corpus.jsonl")}
    needed = {name for query in chosen for name in relevant[query]}
    others = sorted(set(corpus) - needed)
    kept = needed | set(generator.sample(others, min(max(documents - len(needed), 0), len(others))))
    return Task(
        {name: queries[name] for name in chosen},
        {name: corpus[name] for name in sorted(kept)},
        None,
        {name: relevant[name] for name in chosen},
    )


def reranking(folder: Path, limit: int, generator: random.Random) -> Task:
    """A sample of queries, each with its own candidates."""
    rows = read_lines(folder / "test.jsonl")
    rows = generator.sample(rows, min(limit, len(rows)))
    documents = sorted({text for row in rows for text in (*row["positive"], *row["negative"])})
    names = {text: f"d{number}" for number, text in enumerate(documents)}
    return Task(
        {f"q{number}": row["query"] for number, row in enumerate(rows)},
        {name: text for text, name in names.items()},
        {f"q{n}": [names[text] for text in (*row["positive"], *row["negative"])] for n, row in enumerate(rows)},
        {f"q{n}": {names[text]: 1 for text in row["positive"]} for n, row in enumerate(rows)},
    )


def score_task(model: GIRCSE, task: Task, instruction: str, steps: tuple[int, int], depth: int) -> dict[str, Any]:
    """Per method and metric: the value of every query, in the order of the queries."""
    few, many = steps
    chunks = [
        (name, chunk)
        for name, text in task.documents.items()
        for chunk in split_text(text, model.tokenizer, DEFAULT_CHUNK_TOKENS, DEFAULT_CHUNK_OVERLAP)
    ]
    started = time.perf_counter()
    vectors = model.encode_steps([text for _, text in chunks], num_steps=many, normalize_embeddings=True)
    seconds = time.perf_counter() - started
    queries = model.encode_steps(
        list(task.queries.values()), num_steps=many, instruction=instruction, normalize_embeddings=True
    )
    names = list(task.documents)
    place = {name: index for index, name in enumerate(names)}
    owners = np.array([place[name] for name, _ in chunks])
    runs: dict[str, dict[str, dict[str, float]]] = {}
    for row, query in enumerate(task.queries):
        allowed = range(len(names)) if task.candidates is None else [place[name] for name in task.candidates[query]]
        best = {}
        for step in (few, many):
            best[step] = np.full(len(names), -np.inf, dtype=np.float32)
            np.maximum.at(best[step], owners, vectors[:, step - 1] @ queries[row, step - 1])
        first = sorted(allowed, key=lambda index: -best[few][index])
        for name, order in (
            (f"K={few}", first),
            (f"K={many}", sorted(allowed, key=lambda index: -best[many][index])),
            (f"K={few} then K={many}", sorted(first[:depth], key=lambda index: -best[many][index]) + first[depth:]),
        ):
            run = {names[index]: 1 / (1 + rank) for rank, index in enumerate(order)}
            runs.setdefault(name, {})[query] = run
    evaluator = pytrec_eval.RelevanceEvaluator(task.relevant, set(METRICS))
    values: dict[str, Any] = {}
    for name, run in runs.items():
        found = evaluator.evaluate(run)
        values[name] = {metric: [found[query][metric] for query in task.queries] for metric in METRICS}
    return {"values": values, "chunks": len(chunks), "seconds": seconds}


def summarize(values: dict[str, dict[str, list[float]]], seed: int) -> dict[str, dict[str, Any]]:
    """Means in percent, and the gain over the first method with its interval."""
    base = next(iter(values))
    count = len(values[base]["map"])
    draws = np.random.default_rng(seed).integers(0, count, (1000, count))
    summary: dict[str, dict[str, Any]] = {}
    for name, metrics in values.items():
        summary[name] = {}
        for metric, scores in metrics.items():
            gains = 100 * (np.array(scores) - np.array(values[base][metric]))
            low, high = np.percentile(gains[draws].mean(axis=1), [2.5, 97.5])
            summary[name][metric] = {
                "mean": 100 * float(np.mean(scores)),
                "gain": float(gains.mean()),
                "interval": [float(low), float(high)],
            }
    return summary


def main() -> None:
    """Measure, print a table, write a JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=data_folder, required=True, help="folder with a folder a task")
    parser.add_argument("--tasks", nargs="+", choices=INSTRUCTIONS, default=list(INSTRUCTIONS))
    parser.add_argument("--limit", type=int, default=60, help="queries of a task")
    parser.add_argument("--documents", type=int, default=600, help="of a retrieval task's corpus")
    parser.add_argument("--steps", default="1,5", help="few,many")
    parser.add_argument("--depth", type=int, default=50, help="candidates of the second stage")
    parser.add_argument("--model", help="the shipped one where not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=output_file, default=Path("benchmarks/results/rerank_gain.json"))
    options = parser.parse_args()
    few, many = (int(step) for step in options.steps.split(","))
    model = GIRCSE(options.model)
    table = Table("task", "method", *(f"{name} (gain, 95 %)" for name in METRICS.values()), box=None)
    results: dict[str, Any] = {}
    for name in options.tasks:
        generator = random.Random(options.seed)
        folder = options.data / name
        if (folder / "corpus.jsonl").is_file():
            task = retrieval(folder, options.limit, options.documents, generator)
        else:
            task = reranking(folder, options.limit, generator)
        scored = score_task(model, task, INSTRUCTIONS[name], (few, many), options.depth)
        summary = summarize(scored["values"], options.seed)
        results[name] = {
            "queries": len(task.queries),
            "documents": len(task.documents),
            "chunks": scored["chunks"],
            "seconds": round(scored["seconds"], 1),
            "scores": summary,
        }
        for method, metrics in summary.items():
            cells = [
                f"{m['mean']:.1f} ({m['gain']:+.1f}, {m['interval'][0]:+.1f} to {m['interval'][1]:+.1f})"
                for m in metrics.values()
            ]
            table.add_row(name, method, *cells)
    Console().print(table)
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("data", "output")}
    options.output.write_text(json.dumps({"settings": settings, "tasks": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
