"""Batches by token budget. Knows lengths; knows nothing of texts or models, and does not import torch."""

from __future__ import annotations

from collections.abc import Sequence

from gircse.errors import UsageError

DEFAULT_BATCH_TOKENS = 4096
"""Padded tokens (prompt and soft tokens) of one batch where nothing else is known; `gircse.hardware` knows more."""


def plan_batches(
    lengths: Sequence[int], num_steps: int, batch_tokens: int | None = None, max_batch: int | None = None
) -> list[list[int]]:
    """Batches of similar lengths, longest first, each within the token budget.

    A batch costs (its longest prompt + K) × its rows; a single text above the budget gets a batch of its own.

    Args:
        lengths: Prompt tokens of every text.
        num_steps: K.
        batch_tokens: The budget in padded tokens.
        max_batch: Upper bound on rows.

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
    batches = _fill(order, lengths, num_steps, budget, max_batch)
    if len(batches) > 1:
        # The last batch takes what is left, often a few rows, and small batches are slow: even them out.
        even = -(-sum((lengths[batch[0]] + num_steps) * len(batch) for batch in batches) // len(batches))
        evened = _fill(order, lengths, num_steps, min(budget, even + lengths[order[0]] + num_steps), max_batch)
        if len(evened) == len(batches):
            return evened
    return batches


def _fill(
    order: Sequence[int], lengths: Sequence[int], num_steps: int, budget: int, max_batch: int | None
) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for index in order:
        if room <= 0:
            longest = lengths[index] + num_steps
            room = max(1, budget // longest)
            room = min(room, max_batch) if max_batch else room
            batches.append([])
        batches[-1].append(index)
        room -= 1
    return batches
