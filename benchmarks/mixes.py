"""Where the benchmarks' texts are, and real ones of three lengths. Imports little, as memory is measured."""

from __future__ import annotations

import json
from pathlib import Path

INSTRUCTION = "Retrieve semantically similar text"
"""Over short and medium texts; long ones are plain."""

MIXES = ("short", "medium", "long")


def read_mix(data: Path, mix: str, count: int) -> list[str]:
    """The first texts of a file: STSBenchmark's sentences, news, or scientific abstracts cut to 140 words."""
    file, field = {
        "short": (data / "STSBenchmark" / "test.jsonl", "sentence1"),
        "medium": (data / "NewsClassification" / "test.jsonl", "text"),
        "long": (data / "SciFact" / "corpus.jsonl", "text"),
    }[mix]
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[: 4 * count]]
    texts = list(dict.fromkeys(row[field] for row in rows))[:count]
    return [" ".join(text.split()[:140]) for text in texts] if mix == "long" else texts
