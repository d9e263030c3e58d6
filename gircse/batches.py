"""Batches by token budget. Knows lengths; knows nothing of texts or models, and does not import torch."""

from __future__ import annotations

from collections.abc import Sequence

from gircse.errors import UsageError

DEFAULT_BATCH_TOKENS = 4096
"""Padded tokens (prompt and soft tokens) of one batch where nothing else is known; `gircse.hardware` knows more."""


def plan_batches(
    lengths: Sequence[int],
    num_steps: int,
    batch_tokens: int | None = None,
    max_batch: int | None = None,
    *,
    padded: bool = True,
) -> list[list[int]]:
    """Batches of similar lengths, longest first, each within the token budget.

    A batch costs (its longest prompt + K) × its rows; a single text above the budget gets a batch of its own.

    Args:
        lengths: Prompt tokens of every text.
        num_steps: K.
        batch_tokens: The budget in padded tokens.
        max_batch: Upper bound on rows.
        padded: False where a row costs its own length + K, as padding to the longest of the batch is not kept.

    Returns:
        Indices into `lengths`, every one exactly once.

    Raises:
        UsageError: K is negative or the budget is below 1.
    """
    if num_steps < 0:
        raise UsageError(f"num_steps must be 0 or more, not {num_steps}")
    budget = DEFAULT_BATCH_TOKENS if batch_tokens is None else batch_tokens
    if budget < 1:
        raise UsageError(f"batch_tokens must be 1 or more, not {budget}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    costs = [length + num_steps for length in lengths]
    batches = _fill(order, costs, budget, max_batch, padded)
    if len(batches) > 1:
        # The last batch takes what is left, often a few rows, and small batches are slow: even them out.
        even = -(-sum(_cost(batch, costs, padded) for batch in batches) // len(batches))
        evened = _fill(order, costs, min(budget, even + costs[order[0]]), max_batch, padded)
        if len(evened) == len(batches):
            return evened
    return batches


def _fill(
    order: Sequence[int], costs: Sequence[int], budget: int, max_batch: int | None, padded: bool
) -> list[list[int]]:
    batches: list[list[int]] = []
    cost = 0
    for index in order:
        added = costs[batches[-1][0]] if batches and padded else costs[index]
        if not batches or cost + added > budget or len(batches[-1]) == max_batch:
            batches.append([])
            cost, added = 0, costs[index]
        batches[-1].append(index)
        cost += added
    return batches


def _cost(batch: Sequence[int], costs: Sequence[int], padded: bool) -> int:
    return costs[batch[0]] * len(batch) if padded else sum(costs[index] for index in batch)
