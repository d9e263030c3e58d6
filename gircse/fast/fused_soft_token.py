"""Soft tokens without a matrix of logits, on a GPU, where it measures faster than the plain products.

Knows the weights of both ends of a vocabulary and a stopwatch; the arithmetic is in `soft_token_kernels.py`.
Only tests run it on a CPU, in Triton's interpreter.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

MOST_WIDTH = 1024
"""Of hidden states: a tile of wider ones does not fit a multiprocessor, and there plain products wait for the weights
rather than for the logits."""

ROWS, TOKENS = 16, 32
"""Tiles of the kernels: larger ones spill registers when compiled for sm_90 (docs/experiments.md)."""

_GAIN = 0.95
"""Share of the plain products' time below which the kernels are taken."""

_ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""How far rounding alone may take the two apart, as a share of the largest value; further, and the kernels are not
used. They serve these dtypes only: tiles of float32 do not fit."""

_faster: dict[tuple[object, ...], bool] = {}


def fused_soft_token(hidden: Tensor, head: Tensor, table: Tensor, scale: float) -> Tensor:
    """softmax(scale · h·Wᵀ) · E (GIRCSE, section 3.1), with gradients for the hidden states alone.

    Args:
        hidden: h, (B, d), d at most `MOST_WIDTH`.
        head: W, (V, d), of the same dtype; contiguous and frozen, as is
        table: E, (V, d); it may be the same tensor.
        scale: Factor on the logits, 1/T included.

    Returns:
        (B, d), in the dtype of the table.
    """
    return _FusedSoftToken.apply(hidden, head, table, scale)  # type: ignore[return-value]


class _FusedSoftToken(torch.autograd.Function):
    """Keeps B numbers for the backward pass instead of B × V."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, table: Tensor, scale: float) -> Tensor:
        from gircse.fast.soft_token_kernels import soft_token_forward

        hidden = hidden.contiguous()
        rows, width = hidden.shape
        parts, options = _grid(hidden, head, table)
        mixed = hidden.new_empty(parts, rows, width, dtype=torch.float32)
        largest, total = (hidden.new_empty(parts, rows, dtype=torch.float32) for _ in range(2))
        with torch.cuda.device_of(hidden):  # Triton launches where the current device is
            soft_token_forward[(math.ceil(rows / ROWS), parts)](
                hidden, head, table, mixed, largest, total, rows, len(head), width, scale, **options
            )
        log_parts = largest + total.log()  # (parts, B)
        log_total = log_parts.logsumexp(dim=0)
        out = (mixed * (largest - log_total).exp().unsqueeze(-1)).sum(dim=0)  # (B, d)
        ctx.save_for_backward(hidden, head, table, log_total, out)
        ctx.scale = scale
        return out.to(table.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        from gircse.fast.soft_token_kernels import soft_token_backward

        hidden, head, table, log_total, out = ctx.saved_tensors
        grad = gradients[0].contiguous()
        parts, options = _grid(hidden, head, table)
        found = hidden.new_empty(parts, *hidden.shape, dtype=torch.float32)
        mean = (grad.float() * out).sum(dim=1)
        rows, width = hidden.shape
        with torch.cuda.device_of(hidden):
            soft_token_backward[(math.ceil(rows / ROWS), parts)](
                hidden, head, table, grad, log_total, mean, found, rows, len(head), width, ctx.scale, **options
            )
        return found.sum(dim=0).to(hidden.dtype), None, None, None


def _grid(hidden: Tensor, head: Tensor, table: Tensor) -> tuple[int, dict[str, Any]]:
    """Into how many parts the vocabulary goes, so that every multiprocessor has work; and the kernels' settings."""
    blocks = math.ceil(len(hidden) / ROWS)
    processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else 3
    tiles = math.ceil(len(head) / TOKENS)
    tiles_a_part = math.ceil(tiles / max(1, processors // blocks))
    options = {
        "tokens_a_part": tiles_a_part * TOKENS,
        "ROWS": ROWS,
        "TOKENS": TOKENS,
        "WIDTH": max(16, 1 << (hidden.shape[1] - 1).bit_length()),
        "TIED": head.data_ptr() == table.data_ptr(),
        "PRECISION": "ieee" if hidden.dtype == torch.float32 else "tf32",
        "num_warps": 8,
        "num_stages": 1,
    }
    return math.ceil(tiles / tiles_a_part), options


def is_possible(head: nn.Module, table: Tensor, hidden: Tensor) -> TypeGuard[nn.Linear]:
    """Whether the kernels compute this soft token: on a GPU with Triton, narrow, a plain head, both weights frozen.

    ``GIRCSE_FUSED_SOFT_TOKEN=0`` in the environment says no to all.
    """
    if type(head) is not nn.Linear or head.bias is not None or not _has_kernels(hidden.device):
        return False
    weight = head.weight
    return (
        hidden.shape[-1] <= MOST_WIDTH
        and hidden.dtype in _ROUNDING
        and hidden.dtype == weight.dtype == table.dtype
        and weight.shape == table.shape
        and weight.is_contiguous()
        and table.is_contiguous()
        and not (torch.is_grad_enabled() and (weight.requires_grad or table.requires_grad))
        and not torch.is_autocast_enabled(hidden.device.type)
    )


def _has_kernels(device: torch.device) -> bool:
    wanted = device.type == "cuda" and os.environ.get("GIRCSE_FUSED_SOFT_TOKEN") != "0"
    return wanted and find_spec("triton") is not None


def faster(fused: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], hidden: Tensor, size: int) -> bool:
    """Whether the kernels win here, forward and backward where there are gradients; measured once for each size.

    They lose, too, where they cannot be compiled or where their results differ by more than rounding.

    Args:
        fused: Hidden states to soft tokens, by the kernels.
        plain: The same without them.
        hidden: (B, d); sizes count as the same up to the next power of two of B.
        size: V.
    """
    trained = torch.is_grad_enabled() and hidden.requires_grad
    rows = 1 << (len(hidden) - 1).bit_length()
    key = (hidden.device, hidden.dtype, rows, hidden.shape[1], size, trained)
    if key not in _faster:
        if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # no time to measure: a graph is being recorded
        try:
            _faster[key] = _measure(fused, plain, hidden.detach(), trained)
        except Exception as error:  # whatever a compiler or driver may raise: the plain products are always there
            logging.getLogger(__name__).warning("Triton cannot compute soft tokens here, plain products do (%s)", error)
            _faster[key] = False
    return _faster[key]


def _measure(
    fused: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], hidden: Tensor, trained: bool
) -> bool:
    grad = torch.randn_like(hidden)

    def run(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        if not trained:
            return [function(hidden)]
        with torch.enable_grad():
            leaf = hidden.clone().requires_grad_()
            out = function(leaf)
            return [out.detach(), *torch.autograd.grad(out, leaf, grad.to(out.dtype))]

    for one, other in zip(run(fused), run(plain), strict=True):  # the first run compiles
        bound = _ROUNDING[hidden.dtype] * float(other.float().abs().max())
        if not float((one.float() - other.float()).abs().max()) <= bound:
            raise RuntimeError("results differ by more than rounding")
    rounds = [[_seconds(partial(run, function), hidden.device) for function in (fused, plain)] for _ in range(5)]
    fastest, fastest_plain = (min(times) for times in zip(*rounds, strict=True))
    return fastest < _GAIN * fastest_plain


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
