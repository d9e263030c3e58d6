"""Search: an index of a corpus on disk, vector, full-text and hybrid search in it, reranking, answers with citations.

`corpus` reads documents, `chunks` cuts them, `table` keeps chunks in LanceDB, `manifest` remembers what made them,
`index` ties these to a model; `condition` checks filters, `search` asks, `rerank` ranks again, `answer` writes,
`citations` says what it was written from. This file holds only the words they share, so that the command line can offer
them without importing anything heavy.
"""

from __future__ import annotations

from typing import Literal

SearchMode = Literal["hybrid", "vector", "text"]
"""What decides the rank: meaning (vector), words (text, BM25), or both (hybrid, reciprocal rank fusion)."""

DEFAULT_CHUNK_TOKENS = 128
"""Longest chunk of a document in tokens of the model; a shorter document is one chunk."""

DEFAULT_CHUNK_OVERLAP = DEFAULT_CHUNK_TOKENS // 8
"""Tokens that a chunk shares with the one before it, at most."""

DEFAULT_EXACT_BELOW = 50_000
"""Chunks from which on vectors are searched approximately (IVF-HNSW); below, every vector is compared."""

TEXT_LANGUAGES = (
    "Arabic", "Danish", "Dutch", "English", "Finnish", "French", "German", "Greek", "Hungarian", "Italian", "Norwegian",
    "Portuguese", "Romanian", "Russian", "Spanish", "Swedish", "Tamil", "Turkish",
)  # fmt: skip
"""Whose word endings LanceDB's full-text search can ignore."""

DEFAULT_CANDIDATES = 50
"""How many chunks of the first stage are ranked again by the second."""

DEFAULT_MIN_SIMILARITY = 0.83
"""Cosine similarity to the question below which a passage is not used for an answer."""

DEFAULT_CONTEXT_TOKENS = 768
"""Tokens of all passages that an answer is written from."""

DEFAULT_MAX_TOKENS = 160
"""Longest answer in tokens."""
