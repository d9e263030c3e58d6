"""What counts as a text where texts come in from outside. Knows Python's types; knows nothing of tokens or models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gircse.errors import UsageError


def is_single(inputs: Any) -> bool:
    """Whether this is one text and not several: a string, ``{"text": ...}``, or what is no collection at all."""
    return isinstance(inputs, str | Mapping) or not isinstance(inputs, Iterable)


def as_texts(inputs: Iterable[Any]) -> list[str]:
    """The texts of a batch.

    Args:
        inputs: Strings, or sentence-transformers' ``{"text": string}``: a list, a column of pandas, a generator ...

    Returns:
        The strings.

    Raises:
        UsageError: It is one text, of which each character would be another; or an item is something else: a missing
            value would be embedded as the word None.
    """
    if isinstance(inputs, bytes) or is_single(inputs):
        raise UsageError("a list of texts is wanted, not one text; put it into a list")
    return [_as_text(item, index) for index, item in enumerate(inputs)]


def _as_text(item: Any, index: int) -> str:
    if isinstance(item, Mapping) and set(item) == {"text"}:
        item = item["text"]
    if not isinstance(item, str):
        shown = " ".join(repr(item).split())[:60]
        raise UsageError(f"text {index} is no string but {type(item).__name__}: {shown}; leave it out or replace it")
    try:
        _ = item.isascii() or item.encode()  # which tokenizers do, and fail without a word about which text
    except UnicodeEncodeError as error:
        raise UsageError(
            f"text {index} has half of a surrogate pair at character {error.start}, which no encoding can hold; "
            "read it with errors='replace'"
        ) from error
    return item
