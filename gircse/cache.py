"""Key-value caches of the refinement loop: made by several prompt passes, joined for one decode.

Knows tensors of keys and values; knows nothing of texts, pooling or losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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

    With gradients all steps share the buffer as well, so what is kept for the backward pass does not grow with K times
    the prompt.

    Args:
        keys: Of the prompt, (B, heads, N, head_dim); each an item of the rows' groups, to be stacked.
        values: Likewise.
        length: N of the result; shorter groups are padded on the left.
        room: Positions that will be added.
        dtype: Of the buffer, and so of what `update` returns.
    """

    def __init__(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], length: int, room: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = dtype, keys[0].device, True
        stack = _joined if torch.is_grad_enabled() else _stack_into
        self._buffers = stack(keys, length, length + room, dtype), stack(values, length, length + room, dtype)
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
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        assert end <= self._buffers[0].shape[2], "more positions than the cache was made for"
        if torch.is_grad_enabled():
            keys, values = self._buffers
            self.keys, keys = _Append.apply(keys, key_states.to(self.dtype), start)
            self.values, values = _Append.apply(values, value_states.to(self.dtype), start)
            self._buffers = keys, values
        else:
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[:, :, start:end] = states
            self._show(end)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values


class _Append(torch.autograd.Function):
    """Write positions into a buffer that earlier steps have kept views of, and let the gradients of all steps add up.

    What an earlier step has seen is not changed by it, so nothing is copied: the results are the same memory under new
    names, whose versions autograd counts apart. The gradient goes back from step to step in one buffer likewise.
    """

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, states: Tensor, start: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.start, ctx.end, ctx.shape = start, start + states.shape[2], buffer.shape
        written = buffer.data
        written[:, :, start : ctx.end] = states
        return written.data[:, :, : ctx.end], written

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        shown, total = gradients
        if total is None:  # no later step has a gradient
            assert shown is not None
            total = shown.new_zeros(ctx.shape)
        if shown is not None:
            total[:, :, : ctx.end] += shown
        new = total[:, :, ctx.start : ctx.end].clone()
        total[:, :, ctx.start : ctx.end] = 0  # the buffer had nothing there before
        return total, new, None


def _joined(groups: Sequence[Tensor], length: int, capacity: int, dtype: torch.dtype) -> Tensor:
    """As `_stack_into`, differentiable."""
    return torch.cat([F.pad(group.to(dtype), (0, 0, length - group.shape[2], capacity - length)) for group in groups])


def _stack_into(groups: Sequence[Tensor], length: int, capacity: int, dtype: torch.dtype) -> Tensor:
    """(sum of rows, heads, capacity, head_dim) with every group ending at `length`."""
    rows, first = sum(len(group) for group in groups), groups[0]
    buffer = first.new_zeros(rows, first.shape[1], capacity, first.shape[3], dtype=dtype)
    start = 0
    for group in groups:
        buffer[start : start + len(group), :, length - group.shape[2] : length] = group
        start += len(group)
    return buffer


def join_caches(caches: Sequence[DynamicCache], length: int, room: int, dtype: torch.dtype) -> DynamicCache:
    """Stack caches along the batch, each padded on the left to `length` positions. Differentiable.

    Args:
        caches: Of the same decoder, filled; each up to `length` positions long. They are emptied.
        length: Positions of the result.
        room: Positions that will be added to it.
        dtype: Of the result.

    Returns:
        A cache over all rows, in the order of `caches`. The padded positions must be masked by the caller.
    """
    joined = DynamicCache()
    for index in range(len(caches[0].layers)):
        keys, values = zip(*(_layer(cache, index) for cache in caches), strict=True)
        joined.layers.append(PreallocatedLayer(keys, values, length, room, dtype))
        for cache in caches:  # the copies are made: free the originals layer by layer
            _released(cache, index)
    return joined


def expand_cache(cache: DynamicCache, rows: int) -> DynamicCache:
    """A one-row cache for `rows` rows that begin with the same tokens. Shares memory until it grows; differentiable."""
    expanded = DynamicCache()
    for index in range(len(cache.layers)):
        keys, values = _layer(cache, index)
        expanded.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
    return expanded


def cache_tensors(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, (B, heads, N, head_dim) each."""
    return [_layer(cache, index) for index in range(len(cache.layers))]


def select_rows(cache: DynamicCache, rows: Tensor | slice) -> None:
    """Keep these rows of a joined cache, in this order. A slice copies nothing.

    Args:
        cache: Changed in place; differentiable.
        rows: Indices, or a slice.
    """
    for layer in cache.layers:
        assert isinstance(layer, PreallocatedLayer), "only a joined cache loses rows"
        layer.select(rows)


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
