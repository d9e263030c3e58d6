"""Citations of an answer: numbers that no passage has are taken out, sentences without one are attributed.

Knows text alone. A small writer hardly ever cites, and then at random; which passage a sentence was taken from shows in
its words. (Attribution after writing, as in arXiv 2210.08726, by overlap instead of a second model.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

MIN_SUPPORT = 0.6
"""Share of a sentence's trigrams from which on a passage counts as its source (``benchmarks/answers.py``)."""

CITATION = re.compile(r"\s*[\[【](\d{1,3}(?: *, *\d{1,3})*)[\]】]")
_WORD = re.compile(r"\w+")
# A sentence has ended once the next one has begun, and not before: a citation may follow its full stop. Initials and
# abbreviations in mid-sentence ("J. Dewar", "U.S. troops") do not end one.
_SENTENCE_END = re.compile(
    rf"(?:(?<!\b[A-Z])[.!?…]+[\"'”’»)]*(?:{CITATION.pattern})*\s+(?=[^\s\[【a-z])"
    r"|[。！？]+(?=[^\s\[【。！？])|\s*\n\s*(?=[^\s\[【]))"
)
_FULL_STOP = re.compile(r"[.!?…。！？]*[\"'”’»)]*\s*$")


def cited_numbers(text: str) -> set[int]:
    """The numbers that stand in brackets, as in ``[2]`` and ``[1, 3]``."""
    return {int(number) for match in CITATION.finditer(text) for number in match[1].split(",")}


def with_citations(pieces: Iterable[str], passages: Sequence[str]) -> Iterator[str]:
    """The same text, sentence by sentence as each ends, with citations that hold.

    Args:
        pieces: Text as it is written, cut anywhere.
        passages: What it was written from; the first is cited as 1.

    Yields:
        Sentences with the whitespace around them. A number that no passage has is left out. A sentence without any
        other is given that of the passage that has most of its words (`support`), if that is `MIN_SUPPORT` or more.
    """
    waiting = ""
    for piece in pieces:
        waiting += piece
        *ended, waiting = sentences(waiting)
        yield from (cite(sentence, passages) for sentence in ended)
    if waiting:
        yield cite(waiting, passages)


def sentences(text: str) -> list[str]:
    """A text in sentences; the last one may still go on. A single word and a full stop are none: "Dr.", "3."."""
    found: list[str] = []
    begin = 0
    for match in _SENTENCE_END.finditer(text):
        sentence = text[begin : match.end()]
        if match[0].startswith(".") and len(sentence.split()) == 1:
            continue
        found.append(sentence)
        begin = match.end()
    return [*found, text[begin:]]


def cite(sentence: str, passages: Sequence[str]) -> str:
    """One sentence with citations that hold; see `with_citations`."""

    def existing(match: re.Match[str]) -> str:
        numbers = [number for number in map(int, match[1].split(",")) if 1 <= number <= len(passages)]
        return f" [{', '.join(map(str, numbers))}]" if numbers else ""

    before = None
    while sentence != before:  # what is left of "[[9]9]" is one again
        before, sentence = sentence, CITATION.sub(existing, sentence)
    supports = [support(sentence, passage) for passage in passages]
    if cited_numbers(sentence) or max(supports, default=0.0) < MIN_SUPPORT:
        return sentence
    citation = f" [{supports.index(max(supports)) + 1}]"
    return _FULL_STOP.sub(lambda end: citation + end[0], sentence, count=1)


def support(sentence: str, passage: str) -> float:
    """The share of a sentence's character trigrams that a passage has too, between 0 and 1."""
    trigrams = _trigrams(sentence)
    return len(trigrams & _trigrams(passage)) / len(trigrams) if trigrams else 0.0


def _trigrams(text: str) -> set[str]:
    """Of each word with a space on both sides, so that endings count little and short words something."""
    words = (f" {word} " for word in _WORD.findall(CITATION.sub("", text).lower()))
    return {word[place : place + 3] for word in words for place in range(len(word) - 2)}
