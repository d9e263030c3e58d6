"""RMS norms in fewer operations than the eight small ones that transformers writes them as.

Knows normalisation modules; knows nothing of layers, caches or texts. On a GPU one operation: a soft token goes through
the layers alone, and what it waits for is the launching of operations; in training each of the eight keeps its input as
well. On a CPU the same arithmetic takes one temporary tensor instead of five: with thousands of rows each of them goes
out to memory and back (docs/experiments.md).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def use_fused_norms(model: nn.Module) -> int:
    """Let the RMS norms of a model be computed as one operation on a GPU, and with one temporary tensor on a CPU.

    Only modules whose own result the operation reproduces are taken: Gemma's, which add 1 to their weights, stay.

    Args:
        model: Changed in place; it can still be copied and pickled.

    Returns:
        How many norms are fused.
    """
    count = 0
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and "forward" not in vars(module) and _is_plain(module):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]
            count += 1
    return count


def is_fused(module: nn.Module) -> bool:
    """Whether `use_fused_norms` has taken this one, which then is x / sqrt(mean(x²) + ε) · weight and no more."""
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is _forward


def fused_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The norm x / sqrt(mean(x²) + ε) · weight over the last dimension, (..., d), rounded once."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


def frugal_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As `fused_norm`, in float32, with one temporary tensor of the size of x. Differentiable."""
    if torch.is_grad_enabled():
        return _Norm.apply(x, weight, epsilon)  # type: ignore[return-value]
    return _norm(x, weight, epsilon)[0]


class _Norm(torch.autograd.Function):
    """Keeps x itself for the backward pass, and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out, scale = _norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed, wide = _scaled(x.float(), scale, x), gradient.float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (wide * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
        wide = _scaled(wide, weight, gradient)
        shared = (wide * normed).mean(dim=-1, keepdim=True)
        return wide.sub_(normed.mul_(shared)).mul_(scale).to(x.dtype), grad_weight, None


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm, and what every row was multiplied by for it, (..., 1)."""
    wide = x.float()
    mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])  # of x²
    scale = mean.add_(epsilon).rsqrt_()
    return _scaled(wide, scale, x).mul_(weight).to(x.dtype), scale


def _scaled(wide: Tensor, scale: Tensor, source: Tensor) -> Tensor:
    """Multiply, in the memory of `wide` where that is not the source's own."""
    return wide * scale if wide is source else wide.mul_(scale)


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    if x.is_cuda and x.dtype == weight.dtype:
        return fused_norm(x, weight, module.variance_epsilon)  # type: ignore[arg-type]
    if x.device.type == "cpu" and x.dtype == weight.dtype:
        return frugal_norm(x, weight, module.variance_epsilon)  # type: ignore[arg-type]
    return type(module).forward(module, x)


@torch.no_grad()
def _is_plain(module: nn.Module) -> bool:
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or not isinstance(epsilon, float) or weight.is_meta:
        return False
    ramp = torch.linspace(-2.0, 3.0, weight.numel(), device=weight.device, dtype=weight.dtype)
    expected, found = module(ramp), fused_norm(ramp, weight, epsilon)
    return expected.dtype == found.dtype and bool(torch.isclose(expected, found, rtol=2e-2, atol=1e-6).all())
