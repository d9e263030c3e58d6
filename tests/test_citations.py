"""Citations: what holds stays, what no passage has goes, and a sentence without one gets that of its source."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gircse.search.answer import repeats
from gircse.search.citations import cite, cited_numbers, sentences, support, with_citations

PASSAGES = [
    "Liquid oxygen was made in quantity by James Dewar, a Scottish chemist, in 1891.",
    "The Danube flows into the Black Sea.",
    "多瑙河流入黑海。它很长。",
]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("The Danube flows into the Black Sea.", "The Danube flows into the Black Sea [2]."),
        ("The Danube flows into the Black Sea [2].", "The Danube flows into the Black Sea [2]."),
        ("The Danube flows into the Black Sea [1].", "The Danube flows into the Black Sea [1]."),
        ("The Danube flows into the Black Sea [7].", "The Danube flows into the Black Sea [2]."),
        ("The Danube, and oxygen [1, 9]. ", "The Danube, and oxygen [1]. "),
        ("The Danube flows into the Black Sea", "The Danube flows into the Black Sea [2]"),
        ('He said "into the Black Sea."\n', 'He said "into the Black Sea [2]."\n'),
        ("多瑙河流入黑海。", "多瑙河流入黑海 [3]。"),
        ("Bananas are yellow.", "Bananas are yellow."),
        ("Bananas are yellow [0].", "Bananas are yellow."),
        ("Bananas [[9]9].", "Bananas."),
        ("Built in [1996], bananas.", "Built in [1996], bananas."),
        ("", ""),
    ],
)
def test_a_sentence(written: str, expected: str) -> None:
    assert cite(written, PASSAGES) == expected
    assert cite(expected, PASSAGES) == expected, "what was cited once stays so"


def test_without_passages_nothing_is_cited() -> None:
    assert cite("The Danube [1].", []) == "The Danube."


def test_sentences() -> None:
    text = 'By J. Dewar, in the U.S. navy. Dr. Who says "so!" [1] 3.5 are\nmore? 一。二！三'
    found = sentences(text)
    assert found == [
        "By J. Dewar, in the U.S. navy. ",
        'Dr. Who says "so!" [1] ',
        "3.5 are\n",
        "more? ",
        "一。",
        "二！",
        "三",
    ]


@settings(max_examples=1000)
@given(
    st.lists(
        st.sampled_from(
            ["The Danube ", "flows", ". ", "[2]", "[", "9]", " [1, ", "\n", "。", "！", "Black Sea", "J.", "a"]
        )
    ),
    st.lists(st.integers(0, 60)),
)
def test_however_the_text_arrives(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[begin:end] for begin, end in pairwise(places)]
    result = "".join(with_citations(pieces, PASSAGES))
    assert result == "".join(with_citations([text], PASSAGES))
    assert cited_numbers(result) <= {1, 2, 3}


def test_sentences_come_as_soon_as_the_next_one_begins() -> None:
    def pieces() -> object:
        yield "The Danube flows into the Black Sea."
        yield " "
        yield "It"
        pytest.fail("the first sentence was known by now")

    assert next(with_citations(pieces(), PASSAGES)) == "The Danube flows into the Black Sea [2]. "  # type: ignore[arg-type]


def test_support() -> None:
    assert support("the black sea", PASSAGES[1]) == 1
    assert support("the black sea [1]", PASSAGES[1]) == 1, "citations are no words of it"
    assert 0 < support("the black forest", PASSAGES[1]) < 1
    assert support("...", PASSAGES[1]) == 0


def test_a_loop_is_seen() -> None:
    assert repeats([1, 2, *[*range(10, 19)] * 3])
    assert repeats([5, 6] * 12)
    assert not repeats([1, 2, *[*range(10, 19)] * 2])
    assert not repeats([5] * 23), "a short repetition may be meant"
    assert not repeats(list(range(100)))
