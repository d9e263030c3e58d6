"""Small task folders of every kind, for tests."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TOPICS = ("rain", "bread", "chess")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_retrieval(folder: Path, queries: int = 6, documents: int = 60) -> None:
    """Query i is answered by document i, in almost the same words."""
    write_rows(folder / "corpus.jsonl", [{"id": f"d{i}", "title": "", "text": _said(i)} for i in range(documents)])
    write_rows(folder / "queries.jsonl", [{"id": f"q{i}", "text": _said(i)[:-2]} for i in range(queries)])
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(queries))]
    (folder / "qrels.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_all(data: Path) -> list[str]:
    """A folder of every kind; returns their names."""
    texts = [_said(i) for i in range(24)]
    labelled = [{"text": text, "label": TOPICS[i % 3]} for i, text in enumerate(texts)]
    pairs = [{"sentence1": a, "sentence2": b} for a, b in itertools.pairwise(texts)]
    write_rows(data / "STSBenchmark" / "test.jsonl", [{**pair, "score": i % 6} for i, pair in enumerate(pairs)])
    folders: dict[str, list[dict[str, Any]]] = {
        "PairClassification": [{**pair, "label": i % 2} for i, pair in enumerate(pairs)],
        "Classification": labelled,
        "Clustering": labelled,
        "Reranking": [{"query": t[:-2], "positive": [t], "negative": texts[:3]} for t in texts[4:12]],
        "BitextMining": [{"sentence1": text[:-1], "sentence2": text} for text in texts],
        "Triplets": [
            {"instruction": f"Say {word}", "text": text[:-1], "positive": text, "negative": texts[0]}
            for text in texts[4:10]
            for word in ("what", "how")
        ],
        "Facets": [{"text": text, "labels": {"topic": TOPICS[i % 3], "parity": i % 2}} for i, text in enumerate(texts)],
    }
    for kind, rows in folders.items():
        write_rows(data / f"My{kind}" / "test.jsonl", rows)
        (data / f"My{kind}" / "task.yaml").write_text(f"kind: {kind}\n", encoding="utf-8")
    write_rows(data / "MyClassification" / "train.jsonl", labelled)
    instructions = {"topic": "Name the topic", "parity": "Odd or even"}
    (data / "MyFacets" / "instructions.json").write_text(json.dumps(instructions), encoding="utf-8")
    write_retrieval(data / "SciFact")
    return ["STSBenchmark", "SciFact", *(f"My{kind}" for kind in folders)]


def _said(i: int) -> str:
    return f"{TOPICS[i % 3]} {chr(97 + i % 26) * 3} number {i} {TOPICS[i // 3 % 3]}"
