"""LoRA layers as one operation for training: the same numbers with less traffic to memory.

Knows peft's linear LoRA layers; knows nothing of models or losses. peft computes x·Wᵀ, then scales and adds the
update in passes of their own over the large output, forward and backward. Here the thin products are accumulated into
the large one's result. Those of soft tokens, which are few rows, are `gircse.train.step_lora`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F

from gircse.fast.packed_weights import PackedWeights
from gircse.train.step_lora import MOST_ROWS, StepLayers, transposed_product


class _LoraProduct(torch.autograd.Function):
    """y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ with a frozen W and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        rounded: tuple[Tensor, Tensor],
        scale: float,
        packed: PackedWeights,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        a_x, b_x = rounded  # A and B in the dtype of x
        low = rows @ a_x.T  # (N, r)
        out = packed.product(rows, weight, bias)  # (N, out)
        if out is None:
            out = F.linear(rows, weight, bias)
        out.addmm_(low, b_x.T, alpha=scale)
        ctx.save_for_backward(rows, weight, a_x, b_x, low)
        ctx.scale, ctx.shape, ctx.packed, ctx.dtype = scale, x.shape, packed, a.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a_x, b_x, low = ctx.saved_tensors
        grad = gradients[0].reshape(-1, weight.shape[0])  # (N, out)
        low_grad = (grad @ b_x).mul_(ctx.scale)  # (N, r)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = transposed_product(grad, weight, ctx.packed).addmm_(low_grad, a_x).view(ctx.shape)
        grad_a, grad_b = low_grad.T @ rows, (grad.T @ low).mul_(ctx.scale)
        return grad_x, None, None, grad_a.to(ctx.dtype), grad_b.to(ctx.dtype), None, None, None


class _FrozenProduct(torch.autograd.Function):
    """y = x·Wᵀ with a frozen W: the LM head."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, packed: PackedWeights) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.packed = packed
        out = packed.product(x, weight)
        return F.linear(x, weight) if out is None else out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        grad = gradients[0].reshape(-1, weight.shape[0])
        return transposed_product(grad, weight, ctx.packed).view(*gradients[0].shape[:-1], -1), None, None


class _Pass:
    """What is made once a forward pass of the model and not once a soft token.

    Adapters in the dtype of the weights under them stay at their places in memory, where recorded steps read them.
    Outside of a forward pass none is given: the weights may have changed.

    Args:
        layers: Those whose adapters have another dtype.
    """

    def __init__(self, layers: list[Linear]) -> None:
        self._layers = layers
        self._pairs: dict[Linear, tuple[Tensor, Tensor]] = {}
        self._steps: dict[tuple[nn.Module, ...], StepLayers] = {}
        self._running = False

    @torch.no_grad()
    def begin(self, *_: Any) -> None:
        """Round all adapters, in a few operations for all of them.

        At every pass: PyTorch's fused optimisers change weights without counting up their versions.
        """
        self._running = True
        if not self._layers:
            return
        weights = [weight for layer in self._layers for weight in _adapter(layer)]
        if not self._pairs or self._pairs[self._layers[0]][0].device != weights[0].device:
            wanted = [cast(Tensor, layer.get_base_layer().weight) for layer in self._layers for _ in range(2)]
            made = [torch.empty_like(weight, dtype=base.dtype) for weight, base in zip(weights, wanted, strict=True)]
            self._pairs = dict(zip(self._layers, zip(made[::2], made[1::2], strict=True), strict=True))
        kept = [rounded for pair in self._pairs.values() for rounded in pair]
        torch._foreach_copy_(kept, weights)  # type: ignore[attr-defined]  # torch's own lists leave it out

    def end(self, *_: Any) -> None:
        self._running = False
        self._steps.clear()

    def together(self, layers: Sequence[Linear], packed: PackedWeights, dtype: torch.dtype) -> StepLayers | None:
        """Layers that multiply the same soft tokens; None where nothing may be kept from one step to the next."""
        if not self._running:
            return None
        if (found := self._steps.get(key := tuple(layers))) is None:
            found = self._steps[key] = StepLayers(
                [layer.get_base_layer() for layer in layers],
                [_adapter(layer) for layer in layers],
                [self.adapter(layer, dtype)[0] for layer in layers],
                [_scale(layer) for layer in layers],
                packed,
            )
        return found

    def adapter(self, layer: Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B of a layer."""
        if self._running and (kept := self._pairs.get(layer)) is not None:
            return kept
        a, b = _adapter(layer)
        return a.detach().to(dtype), b.detach().to(dtype)


