"""RMS norms in fewer operations than the eight small ones that transformers writes them as.

Knows normalisation modules; knows nothing of layers, caches or texts. On a GPU one operation: a soft token goes through
the layers alone, and what it waits for is the launching of operations; in training each of the eight keeps its input as
well. On a CPU inference has the same arithmetic in one temporary tensor instead of five: with thousands of rows each of
them goes out to memory and back (docs/experiments.md).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
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


def fused_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The norm x / sqrt(mean(x²) + ε) · weight over the last dimension, (..., d), rounded once."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


def frugal_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As `fused_norm`, in float32 and without gradients, with one temporary tensor of the size of x."""
    wide = x.float()
    mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])  # of x², (..., 1)
    scale = mean.add_(epsilon).rsqrt_()
    wide = wide * scale if wide is x else wide.mul_(scale)
    return wide.mul_(weight).to(x.dtype)


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    if x.is_cuda and x.dtype == weight.dtype:
        return fused_norm(x, weight, module.variance_epsilon)  # type: ignore[arg-type]
    # Not in training: gradient caching takes a pass without gradients first, which must round as the one with them.
    inference = not (module.training or torch.is_grad_enabled())
    if inference and x.device.type == "cpu" and x.dtype == weight.dtype:
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
