"""Key-value caches of the refinement loop: made by several prompt passes, joined for one decode.

Knows tensors of keys and values; knows nothing of texts, pooling or losses.
"""

from __future__ import annotations

import math
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
        keys: The buffer, (B, heads, capacity, head_dim); its dtype is that of what `update` returns.
        values: Likewise.
        length: Positions that are filled.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._buffers = keys, values
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
    """As `stack_into`, differentiable."""
    return torch.cat([F.pad(group.to(dtype), (0, 0, length - group.shape[2], capacity - length)) for group in groups])


def stack_into(groups: Sequence[Tensor], length: int, capacity: int, dtype: torch.dtype) -> Tensor:
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
        stack = _joined if torch.is_grad_enabled() else stack_into
        keys, values = (stack(groups, length, length + room, dtype) for groups in (keys, values))
        joined.layers.append(PreallocatedLayer(keys, values, length))
        for cache in caches:  # the copies are made: free the originals layer by layer
            _released(cache, index)
    return joined


def expand_cache(cache: DynamicCache, rows: int, *, keep: bool = True) -> DynamicCache:
    """A one-row cache for `rows` rows that begin with the same tokens. Shares memory until it grows; differentiable.

    Args:
        cache: Of the tokens that they share.
        rows: How many.
        keep: Whether what is added stays. Without it every layer has been forgotten when the next one is computed.
    """
    expanded = DynamicCache()
    for index in range(len(cache.layers)):
        layer = DynamicLayer() if keep else _ForgetfulLayer()
        _begin_with(layer, *(states.expand(rows, -1, -1, -1) for states in _layer(cache, index)))
        expanded.layers.append(layer)
    return expanded


def _begin_with(layer: DynamicLayer, keys: Tensor, values: Tensor) -> None:
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


