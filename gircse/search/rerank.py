"""Ranks candidates again with more refinement steps than found them.

Knows a model and texts; knows nothing of indices or files. A long document is scored by its best chunk, as in an index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gircse.errors import UsageError
from gircse.search import DEFAULT_CHUNK_OVERLAP, DEFAULT_CHUNK_TOKENS
from gircse.search.chunks import split_text
from gircse.search.index import TextEncoder, normalized

if TYPE_CHECKING:
    from gircse.model import GIRCSE


@dataclass(frozen=True)
class RankedDocument:
    """A document and how well it fits.

    Attributes:
        index: Its place among the documents given, from 0.
        score: Cosine similarity to the query.
        text: The document.
    """

    index: int
    score: float
    text: str


def rerank(
    model: GIRCSE,
    query: str,
    documents: Sequence[str],
    *,
    instruction: str | None = None,
    num_steps: int | None = None,
    top: int | None = None,
) -> list[RankedDocument]:
    """Documents by their similarity to a query, best first.

    Args:
        model: Embeds both.
        query: What is asked.
        documents: The candidates; one longer than a chunk is scored by its best chunk.
        instruction: Of the query; the checkpoint's ``query`` prompt where not given.
        num_steps: K; the model's where not given.
        top: Keep so many.

    Raises:
        UsageError: The query is empty, or `top` below 1.
    """
    if not query.strip():
        raise UsageError("the query is empty; give a text")
    if top is not None and top < 1:
        raise UsageError(f"top must be 1 or more, not {top}")
    if not documents:
        return []
    prompt = model.prompts.get("query") if instruction is None else model.format_instruction(instruction)
    chunk_tokens = min(DEFAULT_CHUNK_TOKENS, model.max_seq_length or DEFAULT_CHUNK_TOKENS)
    overlap = min(DEFAULT_CHUNK_OVERLAP, (chunk_tokens - 1) // 2)
    chunks = [split_text(text, model.tokenizer, chunk_tokens, overlap) for text in documents]
    owners = np.repeat(np.arange(len(documents)), [len(texts) for texts in chunks])
    vector = embed_query(model, query, prompt, num_steps)
    tokenized = model.tokenize_texts([text for texts in chunks for text in texts], model.prompts.get("document"))
    similarities = normalized(model.encode_tokenized(tokenized, num_steps=num_steps)) @ vector
    scores = np.full(len(documents), -np.inf, dtype=np.float32)
    np.maximum.at(scores, owners, similarities)
    order: list[int] = np.argsort(-scores, kind="stable")[:top].tolist()
    return [RankedDocument(index, float(scores[index]), documents[index]) for index in order]


def embed_query(model: TextEncoder, query: str, prompt: str | None, num_steps: int | None) -> np.ndarray:
    """A query's vector, (d,) float32 of length 1."""
    return normalized(model.encode_tokenized(model.tokenize_texts([query], prompt), num_steps=num_steps))[0]
