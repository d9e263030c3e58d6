"""Chunks: no longer than asked, nothing lost between them, at ends of sentences, overlapping."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gircse.errors import UsageError
from gircse.search.chunks import split_text
from tests.search_model import WordTokenizer

TOKENIZER = WordTokenizer()
WORDS = st.lists(
    st.sampled_from(["one", "two.", "three", "four!\n\n", "(five)", "六。七", "seven's", "  "]), max_size=80
)


def length(text: str) -> int:
    return len(TOKENIZER(text)["input_ids"])


def test_a_short_text_is_left_alone() -> None:
    assert split_text(" A text.  Of two. ", TOKENIZER, 20, 2) == [" A text.  Of two. "]


@given(WORDS, st.integers(1, 12), st.integers(0, 5))
def test_nothing_is_lost_and_nothing_too_long(words: list[str], chunk_tokens: int, overlap: int) -> None:
    text = " ".join(f"w{number}_{word}" for number, word in enumerate(words))  # each word only once
    overlap = min(overlap, (chunk_tokens - 1) // 2)
    chunks = split_text(text, TOKENIZER, chunk_tokens, overlap)
    if length(text) <= chunk_tokens:
        assert chunks == [text]
        return
    reached = 0
    for chunk in chunks:
        assert length(chunk) <= chunk_tokens
        place = text.find(chunk, max(reached - len(chunk), 0))
        assert place >= 0
        assert not text[reached:place].strip(), "lost between two chunks"
        assert length(text[place:reached]) <= overlap + 1, "more overlap than asked for"
        reached = max(reached, place + len(chunk))
    assert not text[reached:].strip(), "lost at the end"


@given(WORDS.map(" ".join), st.integers(1, 12))
def test_without_overlap_the_chunks_are_the_text(text: str, chunk_tokens: int) -> None:
    chunks = split_text(text, TOKENIZER, chunk_tokens, 0)
    assert "".join("".join(chunks).split()) == "".join(text.split())


def test_chunks_end_with_sentences_and_overlap_by_whole_words() -> None:
    text = "Ants dig deep nests. Bees fly far from home. Cats sleep all day long. Dogs bark at every passing car."
    chunks = split_text(text, TOKENIZER, 12, 5)
    assert chunks[0] == "Ants dig deep nests. Bees fly far from home."
    assert all(f" {chunk.split()[0]} " in f" {text} " for chunk in chunks), "no chunk begins within a word"
    assert chunks[1].startswith(("fly", "far", "from", "home")), "the second chunk repeats words of the first"
    assert split_text(text, TOKENIZER, 12, 0)[1].startswith("Cats")


def test_overlap_takes_a_whole_sentence_where_one_fits() -> None:
    text = "Ants dig deep nests all year. Bees fly. Cats sleep all day long. Dogs bark at every car."
    assert split_text(text, TOKENIZER, 10, 4)[1].startswith("Bees fly. Cats")


@pytest.mark.parametrize(("chunk_tokens", "overlap"), [(0, 0), (10, 5), (10, -1), (1, 1)])
def test_impossible_sizes_are_refused(chunk_tokens: int, overlap: int) -> None:
    with pytest.raises(UsageError, match="less than half"):
        split_text("text", TOKENIZER, chunk_tokens, overlap)
