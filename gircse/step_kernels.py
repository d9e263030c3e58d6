"""The compiled part of a soft token on a CPU: attention, positions, norms, gates, products of few rows, and p·E.

Knows tensors and the libraries that are made of ``kernels/step_kernels.cpp`` and, for processors with AMX,
``kernels/matrix_kernels.cpp`` where there was a compiler when this package was installed; knows nothing of layers,
texts or files. Without a library, or for another dtype or size, PyTorch's operations do the same, slower.
docs/experiments.md has what it buys.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

MOST_WIDTH = 256
"""Of a head."""

PANELS = 64, 48, 32, 16
"""Outputs that oneDNN may pack together."""

MOST_PRODUCT_ROWS = {torch.bfloat16: 6, torch.float32: 64}
"""Rows up to which a product with packed weights is faster here than oneDNN's."""

MOST_SOFT_TOKENS = {torch.bfloat16: 4, torch.float32: 16}
"""Rows up to which a soft token is faster in one pass over the table than by two products and a softmax."""

MOST_MATRIX_ROWS = 192
"""As `MOST_PRODUCT_ROWS`, of bfloat16 with AMX. Soft tokens are always faster there."""

MATRIX_INPUTS = 32
"""Of a product with AMX, at once."""

VERSION = 3
"""Of the calls below; a library that was compiled of another source, as by an older checkout, is not used."""

_DTYPES = torch.float32, torch.bfloat16
_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS = {
    "attend": [_POINTER] * 9 + [_LONG] * 7 + [_FLOAT, _INT],
    "turn": [_POINTER] * 3 + [_LONG] * 3 + [_INT],
    "norm": [_POINTER] * 3 + [_FLOAT] + [_LONG] * 2 + [_POINTER, _INT],
    "gate": [_POINTER] * 2 + [_LONG, _POINTER, _INT],
    "multiply": [_POINTER] + [_LONG] * 2 + [_POINTER, _LONG, _INT],
    "step": [_POINTER, _INT],
    "soft_tokens": [_POINTER] + [_LONG] * 2 + [_POINTER, _LONG, _FLOAT, _POINTER, _INT],
}


@cache
def library() -> ctypes.CDLL | None:
    """What was compiled for this processor; None where nothing was, or ``GIRCSE_STEP_KERNELS`` is 0."""
    capability = torch.backends.cpu.get_cpu_capability()
    return _load(f"_step_kernels_{capability.lower()}", _DTYPES) if capability in ("AVX512", "AVX2") else None


@cache
def matrix_library() -> ctypes.CDLL | None:
    """What was compiled for AMX, where this processor has it and the system lets it be used; None as of `library`."""
    has = library() is not None and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (has and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()):
        return None
    return _load("_matrix_kernels", (torch.bfloat16,))


def _load(name: str, dtypes: Sequence[torch.dtype]) -> ctypes.CDLL | None:
    found = find_spec(f"gircse.{name}")
    if found is None or found.origin is None or os.environ.get("GIRCSE_STEP_KERNELS") == "0":
        return None
    try:
        loaded = ctypes.CDLL(found.origin)  # after torch, whose OpenMP and threads it shares
        if loaded.version() != VERSION:
            return None
    except (OSError, AttributeError):  # made for another system, or before there were versions
        return None
    for call, types in _ARGUMENTS.items():
        for dtype in dtypes:
            if (function := getattr(loaded, _entry(call, dtype), None)) is not None:
                function.argtypes, function.restype = types, None
    return loaded


def _entry(call: str, dtype: torch.dtype) -> str:
    return f"{call}_{str(dtype).removeprefix('torch.')}"