class _ForgetfulLayer(DynamicLayer):
    """For a pass whose last state is all that is wanted."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return _after(self.keys, key_states), _after(self.values, value_states)


class JoinedPrompts:
    """What `join_caches` makes, written by the prompt passes themselves: keys and values are never held twice.

    Without gradients only. Groups of rows fill it one after the other. All layers lie in one block of memory, which
    the system has back at once: of many smaller ones a process keeps those that the next batch, of another size,
    cannot use.

    Args:
        rows: Of all groups together.
        length: Positions of the longest prompt.
        room: Positions that soft tokens will add.
        dtype: Of the keys and values.
        layers: How many layers there will be; more, or larger ones than the first, have blocks of their own.
        for_products: Whether the soft tokens' attention is `multiply_single_queries`: then keys lie in columns, and the
            room is filled with zeros.
        prefix_apart: Whether what the rows of a group begin with is left where it is. `length` does not count it then.
    """

    def __init__(
        self,
        rows: int,
        length: int,
        room: int,
        dtype: torch.dtype,
        layers: int,
        *,
        for_products: bool = False,
        prefix_apart: bool = False,
    ) -> None:
        self.rows, self.length, self.room, self.dtype, self.layers = rows, length, room, dtype, layers
        self.for_products, self.prefix_apart = for_products, prefix_apart
        self._buffers: list[tuple[Tensor, Tensor]] = []  # a pair a layer, made in the first pass
        self._block: Tensor | None = None  # what is left of it
        self._begun = 0

    def next_group(self, rows: int, prefix: DynamicCache | None = None) -> DynamicCache:
        """The cache for the prompt pass of the next `rows` rows.

        Args:
            rows: How many.
            prefix: The cache, of one row, of the tokens that all of them begin with.
        """
        taken = slice(self._begun, self._begun + rows)
        self._begun = taken.stop
        return _PromptCache(self, taken, prefix)

    def cache(self) -> DynamicCache:
        """The cache of all rows, once every group has had its pass. Padding must be masked by the caller."""
        assert self._begun == self.rows, "rows without a prompt pass"
        joined = DynamicCache()
        joined.layers.extend(PreallocatedLayer(keys, values, self.length) for keys, values in self._buffers)
        return joined

    def buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer with their room, once every group has had its pass.

        Returns:
            (B, heads, length + room, head_dim) each, contiguous; `for_products` keys are (B, heads, head_dim, length +
            room).
        """
        assert self._begun == self.rows, "rows without a prompt pass"
        return [(keys.mT if self.for_products else keys, values) for keys, values in self._buffers]

    def write(self, layer: int, rows: slice, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Put keys and values of a group's positions at the end of its rows, padding before them.

        Args:
            layer: Index of the layer.
            rows: The group's.
            parts: Keys and values, (b or 1, heads, N, head_dim) each, of positions that follow each other.

        Returns:
            Those of all positions, (b, heads, N, head_dim) each: views.
        """
        if layer == len(self._buffers):
            self._buffers.append((self._buffer(parts[0][0], self.for_products), self._buffer(parts[0][1])))
        keys, values = (
            _write_at_end(buffer[rows, :, : self.length], states)
            for buffer, states in zip(self._buffers[layer], zip(*parts, strict=True), strict=True)
        )
        return keys, values

    def _buffer(self, like: Tensor, in_columns: bool = False) -> Tensor:
        capacity, width = self.length + self.room, like.shape[3]
        shape = self.rows, like.shape[1], *((width, capacity) if in_columns else (capacity, width))
        size = math.prod(shape)
        if self._block is None:
            self._block = like.new_empty(2 * self.layers * size, dtype=self.dtype)
        if len(self._block) < size:
            buffer = like.new_empty(shape, dtype=self.dtype)
        else:
            taken, self._block = self._block.tensor_split([size])
            buffer = taken.view(shape)
        buffer = buffer.mT if in_columns else buffer
        if self.for_products:
            buffer[:, :, self.length :] = 0
        return buffer


def _write_at_end(buffer: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """The written part of a buffer, (b, heads, length, head_dim); what lies before it becomes zero."""
    first = start = buffer.shape[2] - sum(part.shape[2] for part in parts)
    buffer[:, :, :first] = 0
    for part in parts:
        buffer[:, :, start : start + part.shape[2]] = part
        start += part.shape[2]
    return buffer[:, :, first:]


class _PromptCache(DynamicCache):
    """A group's part of `JoinedPrompts`."""

    def __init__(self, joined: JoinedPrompts, rows: slice, prefix: DynamicCache | None) -> None:
        super().__init__()
        self._joined, self._rows = joined, rows
        for index, (keys, values) in enumerate(cache_tensors(prefix) if prefix is not None else ()):
            layer = _PromptLayer(joined, rows, index)
            _begin_with(layer, keys, values)
            self.layers.append(layer)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        while len(self.layers) <= layer_idx:
            self.layers.append(_PromptLayer(self._joined, self._rows, len(self.layers)))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class _PromptLayer(DynamicLayer):
    """Of a `_PromptCache`: its keys and values are the prefix's, of one row, and then those of the whole pass.

    Where keys lie in columns, or the prefix apart, they stay the prefix's, and the pass reads what it has computed
    itself.
    """

    def __init__(self, joined: JoinedPrompts, rows: slice, index: int) -> None:
        super().__init__()
        self._joined, self._rows, self._index = joined, rows, index

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        parts = [(key_states, value_states)]
        if self.keys is not None and not self._joined.prefix_apart:
            assert self.values is not None
            parts.insert(0, (self.keys, self.values))
        written = self._joined.write(self._index, self._rows, parts)
        if self._joined.for_products or self._joined.prefix_apart:
            return _after(self.keys, key_states), _after(self.values, value_states)
        _begin_with(self, *written)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values


def _after(prefix: Tensor | None, states: Tensor) -> Tensor:
    """(b, heads, P + N, head_dim) from a prefix of one row or b, and (b, heads, N, head_dim)."""
    return states if prefix is None else torch.cat([prefix.expand(len(states), -1, -1, -1), states], dim=2)


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
