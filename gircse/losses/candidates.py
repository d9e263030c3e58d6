"""Which texts of a batch are negatives of a row: all of its candidates but those that are known to be answers too.

Knows token ids, keys of texts and classes; knows nothing of embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gircse.errors import UsageError

TEXT_KEY = "text_key"
"""Of a column's features, where it is there: (B,) int64, equal for texts that count as the same though their tokens
differ, as they do under two wordings of one instruction."""
PLAIN_KEY = "plain_key"
"""Of every column's features, where it is there: (B,) int64, equal for texts that are the same but for prompts."""
KNOWN_KEYS = "known_keys"
"""Of the anchors' features, where it is there: (B, n) int64, plain keys of texts that are no negatives of a row: its
own, and all that are known to answer it, drawn or not."""

_FEW = 8


@torch.no_grad()
def allowed_candidates(
    columns: Sequence[dict[str, Tensor]],
    labels: Tensor | None = None,
    *,
    in_batch_negatives: bool = True,
    gather: Callable[[Tensor], Tensor] | None = None,
    first: int = 0,
) -> Tensor:
    """Which candidates stand in a row's softmax: its positive, and what is not a false negative.

    Args:
        columns: Token ids and masks of anchors, positives and each column of negatives, B rows each; and, in every
            column or in none, its `TEXT_KEY`; and anchors' `KNOWN_KEYS` and every column's `PLAIN_KEY`, or neither.
        labels: Classes, (B,) of positives or (B, columns) of all texts, or None.
        in_batch_negatives: Whether the other rows' candidates are a row's too.
        gather: Makes of a tensor that of all processes, along the first dimension.
        first: Where this process's rows begin in it.

    Returns:
        (B, C) bool. C is B · (columns − 1), or with `gather` that times the number of processes; candidates are ordered
        by column, then by process, then by row.

    Raises:
        UsageError: Neither in-batch negatives nor others.
    """
    gather = gather or (lambda tensor: tensor)
    keys = [_keys(column) for column in columns]
    anchors, positives, size = keys[0], keys[1], len(keys[0])
    rows = torch.arange(size, device=anchors.device)
    candidates = [gather(column) for column in keys[1:]]
    total = len(candidates[0])
    same_row = torch.zeros(size, total, dtype=torch.bool, device=anchors.device)
    same_row[rows, rows + first] = True
    if in_batch_negatives:
        allowed = torch.ones_like(same_row).repeat(1, len(candidates))
    elif len(columns) < 3:
        raise UsageError("without in-batch negatives every row needs a negative; add a column of negatives")
    else:
        allowed = same_row.repeat(1, len(candidates))
    found = torch.cat(candidates)
    allowed &= ~(_are_same(positives, found) | _are_same(anchors, found))
    if KNOWN_KEYS in columns[0]:
        plain = torch.cat([gather(column[PLAIN_KEY].to(anchors.device)) for column in columns[1:]])
        allowed &= ~_are_known(columns[0][KNOWN_KEYS].to(anchors.device), plain)
    # The positive of another row with this row's anchor is one of this row's too, e.g. another translation.
    allowed[:, :total] &= ~_are_same(anchors, gather(anchors))
    if labels is not None and labels.dim() == 1 and labels.numel() == size:
        allowed[:, :total] &= gather(labels.contiguous()) != labels.unsqueeze(1)
    elif labels is not None and labels.shape == (size, len(columns)):
        classes = torch.cat([gather(column.contiguous()) for column in labels[:, 1:].unbind(dim=1)])
        allowed &= classes != labels[:, :1]
    allowed[rows, rows + first] = True
    return allowed


def _are_same(texts: Tensor, others: Tensor) -> Tensor:
    """Whether texts share one of their keys: (B, n) and (C, n) or (C, 1) to (B, C)."""
    return (texts.unsqueeze(1) == others).any(dim=-1)


def _are_known(known: Tensor, texts: Tensor) -> Tensor:
    """Whether texts are among those that rows know: (B, n) and (C,) to (B, C)."""
    if known.shape[1] <= _FEW:
        return _are_same(known, texts.unsqueeze(1))
    return torch.stack([torch.isin(texts, own) for own in known])  # all at once would be B · C · n comparisons


def _keys(features: dict[str, Tensor]) -> Tensor:
    """Numbers for every row, (B, 1 or 2) int64: of its token ids whatever the padding, and its text's own.

    What the model cannot tell apart is no negative, and numbers can be gathered.
    """
    ids, mask = features["input_ids"].tolist(), features["attention_mask"].tolist()
    rows = (tuple(t for t, keep in zip(row, kept, strict=True) if keep) for row, kept in zip(ids, mask, strict=True))
    # Python's hash of integers does not depend on the process.
    tokens = torch.tensor([hash(row) for row in rows], dtype=torch.int64, device=features["input_ids"].device)
    return torch.stack([tokens, features[TEXT_KEY].to(tokens.device)] if TEXT_KEY in features else [tokens], dim=1)
