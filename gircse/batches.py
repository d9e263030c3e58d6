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
    batches = _fill(order, lengths, num_steps, budget, max_batch, padded)
    if len(batches) > 1:
        # The last batch takes what is left, often a few rows, and small batches are slow: even them out.
        whole = sum(batch_cost([lengths[i] for i in batch], num_steps, padded=padded) for batch in batches)
        even = -(-whole // len(batches)) + lengths[order[0]] + num_steps
        evened = _fill(order, lengths, num_steps, min(budget, even), max_batch, padded)
        if len(evened) == len(batches):
            return evened
    return batches


def batch_cost(lengths: Sequence[int], num_steps: int, *, padded: bool = True) -> int:
    """What a batch takes of its budget: tokens of its prompts, with their padding where it is kept, and soft tokens."""
    return (max(lengths) * len(lengths) if padded else sum(lengths)) + num_steps * len(lengths)


def _fill(
    order: Sequence[int], lengths: Sequence[int], num_steps: int, budget: int, max_batch: int | None, padded: bool
) -> list[list[int]]:
    batches: list[list[int]] = []
    cost = 0
    for index in order:
        added = lengths[batches[-1][0] if batches and padded else index] + num_steps
        if not batches or cost + added > budget or len(batches[-1]) == max_batch:
            batches.append([])
            cost, added = 0, lengths[index] + num_steps
        batches[-1].append(index)
        cost += added
    return batches
