"""The spared work of classification tasks changes no score."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mteb.abstasks import AbsTaskClassification

from gircse.evaluate.classification import classification_scores

LABELS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=100, deadline=None)
@given(pairs=LABELS, words=st.booleans())
def test_scores_are_those_of_mteb(pairs: list[tuple[int, int]], words: bool) -> None:
    """Labels that are never predicted or never true, two labels, words for labels."""
    true, predicted = (list(column) for column in zip(*pairs, strict=True))
    if words and len(set(true)) != 2:  # mteb's average precision knows numbers only
        true, predicted = [f"label {i}" for i in true], [f"label {i}" for i in predicted]
    if len(set(true)) == 2:
        names = sorted(set(true))  # and 0 and 1 only
        true, predicted = [names.index(i) for i in true], [int(i == names[1]) for i in predicted]
    expected = AbsTaskClassification._calculate_scores(cast(Any, None), cast(Any, true), np.asarray(predicted))
    found = classification_scores(true, np.asarray(predicted))
    assert set(found) == set(expected)
    for name, value in cast(dict[str, Any], expected).items():
        assert found[name] == (None if value is None else pytest.approx(float(value), abs=1e-12)), name
