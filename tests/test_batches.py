"""Batches by token budget: what they hold, and that nothing is lost."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from gircse.batches import batch_cost, plan_batches


@given(
    lengths=st.lists(st.integers(1, 400), max_size=60),
    num_steps=st.integers(0, 20),
    budget=st.integers(1, 2000),
    most=st.none() | st.integers(1, 9),
    padded=st.booleans(),
)
@settings(deadline=None)
def test_batches_keep_their_budget_and_lose_nothing(
    lengths: list[int], num_steps: int, budget: int, most: int | None, padded: bool
) -> None:
    batches = plan_batches(lengths, num_steps, budget, most, padded=padded)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        cost = sum((longest if padded else lengths[index]) + num_steps for index in batch)
        assert len(batch) == 1 or cost <= budget
        assert most is None or len(batch) <= most


@pytest.mark.parametrize("padded", [True, False])
def test_batches_are_of_even_size(padded: bool) -> None:
    batches = plan_batches([10] * 33, 0, 320, padded=padded)
    assert [len(batch) for batch in batches] == [17, 16], "not 32 and 1"


def test_short_texts_pay_nothing_for_a_long_one_where_rows_are_not_padded() -> None:
    assert [len(plan_batches([90, *[6] * 20], 4, 300, padded=padded)) for padded in (True, False)] == [2, 1]


def test_the_cost_of_a_batch() -> None:
    assert batch_cost([5, 3, 2], 4) == 3 * 9
    assert batch_cost([5, 3, 2], 4, padded=False) == 10 + 12
