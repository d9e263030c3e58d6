"""LoRA layers over soft tokens: layers that multiply the same rows together, gradients of adapters once for all steps.

Knows weights and their low-rank updates; knows nothing of peft, models or losses. A step of the refinement loop has few
rows, so each of a LoRA layer's four thin products, forward and backward, costs what it takes to begin one, as do the
two of its adapter's gradients. Query, key and value projections share the first, and what the last need is collected
until all steps of a batch have left it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gircse.fast.packed_weights import PackedWeights
from gircse.fast.trained_steps import Collected

MOST_ROWS = 128
"""Of a step. More are worth products of their own, and collecting takes memory."""


class StepLayers:
    """Linear layers y_i = x·W_iᵀ + b_i + s_i·(x·A_iᵀ)·B_iᵀ with frozen W_i and b_i, for the steps of one batch.

    Args:
        layers: The frozen W_i and b_i.
        adapters: A_i (r_i, in) and B_i (out_i, r_i) of each.
        rounded: A_i in the dtype of x.
        scales: s_i.
        packed: Whose copies of frozen weights multiply.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        adapters: Sequence[tuple[Tensor, Tensor]],
        rounded: Sequence[Tensor],
        scales: Sequence[float],
        packed: PackedWeights,
    ) -> None:
        self.frozen = [(cast(Tensor, layer.weight), cast(Tensor | None, layer.bias)) for layer in layers]
        self.a = torch.cat(list(rounded))  # (sum of r_i, in)
        pairs = zip(adapters, scales, strict=True)
        self.scaled_b = [(scale * b.detach()).to(self.a.dtype) for (_, b), scale in pairs]
        self.ranks = [len(a) for a in rounded]
        self.scales, self.packed, self.collected = scales, packed, Collected()
        self._handle: Tensor | None = None
        self._adapters = adapters

    def products(self, x: Tensor) -> tuple[Tensor, ...]:
        """All y_i, (N, out_i), of x, (N, in)."""
        if self._handle is None and torch.is_grad_enabled():
            weights = [weight for pair in self._adapters for weight in pair]
            self._handle = cast(Tensor, _LateGradients.apply(self, *weights))
        return cast(tuple[Tensor, ...], _StepProducts.apply(x, self._handle, self))


class _LateGradients(torch.autograd.Function):
    """Stands for all A_i and B_i, and computes their gradients once the last step has left its rows."""

    @staticmethod
    def forward(ctx: Any, layers: StepLayers, *adapters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # the steps give none
        ctx.layers, ctx.dtypes = layers, [weight.dtype for weight in adapters]
        return adapters[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        layers: StepLayers = ctx.layers
        low_grad, rows, low, *grads = (torch.cat(part) for part in zip(*layers.collected.take(), strict=True))
        found = []
        of_a = (low_grad.T @ rows).split(layers.ranks)
        of_b = zip(grads, low.split(layers.ranks, dim=1), layers.scales, strict=True)
        for grad_a, (grad, part, scale) in zip(of_a, of_b, strict=True):
            found += [grad_a, (grad.T @ part).mul_(scale)]
        return None, *(grad.to(dtype) for grad, dtype in zip(found, ctx.dtypes, strict=True))


class _StepProducts(torch.autograd.Function):
    """The products of a step. What the gradients of adapters need is left to `_LateGradients`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: Tensor | None, layers: StepLayers) -> tuple[Tensor, ...]:
        low, outs = x @ layers.a.T, []  # (N, sum of r_i)
        for (weight, bias), b, part in zip(layers.frozen, layers.scaled_b, low.split(layers.ranks, dim=1), strict=True):
            out = layers.packed.product(x, weight, bias)  # (N, out_i)
            outs.append((F.linear(x, weight, bias) if out is None else out).addmm_(part, b.T))
        ctx.save_for_backward(x, low)
        ctx.layers = layers
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layers: StepLayers = ctx.layers
        x, low = ctx.saved_tensors
        low_grad = torch.cat([grad @ b for grad, b in zip(gradients, layers.scaled_b, strict=True)], dim=1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = low_grad @ layers.a
            for grad, (weight, _) in zip(gradients, layers.frozen, strict=True):
                grad_x += transposed_product(grad, weight, layers.packed)
        layers.collected.add(low_grad, x, low, *gradients)
        return grad_x, None, None


def transposed_product(grad: Tensor, weight: Tensor, packed: PackedWeights) -> Tensor:
    """grad·W, (N, in), of (N, out), by a packed copy where there is one."""
    out = packed.product(grad, weight, transposed=True)
    return grad @ weight if out is None else out
