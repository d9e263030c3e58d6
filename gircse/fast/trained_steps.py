"""Attention of soft tokens in training: the gradients of a prompt's keys and values, once for all steps.

Knows tensors of keys and values; knows nothing of layers, texts or losses. Every step reads all keys and values of the
prompt, forward and backward. What its backward pass would add to their gradients, another pass over memory of that
size, is a product of a few rows with as many columns as there are positions: the rows of all steps are collected, and
multiplied together when the last of them is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gircse.cache import stack_into


class Collected:
    """What the backward passes of steps leave for the one node that all of them come from, which runs after them."""

    def __init__(self) -> None:
        self._task = -1
        self._items: list[tuple[Tensor, ...]] = []

    def add(self, *tensors: Tensor) -> None:
        """Leave tensors. Those of an earlier backward pass, which has not come to the node, are forgotten."""
        if (task := torch._C._current_graph_task_id()) != self._task:
            self._task, self._items = task, []
        self._items.append(tensors)

    def take(self) -> list[tuple[Tensor, ...]]:
        """All that this backward pass has left."""
        items = self._items if torch._C._current_graph_task_id() == self._task else []
        self._items = []
        return items


class TrainedGroup:
    """A `StepGroup` in training. Its attention is differentiable.

    Args:
        caches: Of the prompt passes, every layer's keys and values, (b, heads, N, d_head) each.
        mask: (B, longest), 1 for the prompts' tokens and 0 for the padding before them; B rows of all passes.
        dtype: That attention is computed in.

    Attributes:
        rows: B.
        positions: (B, 1), that of the first soft token.
    """

    def __init__(self, caches: Sequence[Sequence[tuple[Tensor, Tensor]]], mask: Tensor, dtype: torch.dtype) -> None:
        self.rows, self._dtype = len(mask), dtype
        self.positions = mask.sum(dim=1, keepdim=True)
        self._layers = [_Layer(layer, mask.shape[1], dtype) for layer in zip(*caches, strict=True)]
        hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask == 0, float("-inf"))
        heads = caches[0][0][0].shape[1]
        self._mask = hidden.repeat_interleave(heads, dim=0).unsqueeze(1)  # (B · heads, 1, longest)

    def keep(self, rows: int) -> None:
        """Only rows that take their steps together have gradients."""
        assert rows == self.rows, "rows that are trained stay"

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """As `StepGroup.attend`."""
        layer = self._layers[index]
        own = layer.with_soft_token(key.to(self._dtype), value.to(self._dtype))
        return _Attention.apply(layer.collected, self._mask, scaling, query, *layer.prompt, *own)  # type: ignore[return-value]


class _Layer:
    """Keys and values of one layer: the prompts', all in one buffer, and the soft tokens' so far."""

    def __init__(self, passes: Sequence[tuple[Tensor, Tensor]], length: int, dtype: torch.dtype) -> None:
        self.collected = Collected()
        keys, values = zip(*passes, strict=True)
        self.prompt: Any = _Joined.apply(self.collected, length, dtype, *keys, *values)
        self._own: tuple[Tensor, Tensor] | None = None

    def with_soft_token(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all soft tokens, (B, heads, k, d_head), the new one last."""
        new = key.unsqueeze(2), value.unsqueeze(2)
        self._own = (
            new if self._own is None else (torch.cat([self._own[0], new[0]], 2), torch.cat([self._own[1], new[1]], 2))
        )
        return self._own


class _Joined(torch.autograd.Function):
    """Keys and values of several prompt passes in buffers of all rows, each padded on the left."""

    @staticmethod
    def forward(
        ctx: Any, collected: Collected, length: int, dtype: torch.dtype, *states: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # the steps give none
        ctx.collected, ctx.passes = collected, [(part.shape[0], part.shape[2], part.dtype) for part in states]
        half = len(states) // 2
        return stack_into(states[:half], length, length, dtype), stack_into(states[half:], length, length, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        steps = ctx.collected.take()
        scores, queries, weights, outs = (
            torch.cat(x, dim=1) for x in zip(*steps, strict=True)
        )  # (B · heads, K · g, ·)
        half, found = len(ctx.passes) // 2, []
        for rows_of, by in ((scores, queries), (weights, outs)):
            total = torch.bmm(rows_of.mT, by)  # (B · heads, longest, d_head)
            start, heads = 0, len(total) // sum(rows for rows, _, _ in ctx.passes[:half])
            for rows, length, dtype in ctx.passes[:half]:
                part = total[start * heads : (start + rows) * heads, -length:]
                found.append(part.unflatten(0, (rows, heads)).to(dtype))
                start += rows
        return None, None, None, *found


class _Attention(torch.autograd.Function):
    """Softmax attention of one query a head to the prompt and the soft tokens; heads that share keys go together.

    The gradients of the prompt's keys and values are left to `_Joined`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        collected: Collected,
        mask: Tensor,
        scaling: float,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
    ) -> Tensor:
        asked = query.to(keys.dtype).reshape(len(mask), -1, query.shape[-1]) * scaling  # (B · heads, g, d_head)
        keys, values, own_keys, own_values = (x.flatten(0, 1) for x in (keys, values, own_keys, own_values))
        scores = torch.cat([torch.baddbmm(mask, asked, keys.mT), torch.bmm(asked, own_keys.mT)], dim=-1)
        weights = scores.softmax(dim=-1)  # (B · heads, g, N + k)
        prompt, own = weights.tensor_split([keys.shape[1]], dim=-1)
        mixed = torch.bmm(prompt, values).baddbmm_(own, own_values)
        ctx.save_for_backward(asked, weights, keys, values, own_keys, own_values)
        ctx.collected, ctx.scaling, ctx.dtype = collected, scaling, query.dtype
        return mixed.to(query.dtype).view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        asked, weights, keys, values, own_keys, own_values = ctx.saved_tensors
        out = gradient.to(asked.dtype).reshape(asked.shape)
        change = torch.cat([torch.bmm(out, values.mT), torch.bmm(out, own_values.mT)], dim=-1)
        change = torch.ops.aten._softmax_backward_data(change, weights, -1, weights.dtype)  # of the scores
        (prompt, own), (of_prompt, of_own) = (x.tensor_split([keys.shape[1]], dim=-1) for x in (weights, change))
        query = torch.bmm(of_prompt, keys).baddbmm_(of_own, own_keys).mul_(ctx.scaling)
        ctx.collected.add(of_prompt, asked, prompt, out)
        batch = len(gradient)
        grad_keys, grad_values = (
            x.unflatten(0, (batch, -1)) for x in (torch.bmm(of_own.mT, asked), torch.bmm(own.mT, out))
        )
        return None, None, None, query.to(ctx.dtype).view(gradient.shape), None, None, grad_keys, grad_values
