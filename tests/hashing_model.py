"""A model for tests of the embedding pipeline: instant, deterministic, and no model at all.

Run as a script it embeds a file slowly, to be killed: ``python tests/hashing_model.py INPUT OUTPUT SECONDS_A_BATCH``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from gircse.embed.job import EmbedSettings, Progress, embed_corpus
from gircse.embed.reader import CorpusReader

DIM = 16


@dataclass(frozen=True)
class CharacterIds:
    ids: list[list[int]]
    truncated: list[bool]


class HashingModel:
    """Vectors from hashes of the characters. They move a little with the batch they are in, as those of real models do.

    So a pipeline that batches differently the second time does not pass for one that resumes exactly.
    """

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause
        self.encoded: list[list[int]] = []

    def get_embedding_dimension(self) -> int:
        return DIM

    def tokenize_texts(
        self, texts: Sequence[str], prompt: str | None = None, max_length: int | None = None
    ) -> CharacterIds:
        whole = [[ord(character) for character in (prompt or "") + text] for text in texts]
        return CharacterIds([ids[:max_length] for ids in whole], [len(ids) > (max_length or len(ids)) for ids in whole])

    def encode_tokenized(
        self, tokenized: Any, *, num_steps: int | None = None, batch_tokens: int | None = None
    ) -> np.ndarray:
        time.sleep(self.pause)
        self.encoded += tokenized.ids
        batch = _noise(str(tokenized.ids))
        return np.stack([_noise(f"{num_steps} {ids}") + 1e-6 * batch for ids in tokenized.ids])


def _noise(text: str) -> np.ndarray:
    seed = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).standard_normal(DIM, dtype=np.float32)


def settings(**changes: Any) -> EmbedSettings:
    values = {"model": "hashing", "model_checksum": "0", "num_steps": 2, "batch_tokens": 400, "shard_size": 16}
    return EmbedSettings(**{**values, **changes})


def _tell(progress: Progress) -> None:
    if progress.tokens:
        print(progress.texts, flush=True)  # noqa: T201  # whoever kills it counts these lines


if __name__ == "__main__":
    embed_corpus(
        HashingModel(float(sys.argv[3])),
        CorpusReader(sys.argv[1]),
        Path(sys.argv[2]),
        settings(),
        resume=True,
        on_progress=_tell,
    )
