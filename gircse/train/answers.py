"""What soft tokens shall spell: the answer of every training row whose source has answers.

Knows rows and what a source says of answers; knows nothing of tokens or losses.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

from gircse.errors import GircseError
from gircse.train.recipe import Source

ANSWER_COLUMN = "answer_to_spell"
"""Of training data. A column called ``answer`` is taken for the positive by sentence-transformers' collator."""

QUERIES_FORM = 0
"""Number of the form that all queries of a ``facet: form`` source are in."""

_WORD = re.compile(r"[^\W\d_]{4,}")
"""A keyword has at least four letters: shorter words are mostly grammar."""


def make_answers(
    rows: list[dict[str, Any]],
    source: Source,
    texts: list[list[str]],
    forms: list[list[int]],
    generator: random.Random,
) -> list[str]:
    """The answers of a source's rows.

    They begin with a space, as words do within a text: the prompt does not end with one.

    Args:
        rows: As the file has them.
        source: Whose rows they are.
        texts: Anchor, positive and negatives of every row.
        forms: Under ``facet: form``, the number of each of these texts' form.
        generator: Draws keywords.

    Returns:
        One a row; none where the source has no answers.

    Raises:
        GircseError: A positive that does not fit the pattern, or a form without a name.
    """
    if source.answer is None:
        return []
    if isinstance(source.answer, dict):
        named = zip(rows, forms, strict=True)
        found = [_name_of_form(row["task"], own[0], source, source.answer) for row, own in named]
    elif source.facet == "content":
        found = _keywords([row["query"] for row in rows], generator)
    else:
        found = [_name_in(own[1], source, source.answer) for own in texts]
    return [" " + answer for answer in found]


def _name_of_form(task: str, form: int, source: Source, names: dict[str, str]) -> str:
    if form == QUERIES_FORM:
        return names["queries"]
    found = next((name for pattern, name in names.items() if matches(task, pattern)), None)
    if found is None:
        raise GircseError(f"{source.name}: answer has no name for the positives of {task}; add one")
    return found


def _name_in(positive: str, source: Source, pattern: str) -> str:
    before, _, after = pattern.partition("*")
    name = positive.removeprefix(before).removesuffix(after).strip()
    if not name or not (positive.startswith(before) and positive.endswith(after)):
        raise GircseError(f"{source.name}: the positive {positive[:80]!r} does not fit answer: {pattern!r}")
    return name


def _keywords(queries: list[str], generator: random.Random) -> list[str]:
    """A word of each query, drawn in proportion to 1/√(queries that have it), but none that only one query has.

    Words of a single query are mostly names and misspellings; where there are no others they serve, and where there
    are no words at all, the query does.
    """
    words = [sorted({word.lower() for word in _WORD.findall(query)}) for query in queries]
    counts = Counter(word for own in words for word in own)
    result = []
    for query, own in zip(queries, words, strict=True):
        candidates = [word for word in own if counts[word] > 1] or own or [query.strip() or "nothing"]
        result.append(generator.choices(candidates, [max(counts[word], 1) ** -0.5 for word in candidates])[0])
    return result


def matches(task: str, pattern: str | None) -> bool:
    """Whether a source's task, which may be a pattern, or None for all, means this one; a name means itself too."""
    return pattern is None or task == pattern or fnmatchcase(task, pattern)
