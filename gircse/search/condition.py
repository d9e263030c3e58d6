"""Conditions of a search: one whole SQL expression, and what is wrong with one that is refused, in a few words.

Knows how LanceDB quotes and what its parser says; knows nothing of tables. That parser reads the first whole expression
and leaves unread what follows: of ``year = 2018 kind = 'a'`` a search would see half, and find more than was asked for.
In parentheses the same is an error, as long as the condition does not close them itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gircse.errors import UsageError

_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`(?:[^`]|``)*`")
_PREFIXED = re.compile(r"(?<!\w)(?:[A-Za-z]|[uU]&)'")
_FOREIGN = ";", "--", "/*", "$", "?"


def in_parentheses(where: str) -> str:
    """The condition as LanceDB can only take it whole.

    Raises:
        UsageError: It holds what could end it early: parentheses that do not match, an open quote, a semicolon, a
            comment, or a string in other than plain quotes.
    """
    outside = _QUOTED.sub("''", where)  # each keeps its place, so that nothing joins across it
    reason = next((f"{mark!r} can only stand in quotes" for mark in _FOREIGN if mark in outside), None)
    if re.search(r"[\"'`]", outside.replace("''", "")):
        reason = "a quote is not closed"
    elif _PREFIXED.search(outside):
        reason = "a string stands in plain quotes, without a letter before them"
    elif not _are_balanced(outside):
        reason = "its parentheses do not match"
    if reason is not None:
        raise UsageError(f"--where {where!r}: {reason}")
    return f"({where})"


def refusal(where: str, error: Exception, columns: Iterable[str]) -> UsageError:
    """What to tell of a condition that LanceDB does not take, with the metadata columns that there are."""
    text = " ".join(str(error).split()).removeprefix("Invalid input, ").split(", /")[0].split(". Valid fields")[0]
    if syntax := re.search(r"\(sql parser error: (.*)\)$", text):
        text = syntax[1]
    if unread := re.fullmatch(r"Expected: \), found: (.*)", text):  # the one that `in_parentheses` adds
        text = f"it is whole before {unread[1]!r}; join conditions by AND or OR"
    elif ")" not in where:
        text = text.replace("found: )", "found: its end")
    known = ", ".join(map(_as_written, columns)) or "none"
    return UsageError(f"--where {where!r}: {text}; metadata columns: {known}")


def _as_written(column: str) -> str:
    """A column as a condition must write it: in backticks where its name begins with a digit."""
    return f"`{column}` (in backticks)" if column[0].isdigit() else column


def _are_balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return False
    return depth == 0
