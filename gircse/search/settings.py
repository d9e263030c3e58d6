"""What an index is made with: what was asked for, else what it was made with before, else the defaults.

Knows a model and a manifest; knows no files and no terminal.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from gircse.checksum import vectors_checksum
from gircse.errors import UsageError
from gircse.search import DEFAULT_CHUNK_TOKENS
from gircse.search.chunks import check_sizes
from gircse.search.manifest import IndexSettings

if TYPE_CHECKING:
    from gircse.model import GIRCSE


def chunk_sizes(had: IndexSettings | None, tokens: int | None, overlap: int | None) -> tuple[int, int]:
    """Longest chunk and overlap in tokens.

    Raises:
        UsageError: The overlap is half a chunk or more.
    """
    longest = tokens or (had.chunk_tokens if had else DEFAULT_CHUNK_TOKENS)
    if overlap is None:
        overlap = had.chunk_overlap if had else longest // 8
    check_sizes(longest, overlap)
    return longest, overlap


def choose_settings(
    model: GIRCSE,
    had: IndexSettings | None,
    *,
    instruction: str | None = None,
    num_steps: int | None = None,
    chunk_tokens: int | None = None,
    chunk_overlap: int | None = None,
    text_language: str | None = None,
    column: str = "text",
    id_column: str | None = None,
) -> IndexSettings:
    """Settings of an index.

    Args:
        model: Embeds the chunks.
        had: What the index was made with; None where there is none yet.
        instruction: Of documents; the model's document prompt where not given.
        num_steps: K.
        chunk_tokens: Longest chunk.
        chunk_overlap: Tokens shared by neighbours; an eighth of a chunk where not given.
        text_language: Whose word endings full-text search ignores.
        column: Of the text.
        id_column: Of the ids.

    Raises:
        UsageError: Chunks are longer than the model reads, or would overlap by half or more.
    """
    longest, overlap = chunk_sizes(had, chunk_tokens, chunk_overlap)
    limit = model.encoder.max_seq_length
    if longest > limit:
        raise UsageError(
            f"chunks of {longest} tokens exceed the model's longest input of {limit}; lower --chunk-tokens"
        )
    name = model.loaded_from
    if name is not None and Path(name).is_dir():
        name = os.path.abspath(name)
    prompt = had.document_prompt if had else model.prompts.get("document") or ""
    steps = had.num_steps if had else model.num_steps
    return IndexSettings(
        model=name if name is not None or had is None else had.model,
        model_checksum=vectors_checksum(model.encoder),
        num_steps=steps if num_steps is None else num_steps,
        document_prompt=prompt if instruction is None else model.format_instruction(instruction),
        dimension=model.get_embedding_dimension() or 0,
        chunk_tokens=longest,
        chunk_overlap=overlap,
        column=column,
        id_column=id_column,
        text_language=text_language or (had.text_language if had else "English"),
    )
