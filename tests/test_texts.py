"""What counts as a text: columns of any library do, missing values do not become words."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gircse.errors import UsageError
from gircse.model import GIRCSE
from gircse.texts import as_texts

TEXTS = ["one", "two words"]


@pytest.mark.parametrize("make", [tuple, np.array, pd.Series, lambda texts: pd.Series(texts).array, iter])
def test_any_collection_is_several_texts(model: GIRCSE, make: Callable[[list[str]], Any]) -> None:
    expected = model.encode(TEXTS)
    np.testing.assert_array_equal(model.encode(make(TEXTS)), expected)
    np.testing.assert_array_equal(model.encode_document(make(TEXTS)), expected)
    np.testing.assert_array_equal(model.encode_steps(make(TEXTS))[:, -1], expected)


def test_a_text_with_its_name_is_that_text(model: GIRCSE) -> None:
    expected = model.encode("one")
    np.testing.assert_array_equal(model.encode({"text": "one"}), expected)
    np.testing.assert_array_equal(model.encode([{"text": "one"}])[0], expected)
    np.testing.assert_array_equal(model.encode_steps({"text": "one"})[-1], expected)
    assert expected.shape == (32,)


@pytest.mark.parametrize("wrong", [None, float("nan"), 5, b"bytes", ["a", "b"], {"image": "x"}, {"text": None}])
def test_what_is_no_text_is_refused_with_its_place(model: GIRCSE, wrong: Any) -> None:
    with pytest.raises(UsageError, match="text 1 is no string but"):
        model.encode(["fine", wrong])
    with pytest.raises(UsageError, match="text 1 is no string but"):
        model.encode(["fine", wrong], output_value=None)


def test_half_a_character_is_refused_with_its_place(model: GIRCSE) -> None:
    with pytest.raises(UsageError, match="text 1 has half of a surrogate pair at character 2"):
        model.encode(["fine é 😀", "ab\ud83d"])


def test_a_column_with_a_gap_is_refused(model: GIRCSE) -> None:
    with pytest.raises(UsageError, match="text 2 is no string but"):
        model.encode(pd.Series([*TEXTS, None]))


@pytest.mark.parametrize("one", ["hello", {"text": "hello"}, b"hello", None])
def test_one_text_is_no_list_of_characters_or_keys(model: GIRCSE, one: Any) -> None:
    for call in (as_texts, model.tokenize_texts, model.encode_states):
        with pytest.raises(UsageError, match="not one text"):
            call(one)


def test_threads_that_cut_texts_do_not_disturb_each_other(model: GIRCSE) -> None:
    """Cutting sets a state of the tokenizer, which all threads share."""
    long, short = ["a b c " * 900], ["short", "texts"]
    expected = [model.tokenize_texts(texts, max_length=20) for texts in (long, short)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda i: model.tokenize_texts((long, short)[i % 2], max_length=20), range(400)))
    assert all(result == expected[i % 2] for i, result in enumerate(results))


def test_a_maximum_length_is_at_least_one_token(model: GIRCSE) -> None:
    for length in (0, -3):
        with pytest.raises(UsageError, match="1 token or more"):
            model.encoder.tokenize_texts(["a"], max_length=length)
