"""The arithmetic of docs/scaling.md: FLOPs of a passage, hours of a billion, and the rates measured here.

    python benchmarks/scaling.py

Nothing here runs on a GPU: their hours follow from the card's published matrix rate, an assumed share of it, and what
one H100's host kept it busy with (encode_speed_h100.json).
"""

from __future__ import annotations

import json
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gircse.distributed import Corpus
from gircse.embed.writer import Shard, ShardFolder

PASSAGES = 1_000_000_000
N, K = 150, 5  # tokens of a passage, refinement steps


class Backbone(NamedTuple):
    """What the FLOPs depend on; `parameters` without the embedding matrix and the LM head."""

    name: str
    parameters: float
    layers: int
    width: int
    vocabulary: int


class Card(NamedTuple):
    """A GPU: dense bfloat16 matrix rate of its data sheet, FLOP/s."""

    name: str
    rate: float


BACKBONES = (
    Backbone("SmolLM2-135M", 106.2e6, 30, 576, 49_152),
    Backbone("Qwen2.5-0.5B", 357.9e6, 24, 896, 151_936),
    Backbone("Mistral-7B", 6.98e9, 32, 4096, 32_000),
)
CARDS = (Card("L4", 121e12), Card("A100", 312e12), Card("H100 SXM", 989e12))
SHARES = {"SmolLM2-135M": 0.15, "Qwen2.5-0.5B": 0.25, "Mistral-7B": 0.40}  # assumed: small matrices fill a card badly
HOST = 900 * 30
"""Layers times passages of some 200 tokens a second, K = 5, that one H100 and its host came to in the better of two
rounds: with a small backbone the card waits for launches and for the tokenizer."""


def flops(backbone: Backbone, tokens: int = N, steps: int = K) -> float:
    """Of one text: all tokens through the layers, attention, and K soft tokens over the vocabulary."""
    layers = 2 * backbone.parameters * (tokens + steps)
    attention = 4 * backbone.layers * backbone.width * (tokens**2 / 2 + steps * tokens)
    soft_tokens = 4 * backbone.vocabulary * backbone.width * steps
    return layers + attention + soft_tokens


def main() -> None:
    """Print the tables."""
    print(f"{PASSAGES:,} passages of {N} tokens, K = {K}\n")
    print(f"{'backbone':<14}{'GFLOP a text':>14}{'FLOP':>10}{'at K=0':>8}{'float32':>10}{'int8':>10}{'binary':>10}")
    for backbone in BACKBONES:
        each = flops(backbone)
        sizes = [f"{PASSAGES * backbone.width * size / 1e12:.2f} TB" for size in (4, 1, 1 / 8)]
        saved = flops(backbone, steps=0) / each
        print(
            f"{backbone.name:<14}{each / 1e9:>14,.1f}{each * PASSAGES:>10.2g}{saved:>8.0%}"
            + "".join(f"{s:>10}" for s in sizes)
        )
    print("\nGPU-hours (computed, not measured), and hours on 8 and 64 cards")
    for backbone in BACKBONES:
        for card in CARDS:
            share = SHARES[backbone.name]
            rate = min(card.rate * share / flops(backbone), HOST / backbone.layers)
            hours, share = PASSAGES / rate / 3600, rate * flops(backbone) / card.rate
            print(f"{backbone.name:<14}{card.name:<10}{share:>5.0%}{hours:>12,.0f}", end="")
            print(f"{hours / 8:>10,.0f}{hours / 64:>10,.1f}{rate:>12,.0f} texts/s a card")
    print("\nmeasured here, one core")
    for name, rate, unit in measure():
        print(f"{name:<34}{rate:>12,.0f} {unit}")


def measure() -> list[tuple[str, float, str]]:
    """Rates of the work around the model."""
    from transformers import AutoTokenizer

    from gircse.model import pretrained_path

    lines = files("gircse").joinpath("data/demo_corpus.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [" ".join(json.loads(line)["text"] for line in lines[n : n + 5]) for n in range(0, 300, 5)] * 40
    tokenizer = AutoTokenizer.from_pretrained(pretrained_path())
    tokenizer(texts[:100])
    start = time.perf_counter()
    tokens = sum(map(len, tokenizer(texts).input_ids))
    tokenising = tokens / (time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as place:
        corpus = Path(place) / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 60), encoding="utf-8")
        start = time.perf_counter()
        Corpus(str(corpus), "jsonl").plan(65_536)
        planning = corpus.stat().st_size / (time.perf_counter() - start)
        vectors = np.random.default_rng(0).standard_normal((65_536, 576), dtype=np.float32)
        with ShardFolder(Path(place) / "x.parquet", {}) as folder:
            start = time.perf_counter()
            folder.add(0, Shard(len(vectors), 0, 0, ""), range(len(vectors)), vectors)
            writing = vectors.nbytes / (time.perf_counter() - start)
    return [
        ("tokenisation", tokenising, "tokens/s"),
        ("cutting .jsonl into shards", planning / 1e6, "MB/s"),
        ("writing Parquet, synced to disk", writing / 1e6, "MB/s"),
    ]


if __name__ == "__main__":
    main()
