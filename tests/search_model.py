"""A model for tests of search: words to vectors, instantly, so that texts that share words are similar.

Run as a script it makes an index slowly, to be killed: ``python tests/search_model.py CORPUS INDEX SECONDS_A_BATCH``.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gircse.embed.reader import CorpusReader
from gircse.search.corpus import DocumentCorpus
from gircse.search.index import IndexProgress, IndexSummary, index_corpus
from gircse.search.manifest import IndexSettings

DIM = 64


class WordTokenizer:
    """Words and punctuation with their offsets; a word begins with its space, as in GPT-2's vocabulary."""

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        matches = list(re.finditer(r" ?\w+|[^\w ]|\s", text))
        return {"input_ids": [match[0] for match in matches], "offset_mapping": [match.span() for match in matches]}


@dataclass(frozen=True)
class Words:
    ids: list[list[str]]


class WordModel:
    """The mean of its words' random vectors. Each refinement step takes words that begin with ``step`` less seriously.

    So a text can rank higher with few steps and lower with more, which tests of reranking need.
    """

    num_steps = 2
    max_seq_length = 40
    loaded_from: str | None = None

    def __init__(self, pause: float = 0.0, checksum: str = "0") -> None:
        self.pause, self.tokenizer = pause, WordTokenizer()
        self.prompts = {"query": "query: ", "document": ""}
        self.embedded: list[str] = []
        self.calls: list[int] = []
        self.encoder: Any = SimpleNamespace(
            checksum_before_freezing=None,
            reference=SimpleNamespace(sha256=checksum),
            refinement=SimpleNamespace(pooling="mean", temperature=1.0, attention="causal"),
            weights="backbone",
            backbone=SimpleNamespace(named_parameters=list),
            max_seq_length=self.max_seq_length,
            tokenizer=self.tokenizer,
        )

    def get_embedding_dimension(self) -> int:
        return DIM

    def format_instruction(self, instruction: str) -> str:
        return f"{instruction} : "

    def tokenize_texts(self, texts: Sequence[str], prompt: str | None = None, max_length: int | None = None) -> Words:
        return Words([re.findall(r"\w+", ((prompt or "") + text).lower())[:max_length] for text in texts])

    def encode_tokenized(
        self, tokenized: Words, *, num_steps: int | None = None, batch_tokens: int | None = None
    ) -> np.ndarray:
        time.sleep(self.pause)
        self.embedded += [" ".join(words) for words in tokenized.ids]
        steps = self.num_steps if num_steps is None else num_steps
        self.calls.append(steps)
        return np.stack([_vector(words, steps) for words in tokenized.ids])


def _vector(words: list[str], steps: int) -> np.ndarray:
    weights = [0.1**steps if word.startswith("step") else 1.0 for word in words]
    vectors = [weight * _word(word.removeprefix("step")) for word, weight in zip(words, weights, strict=True)]
    return np.stack([np.full(DIM, 1e-3, np.float32), *vectors]).sum(axis=0)


def _word(word: str) -> np.ndarray:
    seed = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).standard_normal(DIM, dtype=np.float32)


def settings(**changes: Any) -> IndexSettings:
    values: dict[str, Any] = {
        "model": None,
        "model_checksum": "0",
        "num_steps": 2,
        "document_prompt": "",
        "dimension": DIM,
        "chunk_tokens": 12,
        "chunk_overlap": 3,
        "id_column": "id",
    }
    return IndexSettings(**{**values, **changes})


def make_index(
    corpus: Path, folder: Path, model: Any = None, made_with: IndexSettings | None = None, **options: Any
) -> IndexSummary:
    made_with = made_with or settings()
    reader = CorpusReader(str(corpus), column=made_with.column, id_column=made_with.id_column)
    return index_corpus(model or WordModel(), DocumentCorpus(reader), folder, made_with, **options)


def _tell(progress: IndexProgress) -> None:
    print(progress.embedded, flush=True)  # noqa: T201  # whoever kills it counts these lines


if __name__ == "__main__":
    make_index(Path(sys.argv[1]), Path(sys.argv[2]), WordModel(float(sys.argv[3])), on_progress=_tell)
