"""Key-value caches of the refinement loop: made by several prompt passes, joined for one decode.

Knows tensors of keys and values; knows nothing of texts, pooling or losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache


def new_cache() -> DynamicCache:
    """An empty, differentiable cache that keeps every position of every layer.

    Sliding-window layers keep theirs too: the mask does the windowing, and rows of different lengths can be joined.
    """
    return DynamicCache()


def join_caches(caches: Sequence[DynamicCache], length: int) -> DynamicCache:
    """Stack caches along the batch, each padded on the left to `length` positions. Differentiable.

    Args:
        caches: Of the same decoder, filled; each up to `length` positions long.
        length: Positions of the result.

    Returns:
        A cache over all rows, in the order of `caches`. The padded positions must be masked by the caller.
    """
    if len(caches) == 1 and caches[0].get_seq_length() == length:
        return caches[0]
    joined = DynamicCache()
    for index in range(len(caches[0].layers)):
        layers = [cache.layers[index] for cache in caches]
        keys = torch.cat([_pad_left(layer.keys, length) for layer in layers])
        values = torch.cat([_pad_left(layer.values, length) for layer in layers])
        joined.update(keys, values, index)
    return joined


def expand_cache(cache: DynamicCache, rows: int) -> DynamicCache:
    """A one-row cache for `rows` rows that begin with the same tokens. Shares memory until it grows; differentiable."""
    expanded = DynamicCache()
    for index, layer in enumerate(cache.layers):
        assert layer.keys is not None, "the prefix pass has filled it"
        assert layer.values is not None
        expanded.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), index)
    return expanded


def _pad_left(states: Tensor | None, length: int) -> Tensor:
    assert states is not None, "a cache is joined only after its prompt pass has filled it"
    return F.pad(states, (0, 0, length - states.shape[2], 0))  # (B, heads, length, head_dim)
