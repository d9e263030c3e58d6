"""LoRA layers as one operation for training: the same numbers with less traffic to memory.

Knows peft's linear LoRA layers; knows nothing of models or losses. peft computes x·Wᵀ, then scales and adds the
update in passes of their own over the large output, forward and backward. Here the thin products are accumulated into
the large one's result. And the gradients of A and B are computed once for all soft tokens of a batch: a step has few
rows, and each of its products costs what it takes to begin one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F

from gircse.packed_weights import PackedWeights
from gircse.trained_steps import Collected

MOST_COLLECTED_ROWS = 128
"""Of a step. More are worth products of their own, and collecting takes memory."""


class _LoraProduct(torch.autograd.Function):
    """y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ with a frozen W and b.

    With `collected` the gradients of A and B are left to a `_LateGradients`, which takes their place among the inputs.
    """

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
        collected: Collected | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        a_x, b_x = rounded  # A and B in the dtype of x
        low = rows @ a_x.T  # (N, r)
        out = packed.product(rows, weight, bias)  # (N, out)
        if out is None:
            out = F.linear(rows, weight, bias)
        out.addmm_(low, b_x.T, alpha=scale)
        ctx.save_for_backward(rows, weight, a_x, b_x, low)
        ctx.scale, ctx.shape, ctx.packed, ctx.dtype, ctx.collected = scale, x.shape, packed, a.dtype, collected
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a_x, b_x, low = ctx.saved_tensors
        grad = gradients[0].reshape(-1, weight.shape[0])  # (N, out)
        low_grad = (grad @ b_x).mul_(ctx.scale)  # (N, r)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _transposed_product(grad, weight, ctx.packed).addmm_(low_grad, a_x).view(ctx.shape)
        others = None, None, None, None
        if ctx.collected is not None:
            ctx.collected.add(low_grad, rows, grad, low)
            return grad_x, None, None, None, None, *others
        return grad_x, None, None, *_adapter_gradients(low_grad, rows, grad, low, ctx.scale, ctx.dtype), *others


def _adapter_gradients(
    low_grad: Tensor, rows: Tensor, grad: Tensor, low: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of A and B."""
    return (low_grad.T @ rows).to(dtype), (grad.T @ low).mul_(scale).to(dtype)


class _LateGradients(torch.autograd.Function):
    """Stands for A and B in all steps of a batch, and computes their gradients once the last step has left its rows."""

    @staticmethod
    def forward(ctx: Any, collected: Collected, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # the steps give none
        ctx.collected, ctx.scale, ctx.dtype = collected, scale, a.dtype
        return a.new_empty(0), b.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rows = [torch.cat(part) for part in zip(*ctx.collected.take(), strict=True)]
        return None, *_adapter_gradients(*rows, ctx.scale, ctx.dtype), None  # type: ignore[call-arg]


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
        return _transposed_product(grad, weight, ctx.packed).view(*gradients[0].shape[:-1], -1), None, None


def _transposed_product(grad: Tensor, weight: Tensor, packed: PackedWeights) -> Tensor:
    out = packed.product(grad, weight, transposed=True)
    return grad @ weight if out is None else out


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
        self._late: dict[Linear, tuple[Tensor, Tensor, Collected]] = {}
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
        self._late.clear()

    def late(self, layer: Linear, rows: Tensor) -> tuple[Tensor, Tensor, Collected] | None:
        """What takes the place of A and B in a step, and where it leaves its rows; None where nothing is collected.

        Args:
            layer: Of the backbone.
            rows: What it multiplies. Only soft tokens that are written by groups come without a dimension of positions.
        """
        soft_tokens = rows.dim() == 2 and rows.device.type == "cpu" and len(rows) <= MOST_COLLECTED_ROWS
        if not (self._running and soft_tokens and torch.is_grad_enabled()):
            return None
        if layer not in self._late:
            collected, scale = Collected(), layer.scaling[layer.active_adapters[0]]
            pair = cast(tuple[Tensor, Tensor], _LateGradients.apply(collected, *_adapter(layer), scale))
            self._late[layer] = (*pair, collected)
        return self._late[layer]

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


@contextmanager
def fused_lora(model: nn.Module, packed: PackedWeights | None = None) -> Iterator[int]:
    """Run the model's plain LoRA layers as one operation each; others stay as they are.

    Frozen weights, the LM head's too, are packed for the products of few rows that soft tokens are made of.

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
    base = layer.get_base_layer()
    if (
        layer.merged
        or layer.disable_adapters
        or torch.is_autocast_enabled(x.device.type)
        or x.dtype != base.weight.dtype
    ):
        return original(x, *args, **kwargs)
    rounded, scale = current.adapter(layer, x.dtype), layer.scaling[layer.active_adapters[0]]
    adapter = current.late(layer, x) or (*_adapter(layer), None)
    return _LoraProduct.apply(x, base.weight, base.bias, *adapter[:2], rounded, scale, packed, adapter[2])  # type: ignore[return-value]
