"""How a batch of prompts is laid out for the prompt passes: padding side, groups of similar length, a shared prefix.

Knows token ids and masks; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SHARED_TOKENS = 6
"""A shared prefix shorter than this is not worth a pass of its own."""

MIN_SHARING_ROWS = 4
"""Nor is one that fewer rows share."""


@dataclass(frozen=True)
class PromptGroup:
    """Rows that go through the prompt pass together.

    Attributes:
        rows: Their indices in the batch, b of them.
        ids: (b, N) token ids after the prefix, padded on the left.
        mask: (b, len(prefix) + N): 1 for the prefix and for tokens, 0 for padding.
        prefix: Token ids that every row of the group begins with and that are computed once; may be empty.
    """

    rows: list[int]
    ids: Tensor
    mask: Tensor
    prefix: tuple[int, ...] = ()

    @property
    def own_mask(self) -> Tensor:
        """(b, N): the mask after the prefix."""
        return self.mask[:, len(self.prefix) :]

    def ordered_by(self, key: Callable[[int], int]) -> PromptGroup:
        """The same rows in another order.

        Args:
            key: Of a row's index in the batch; the smallest come first.
        """
        places = sorted(range(len(self.rows)), key=lambda place: key(self.rows[place]))
        return PromptGroup([self.rows[place] for place in places], self.ids[places], self.mask[places], self.prefix)


def plan_prompts(
    input_ids: Tensor, attention_mask: Tensor, tokens: int | None, *, share_prefix: bool = True, worth: int = 0
) -> list[PromptGroup]:
    """Lay out a batch.

    Args:
        input_ids: (B, N), padded on either side.
        attention_mask: (B, N) of 0 and 1.
        tokens: Padded tokens of a group; None makes one group of all rows in their order, without a prefix.
        share_prefix: Whether rows may share a prefix. It stands apart from the rest of a short row by that row's
            padding, which a decoder with a sliding window shorter than the row would count.
        worth: Fewest tokens that sharing must save, as it takes a pass more.

    Returns:
        Groups that hold every row exactly once.
    """
    if tokens is None:
        return [PromptGroup(list(range(len(input_ids))), *align_right(input_ids, attention_mask))]
    texts = [
        tuple(token for token, kept in zip(ids, mask, strict=True) if kept)
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
    ]
    prefix, sharing = shared_prefix(texts) if share_prefix else ((), set())
    if len(prefix) * len(sharing) < worth:
        prefix, sharing = (), set()
    groups = []
    for start, rows in ((prefix, sorted(sharing)), ((), [row for row in range(len(texts)) if row not in sharing])):
        for group in group_rows([len(texts[row]) - len(start) for row in rows], tokens):
            members = [rows[index] for index in group]
            ids, mask = _right_aligned([texts[row][len(start) :] for row in members], like=input_ids)
            mask = torch.cat([mask.new_ones(len(members), len(start)), mask], dim=1)
            groups.append(PromptGroup(members, ids, mask, start))
    return groups


def shared_prefix(texts: list[tuple[int, ...]]) -> tuple[tuple[int, ...], set[int]]:
    """The longest run of tokens that the first row has in common with others, and the rows that begin with it.

    A row keeps at least one token after the prefix: its last state is the one that counts.

    Returns:
        The prefix and the rows; both empty where sharing would save nothing.
    """
    common = [_common_length(texts[0], text) for text in texts]
    sharing = {row for row, length in enumerate(common) if min(length, len(texts[row]) - 1) >= MIN_SHARED_TOKENS}
    if len(sharing) < MIN_SHARING_ROWS:
        return (), set()
    length = min(min(common[row], len(texts[row]) - 1) for row in sharing)
    return texts[0][:length], sharing


def _common_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def group_rows(lengths: list[int], tokens: int) -> list[list[int]]:
    """Rows of similar length, longest first, for passes with little padding.

    A group ends where it holds `tokens` padded tokens, or where a row is shorter than three quarters of the longest of
    its group and the group is already worth a pass of its own (half of `tokens`).

    Args:
        lengths: Tokens of every row.
        tokens: Padded tokens of one group.

    Returns:
        Indices into `lengths`, every one exactly once.
    """
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        padded = len(groups[-1]) * longest if groups else 0
        full = padded + longest > tokens
        ragged = lengths[row] < 0.75 * longest and padded >= tokens // 2
        if not groups or full or ragged:
            groups.append([])
            longest = lengths[row]
        groups[-1].append(row)
    return groups


def join_groups(groups: Sequence[PromptGroup], padding: int) -> list[list[PromptGroup]]:
    """Neighbours that begin with the same prefix, together where that is little padding.

    Args:
        groups: The longest first, of those with the same prefix.
        padding: Padded tokens, to the first of those that are put together, that are no more than little.

    Returns:
        Every group exactly once, in their order.
    """
    joined: list[list[PromptGroup]] = []
    added = 0
    for group in groups:
        if joined and joined[-1][0].prefix == group.prefix:
            added += (joined[-1][0].ids.shape[1] - group.ids.shape[1]) * len(group.rows)
            if added <= padding:
                joined[-1].append(group)
                continue
        joined.append([group])
        added = 0
    return joined


def align_right(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's tokens to the right end, so that all rows take their soft tokens in the same column.

    Sliding windows and causal masks are counted in columns: with padding between prompt and soft tokens they would
    be counted wrongly, so a right-padded batch becomes a left-padded one. Columns that are padding in every row go.

    Args:
        input_ids: (B, N).
        attention_mask: (B, N) of 0 and 1.

    Returns:
        Both, (B, N'), N' the longest row.
    """
    longest = int(attention_mask.sum(dim=1).max())
    if bool(attention_mask[:, -longest:].all()):  # nothing padded inside the window that is kept
        return input_ids[:, -longest:], attention_mask[:, -longest:]
    order = attention_mask.long().argsort(dim=1, stable=True)[:, -longest:]  # padding first, tokens in their order
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def _right_aligned(texts: list[tuple[int, ...]], like: Tensor) -> tuple[Tensor, Tensor]:
    longest = max(len(text) for text in texts)
    ids = torch.tensor([(0,) * (longest - len(text)) + text for text in texts], device=like.device)
    mask = torch.tensor([(0,) * (longest - len(text)) + (1,) * len(text) for text in texts], device=like.device)
    return ids, mask