def _adapter(layer: Linear) -> tuple[Tensor, Tensor]:
    """A, (r, in), and B, (out, r), of a layer's only adapter."""
    name = layer.active_adapters[0]
    return cast(Tensor, layer.lora_A[name].weight), cast(Tensor, layer.lora_B[name].weight)


def _scale(layer: Linear) -> float:
    return layer.scaling[layer.active_adapters[0]]


@contextmanager
def fused_lora(model: nn.Module, packed: PackedWeights | None = None) -> Iterator[int]:
    """Run the model's plain LoRA layers as one operation each; others stay as they are.

    Frozen weights, the LM head's too, are packed for the products of few rows that soft tokens are made of. A fused
    layer has a method more, ``forward_together``: `GroupedSteps` asks it for the products of all layers that multiply
    the same soft tokens.

    Args:
        model: Whose layers.
        packed: Copies to go on with, where the context is entered more than once.

    Yields:
        How many LoRA layers are fused.
    """
    packed = PackedWeights() if packed is None else packed
    layers = [layer for layer in model.modules() if isinstance(layer, Linear) and _is_plain(layer)]
    current = _Pass([layer for layer in layers if _adapter(layer)[0].dtype != layer.get_base_layer().weight.dtype])
    heads = [layer for name, layer in model.named_modules() if _is_frozen_head(layer, name)]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward, packed, current)  # type: ignore[method-assign]
        layer.forward_together = partial(_forward_together, packed, current)  # type: ignore[assignment]
    for head in heads:
        head.forward = partial(_frozen_forward, head, packed)  # type: ignore[method-assign]
    hooks = [model.register_forward_pre_hook(current.begin), model.register_forward_hook(current.end, always_call=True)]
    try:
        yield len(layers)
    finally:
        for hook in hooks:
            hook.remove()
        for layer in [*layers, *heads]:
            del layer.forward  # the class's own again
        for layer in layers:
            del layer.forward_together


def _is_plain(layer: Linear) -> bool:
    """One adapter without dropout, bias or variants such as DoRA, over a frozen linear layer."""
    names = layer.active_adapters
    base = layer.get_base_layer()
    if len(names) != 1 or type(base) is not nn.Linear or base.weight.requires_grad:
        return False
    name = names[0]
    return (
        name in layer.lora_A
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_A[name].weight.dtype in (base.weight.dtype, torch.float32)
        and getattr(layer.lora_B[name], "bias", None) is None
    )


def _is_frozen_head(layer: nn.Module, name: str) -> TypeGuard[nn.Linear]:
    """A linear layer of its own, not under an adapter."""
    plain = type(layer) is nn.Linear and layer.bias is None and not layer.weight.requires_grad
    return plain and not name.endswith(".base_layer")


def _frozen_forward(layer: nn.Linear, packed: PackedWeights, x: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type) or x.dtype != layer.weight.dtype:
        return F.linear(x, layer.weight)
    return _FrozenProduct.apply(x, layer.weight, packed)  # type: ignore[return-value]


def _forward(
    layer: Linear,
    original: Callable[..., Tensor],
    packed: PackedWeights,
    current: _Pass,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    if not _is_usual(layer, x):
        return original(x, *args, **kwargs)
    base = layer.get_base_layer()
    pair = current.adapter(layer, x.dtype)
    return _LoraProduct.apply(x, base.weight, base.bias, *_adapter(layer), pair, _scale(layer), packed)  # type: ignore[return-value]


def _is_usual(layer: Linear, x: Tensor) -> bool:
    """Whether a layer is to add its adapter's update, in the dtype of its weights."""
    return not (
        layer.merged
        or layer.disable_adapters
        or torch.is_autocast_enabled(x.device.type)
        or x.dtype != layer.get_base_layer().weight.dtype
    )


def _forward_together(
    packed: PackedWeights, current: _Pass, x: Tensor, layers: Sequence[nn.Module]
) -> Sequence[Tensor]:
    fused = [cast(Linear, layer) for layer in layers if "forward_together" in vars(layer) and _is_usual(layer, x)]  # type: ignore[arg-type]
    if len(fused) == len(layers) and len(x) <= MOST_ROWS and (steps := current.together(fused, packed, x.dtype)):
        return steps.products(x)
    return [layer(x) for layer in layers]
