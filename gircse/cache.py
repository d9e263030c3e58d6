"""Key-value caches of the refinement loop: made by several prompt passes, joined for one decode.

Knows tensors of keys and values; knows nothing of texts, pooling or losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in a buffer with room for what is still to come: no copy at every step.

    For inference: what is written in place has no gradient.

    Args:
        keys: Of the prompt, (B, heads, N, head_dim); each an item of the rows' groups, to be stacked.
        values: Likewise.
        length: N of the result; shorter groups are padded on the left.
        room: Positions that will be added.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], length: int, room: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys[0].dtype, keys[0].device, True
        self._buffers = _stack_into(keys, length, length + room), _stack_into(values, length, length + room)
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def select(self, rows: Tensor | slice) -> None:
        """Keep these rows only, in this order."""
        assert self.keys is not None
        self._buffers = self._buffers[0][rows], self._buffers[1][rows]
        self._show(self.keys.shape[2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new positions behind the last one; all positions so far are returned, as views."""
        assert self.keys is not None
        end = self.keys.shape[2] + key_states.shape[2]
        assert end <= self._buffers[0].shape[2], "more positions than the cache was made for"
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, end - states.shape[2] : end] = states
        self._show(end)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values


def _stack_into(groups: Sequence[Tensor], length: int, capacity: int) -> Tensor:
    """(sum of rows, heads, capacity, head_dim) with every group ending at `length`."""
    rows, first = sum(len(group) for group in groups), groups[0]
    buffer = first.new_zeros(rows, first.shape[1], capacity, first.shape[3])
    start = 0
    for group in groups:
        buffer[start : start + len(group), :, length - group.shape[2] : length] = group
        start += len(group)
    return buffer


def join_caches(caches: Sequence[DynamicCache], length: int, room: int = 0) -> DynamicCache:
    """Stack caches along the batch, each padded on the left to `length` positions.

    Differentiable where gradients are enabled; otherwise the result has its memory allocated beforehand.

    Args:
        caches: Of the same decoder, filled; each up to `length` positions long.
        length: Positions of the result.
        room: Positions that will be added to it.

    Returns:
        A cache over all rows, in the order of `caches`. The padded positions must be masked by the caller.
    """
    if not torch.is_grad_enabled():
        joined = DynamicCache()
        for index in range(len(caches[0].layers)):
            keys, values = zip(*(_layer(cache, index) for cache in caches), strict=True)
            joined.layers.append(PreallocatedLayer(keys, values, length, room))
            for cache in caches:  # the copies are made: free the originals layer by layer
                _released(cache, index)
        return joined
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


def select_rows(cache: DynamicCache, rows: Tensor | slice) -> None:
    """Keep these rows of a cache, in this order. A slice copies nothing.

    Args:
        cache: Changed in place; differentiable.
        rows: Indices, or a slice.
    """
    for index in range(len(cache.layers)):
        layer = cache.layers[index]
        if isinstance(layer, PreallocatedLayer):
            layer.select(rows)
        else:
            keys, values = _layer(cache, index)
            layer.keys, layer.values = keys[rows], values[rows]  # type: ignore[union-attr]


def _released(cache: DynamicCache, index: int) -> None:
    layer = cache.layers[index]
    assert isinstance(layer, DynamicLayer)
    layer.keys = layer.values = None


def _layer(cache: DynamicCache, index: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, (B, heads, N, head_dim) each."""
    layer = cache.layers[index]
    assert isinstance(layer, DynamicLayer), f"layer {index} keeps no keys and values, but a {type(layer).__name__}"
    assert layer.keys is not None, "a cache is read only after a prompt pass has filled it"
    assert layer.values is not None
    return layer.keys, layer.values


def _pad_left(states: Tensor, length: int) -> Tensor:
    return F.pad(states, (0, 0, length - states.shape[2], 0))