def _lanes() -> int:
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def serves(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether there are kernels for a dtype on this machine, and all sizes are multiples of what its vectors hold."""
    return library() is not None and dtype in _DTYPES and not any(n % _lanes() for n in sizes)


@cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    return getattr(library(), _entry(name, dtype))


@cache
def _matrix_function(name: str, dtype: torch.dtype, inputs: int) -> Callable[..., None] | None:
    """That of `matrix_library`, if it takes them; otherwise None."""
    serves = dtype == torch.bfloat16 and inputs % MATRIX_INPUTS == 0 and matrix_library() is not None
    return getattr(matrix_library(), _entry(name, dtype)) if serves else None


def _call(name: str, dtype: torch.dtype, *arguments: float | None) -> None:
    _function(name, dtype)(*arguments, torch.get_num_threads())


def _call_products(name: str, x: Tensor, *arguments: float | None) -> None:
    """`_call` with the rows that are multiplied, (B, in); by the tiles of AMX where there are any."""
    dtype, (rows, inputs) = x.dtype, x.shape
    function = _matrix_function(name, dtype, inputs) or _function(name, dtype)
    function(x.data_ptr(), rows, inputs, *arguments, torch.get_num_threads())


def _check(first: Tensor, *others: Tensor) -> None:
    """The kernels read memory, whatever it is."""
    dtype = first.dtype
    assert first.is_contiguous()
    for x in others:
        assert x.is_contiguous()
        assert x.dtype == dtype


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: tuple[Tensor, Tensor],
    starts: Tensor,
    length: int,
    scaling: float,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Write a position into a cache, and attend to all positions of it from one query a head.

    Args:
        query: (B, heads, d_head), contiguous, as are all.
        key: (B, key-value heads, d_head), of the new position.
        value: Likewise.
        cache: Keys and values, (B, key-value heads, capacity, d_head); the new ones are written.
        starts: (B,) int64: the first position of each row that is no padding.
        length: Positions that are there already.
        scaling: Of scores.
        prefix: Keys and values, (key-value heads, P, d_head), that stand before those of every row.

    Returns:
        (B, heads, d_head).
    """
    keys, values = cache
    batch, shared, capacity, width = keys.shape
    assert length < capacity, "more positions than the cache was made for"
    first, second = prefix or (keys[0, :, :0], values[0, :, :0])
    parts = (query, key, value, keys, values, starts, first, second)
    _check(query, key, value, keys, values)
    if prefix is not None:
        _check(query, first, second)
    out = torch.empty_like(query)
    pointers = [part.data_ptr() for part in (*parts, out)]
    sizes = batch, query.shape[1], shared, width, capacity, length, first.shape[1]
    _call("attend", query.dtype, *pointers, *sizes, scaling)
    return out


def turn(x: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Rotary positions, in place.

    Args:
        x: (B, heads, d_head), contiguous.
        cosines: (B, d_head) float32, contiguous.
        sines: Likewise.
    """
    _check(x)
    _check(cosines, sines)
    _call("turn", x.dtype, x.data_ptr(), cosines.data_ptr(), sines.data_ptr(), *x.shape)


def add_and_norm(x: Tensor, more: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """Add to x, in place, and give the RMS norm of the sum.

    Args:
        x: (B, d), contiguous.
        more: Likewise, or None for nothing.
        weight: (d,).
        epsilon: Added to the mean of x².

    Returns:
        (B, d).
    """
    _check(x, weight, *(() if more is None else (more,)))
    out = torch.empty_like(x)
    added = None if more is None else more.data_ptr()
    _call("norm", x.dtype, x.data_ptr(), added, weight.data_ptr(), epsilon, *x.shape, out.data_ptr())
    return out


def gate(x: Tensor, up: Tensor) -> Tensor:
    """silu(x) · up, of two contiguous tensors."""
    _check(x, up)
    out = torch.empty_like(x)
    _call("gate", x.dtype, x.data_ptr(), up.data_ptr(), x.numel(), out.data_ptr())
    return out


@cache
def panel_width(out_features: int, in_features: int, dtype: torch.dtype, rows: int) -> int | None:
    """How many outputs oneDNN packs together in a weight of this size; None where it is not as `multiply` reads it.

    It may pack as it likes, so this looks: a random matrix is packed and compared with what is expected.

    Args:
        out_features: Of the weight, (out, in).
        in_features: Likewise.
        dtype: Of the weight.
        rows: What oneDNN is told that products will have.
    """
    if not serves(dtype, in_features) or not hasattr(torch.ops.mkldnn, "data_ptr"):
        return None
    matrix = torch.randn(out_features, in_features).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix, rows)
    if torch.ops.mkldnn._nbytes(packed) != matrix.nbytes:
        return None
    content = (ctypes.c_char * matrix.nbytes).from_address(torch.ops.mkldnn.data_ptr(packed))
    found = torch.frombuffer(content, dtype=dtype)
    pair = 2 if dtype == torch.bfloat16 else 1
    for panel in PANELS:
        if out_features % panel == 0 and in_features % pair == 0:
            expected = matrix.view(-1, panel, in_features // pair, pair).transpose(1, 2)
            if torch.equal(found, expected.flatten()):
                return panel
    return None


@cache
def most_product_rows(dtype: torch.dtype, inputs: int) -> int:
    """Rows of so many inputs up to which `multiply` is faster than oneDNN."""
    return MOST_PRODUCT_ROWS[dtype] if _matrix_function("multiply", dtype, inputs) is None else MOST_MATRIX_ROWS


@dataclass(frozen=True)
class PackedMatrix:
    """Where a weight lies as oneDNN packs it.

    Attributes:
        address: Of its first number.
        panel: Its `panel_width`.
        outputs: How many it has.
    """

    address: int
    panel: int
    outputs: int


def multiply(x: Tensor, weights: Sequence[PackedMatrix], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """x·Wᵀ + b of several weights.

    Args:
        x: (B, in), contiguous.
        weights: W, each (out, in).
        biases: b, (out,), of each; None for nothing.

    Returns:
        (B, out) of each.
    """
    _check(x, *(bias for bias in biases if bias is not None))
    rows = x.shape[0]
    outs = [x.new_empty(rows, weight.outputs) for weight in weights]
    fields: list[int] = []  # of `Product` in kernels/products.h
    for weight, bias, out in zip(weights, biases, outs, strict=True):
        offset = 0 if bias is None else bias.data_ptr()
        fields += weight.address, offset, out.data_ptr(), weight.panel, weight.outputs
    products = (_LONG * len(fields))(*fields)
    _call_products("multiply", x, ctypes.addressof(products), len(outs))
    return outs


@cache
def multiply_address(dtype: torch.dtype, inputs: int) -> int | None:
    """Of the compiled function behind `multiply`, for weights of so many inputs."""
    function: Any = _matrix_function("multiply", dtype, inputs) or _function("multiply", dtype)
    return ctypes.cast(function, _POINTER).value


def step(dtype: torch.dtype, address: int) -> None:
    """A soft token through all layers, as `gircse.whole_steps` describes it.

    Args:
        dtype: Of all weights and states.
        address: Of a `Step` as in kernels/whole_step.h.
    """
    _call("step", dtype, address)


@cache
def most_soft_tokens(dtype: torch.dtype, width: int) -> float:
    """Rows up to which `soft_tokens` is faster than two products and a softmax."""
    return MOST_SOFT_TOKENS[dtype] if _matrix_function("soft_tokens", dtype, width) is None else math.inf


def soft_tokens(hidden: Tensor, table: Tensor, scale: float) -> Tensor:
    """softmax(scale · h·Eᵀ) · E (GIRCSE, section 3.1), reading the table once.

    Args:
        hidden: h, (B, d).
        table: E, (V, d), contiguous: the head as well.
        scale: Factor on the logits, 1/T included.

    Returns:
        (B, d).
    """
    hidden = hidden.contiguous()
    _check(hidden, table)
    out = torch.empty_like(hidden)
    _call_products("soft_tokens", hidden, table.data_ptr(), len(table), scale, out.data_ptr())
    return out
