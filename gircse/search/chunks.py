"""Cuts a long text into overlapping chunks of at most so many tokens, at ends of sentences where there are any.

Knows a tokenizer and punctuation; knows nothing of documents, models or files. The same text, tokenizer and sizes give
the same chunks.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from typing import Any

from gircse.errors import UsageError

_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+|[。！？]+|\s*\n\s*")
_WHITESPACE = re.compile(r"\s+")


def check_sizes(chunk_tokens: int, overlap: int) -> None:
    """Refuse sizes of chunks that contradict each other.

    Raises:
        UsageError: A chunk has no token, or half of one or more would be the one before.
    """
    if chunk_tokens < 1 or not 0 <= overlap <= (chunk_tokens - 1) // 2:
        raise UsageError(f"chunks of {chunk_tokens} tokens cannot overlap by {overlap}; choose less than half")


def split_text(text: str, tokenizer: Any, chunk_tokens: int, overlap: int) -> list[str]:
    """The chunks of a text, in order.

    A chunk ends after a sentence, else at whitespace, else in the middle of a word, but never before its second half;
    the next one begins at most `overlap` tokens before that end, at the first sentence or word that begins there.

    Args:
        text: The text.
        tokenizer: A tokenizer that gives offsets, as all fast tokenizers of transformers do.
        chunk_tokens: Longest chunk in tokens.
        overlap: Tokens shared by neighbours, at most; below half of `chunk_tokens`.

    Returns:
        At least one chunk; the text as it is where it is short enough.

    Raises:
        UsageError: The sizes contradict each other.
    """
    check_sizes(chunk_tokens, overlap)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(offsets) <= chunk_tokens:
        return [text]
    starts = [start for start, _ in offsets]
    sentences = [match.end() for match in _SENTENCE_END.finditer(text)]
    words = [match.end() for match in _WHITESPACE.finditer(text)]
    chunks: list[str] = []
    begin = 0  # character
    while True:
        first = max(bisect_right(starts, begin) - 1, 0)  # the token that holds it; tokens may begin with their space
        last = first + chunk_tokens  # exclusive
        if last >= len(offsets):
            chunks.append(text[begin:])
            break
        low, high = max(starts[first + chunk_tokens // 2], begin), _skip_whitespace(text, starts[last])
        end = _last_within(sentences, low, high) or _last_within(words, low, high) or high
        chunks.append(text[begin:end])
        if not overlap:
            begin = end
            continue
        back = starts[max(bisect_right(starts, end) - 1 - overlap, first + 1)]
        begin = _first_within(sentences, back, end) or _first_within(words, back, end) or back
    return [chunk.strip() for chunk in chunks if chunk.strip()]


def _skip_whitespace(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _last_within(places: list[int], low: int, high: int) -> int | None:
    """The greatest place with low < place <= high."""
    index = bisect_right(places, high) - 1
    return places[index] if index >= 0 and places[index] > low else None


def _first_within(places: list[int], low: int, high: int) -> int | None:
    """The smallest place with low <= place < high."""
    index = bisect_left(places, low)
    return places[index] if index < len(places) and places[index] < high else None
