"""Key-value caches of the refinement loop: made by several prompt passes, joined for one decode.

Knows tensors of keys and values; knows nothing of texts, pooling or losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


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
        states = [_layer(cache, index) for cache in caches]
        keys = torch.cat([_pad_left(keys, length) for keys, _ in states])
        values = torch.cat([_pad_left(values, length) for _, values in states])
        joined.update(keys, values, index)
    return joined


def expand_cache(cache: DynamicCache, rows: int) -> DynamicCache:
    """A one-row cache for `rows` rows that begin with the same tokens. Shares memory until it grows; differentiable."""
    expanded = DynamicCache()
    for index in range(len(cache.layers)):
        keys, values = _layer(cache, index)
        expanded.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
    return expanded


def _layer(cache: DynamicCache, index: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, (B, heads, N, head_dim) each."""
    layer = cache.layers[index]
    assert isinstance(layer, DynamicLayer), f"layer {index} keeps no keys and values, but a {type(layer).__name__}"
    assert layer.keys is not None, "a cache is read only after a prompt pass has filled it"
    assert layer.values is not None
    return layer.keys, layer.values


def _pad_left(states: Tensor, length: int) -> Tensor:
    return F.pad(states, (0, 0, length - states.shape[2], 0))
