"""LoRA layers as one operation for training: the same numbers with less traffic to memory.

Knows peft's linear LoRA layers; knows nothing of models or losses. peft computes x·Wᵀ, then scales and adds the
update in passes of their own over the large output, forward and backward. Here the thin products are accumulated into
the large one's result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


class _LoraProduct(torch.autograd.Function):
    """y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ with a frozen W and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        low = rows @ a.T  # (N, r)
        out = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)  # (N, out)
        out.addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, low = ctx.saved_tensors
        grad = gradients[0].reshape(-1, weight.shape[0])  # (N, out)
        low_grad = (grad @ b).mul_(ctx.scale)  # (N, r)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(low_grad, a).view(ctx.shape)
        return grad_x, None, None, low_grad.T @ rows, (grad.T @ low).mul_(ctx.scale), None


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[int]:
    """Run the model's plain LoRA layers as one operation each; others stay as they are.

    Yields:
        How many layers are fused.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Linear) and _is_plain(layer)]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)  # type: ignore[method-assign]
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def _is_plain(layer: Linear) -> bool:
    """One adapter without dropout, bias or variants such as DoRA, over a frozen linear layer of the same dtype."""
    names = layer.active_adapters
    base = layer.get_base_layer()
    if len(names) != 1 or type(base) is not nn.Linear or base.weight.requires_grad:
        return False
    name = names[0]
    return (
        name in layer.lora_A
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_A[name].weight.dtype == base.weight.dtype
        and getattr(layer.lora_B[name], "bias", None) is None
    )


def _forward(layer: Linear, original: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name, base = layer.active_adapters[0], layer.get_base_layer()
    if (
        layer.merged
        or layer.disable_adapters
        or torch.is_autocast_enabled(x.device.type)
        or x.dtype != base.weight.dtype
    ):
        return original(x, *args, **kwargs)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _LoraProduct.apply(x, base.weight, base.bias, a, b, layer.scaling[name])  # type: ignore[return-value]
