"""The compiled part of a soft token on a CPU: attention, positions, norms, gates, products of few rows, and p·E.

Knows tensors and the libraries that are made of ``kernels/step_kernels.cpp``, for processors with AMX of
``kernels/matrix_kernels.cpp``, for others that multiply bfloat16 of ``kernels/bfloat16_kernels.cpp``, and for weights
of 8 bits of ``kernels/int8_kernels.cpp``, where there was a compiler when this package was installed; knows nothing of
layers, texts or files. Without a library, or for another dtype or size, PyTorch's operations do the same, slower.
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

MOST_NARROW_ROWS = 16
"""As `MOST_PRODUCT_ROWS`, with AVX2."""

MOST_VECTOR_ROWS = 2
"""Rows up to which vectors multiply weights of 8 bits faster than the tiles of AMX."""

MOST_SOFT_TOKENS = 16
"""Rows up to which a soft token is faster in one pass over the table than by two products and a softmax, where not
always."""

MOST_PAIR_ROWS = 256
"""As `MOST_PRODUCT_ROWS`, of bfloat16 with AVX512-BF16. Soft tokens are always faster there."""

MOST_MATRIX_ROWS = 192
"""As `MOST_PAIR_ROWS`, with AMX."""

INPUTS_AT_ONCE = {torch.bfloat16: 32, torch.int8: 64}
"""Of a product with AMX, or of bfloat16 with AVX512-BF16, by the dtype of its weights."""

VERSION = 5
"""Of the calls below; a library that was compiled of another source, as by an older checkout, is not used."""

_DTYPES = torch.float32, torch.bfloat16
_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS = {
    "attend": [_POINTER] * 9 + [_LONG] * 7 + [_FLOAT, _INT],
    "turn": [_POINTER] * 3 + [_LONG] * 3 + [_INT],
    "norm": [_POINTER] * 3 + [_FLOAT] + [_LONG] * 2 + [_POINTER, _INT],
    "gate": [_POINTER] * 2 + [_LONG, _POINTER, _INT],
    "multiply": [_POINTER] + [_LONG] * 2 + [_POINTER, _LONG, _INT],
    "multiply_int8": [_POINTER] + [_LONG] * 2 + [_POINTER, _LONG, _INT],
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
    return _load("_matrix_kernels", _DTYPES)


@cache
def bfloat16_library() -> ctypes.CDLL | None:
    """What was compiled for pairs of bfloat16, where this processor multiplies them; None as of `library`."""
    has = library() is not None and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return _load("_bfloat16_kernels", _DTYPES) if has and torch.cpu._is_avx512_bf16_supported() else None


@cache
def int8_library() -> ctypes.CDLL | None:
    """What was compiled for weights of 8 bits, where this processor multiplies such numbers; None as of `library`."""
    has = library() is not None and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return _load("_int8_kernels", _DTYPES) if has and torch.cpu._is_vnni_supported() else None


def _load(name: str, dtypes: Sequence[torch.dtype]) -> ctypes.CDLL | None:
    found = find_spec(f"gircse.fast.{name}")
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


def _fast_library(dtype: torch.dtype, inputs: int) -> ctypes.CDLL | None:
    """Whose products and soft tokens of so many inputs are faster than those of `library`; None where there is none."""
    serves = dtype == torch.bfloat16 and inputs % INPUTS_AT_ONCE[dtype] == 0
    return (matrix_library() or bfloat16_library()) if serves else None


@cache
def _product_function(name: str, dtype: torch.dtype, inputs: int) -> Callable[..., None]:
    return getattr(_fast_library(dtype, inputs) or library(), _entry(name, dtype))


def _has_int8_matrices(inputs: int) -> bool:
    return matrix_library() is not None and inputs % INPUTS_AT_ONCE[torch.int8] == 0


def _call(name: str, dtype: torch.dtype, *arguments: float | None) -> None:
    _function(name, dtype)(*arguments, torch.get_num_threads())


def _check(first: Tensor, *others: Tensor) -> None:
    """The kernels read memory, whatever it is."""
    if not all(x.is_contiguous() and x.dtype == first.dtype for x in (first, *others)):
        raise ValueError("kernels take contiguous tensors of one dtype")


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
    if length >= capacity:
        raise ValueError("more positions than the cache was made for")
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
        dtype: Of the weight: one that there are kernels for, or int8.
        rows: What oneDNN is told that products will have.
    """
    of_int8 = dtype == torch.int8
    together = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}[dtype]  # inputs that lie side by side
    served = serves(torch.float32, in_features) and int8_library() if of_int8 else serves(dtype, in_features)
    if not served or not hasattr(torch.ops.mkldnn, "data_ptr"):
        return None
    if of_int8:
        matrix = torch.randint(-127, 128, (out_features, in_features), dtype=dtype)
        packed = torch.ops.onednn.qlinear_prepack(matrix, [rows, in_features])
    else:
        matrix = torch.randn(out_features, in_features).to(dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix, rows)
    # Sums of the rows may lie behind whole numbers: for inputs whose zero is another one.
    if torch.ops.mkldnn._nbytes(packed) not in (matrix.nbytes, matrix.nbytes + of_int8 * 4 * out_features):
        return None
    content = (ctypes.c_char * matrix.nbytes).from_address(torch.ops.mkldnn.data_ptr(packed))
    found = torch.frombuffer(content, dtype=dtype)
    for panel in PANELS:
        if out_features % panel == 0 and in_features % together == 0:
            expected = matrix.view(-1, panel, in_features // together, together).transpose(1, 2)
            if torch.equal(found, expected.flatten()):
                return panel
    return None


def widened_panel_width(out_features: int, in_features: int) -> int | None:
    """How many outputs of weights of 8 bits lie together, (out / width, in, width), for `multiply` to make float32 of.

    None where there are no kernels for the size. Two vectors: with six rows, their sums fit into sixteen registers.
    """
    width = 2 * _lanes()
    return width if serves(torch.float32, in_features) and out_features % width == 0 else None


@cache
def most_product_rows(dtype: torch.dtype, inputs: int) -> int:
    """Rows of so many inputs up to which `multiply` is faster than oneDNN, with weights of the same dtype."""
    fast = _fast_library(dtype, inputs)
    if fast is None:
        return MOST_PRODUCT_ROWS[dtype] if _lanes() == 16 else MOST_NARROW_ROWS
    return MOST_MATRIX_ROWS if fast is matrix_library() else MOST_PAIR_ROWS


@dataclass(frozen=True)
class PackedMatrix:
    """Where a weight lies as oneDNN packs it.

    Attributes:
        address: Of its first number.
        panel: Its `panel_width`.
        outputs: How many it has.
        scales: Where what 1 stands for in each output lies, (out,) float32, if the weight is of 8 bits.
        sums: Where the sums of all weights of each output lie then, (out,) int32; None for weights that become float32
            in the product, which are packed as `widened_panel_width` says and not as oneDNN does.
    """

    address: int
    panel: int
    outputs: int
    scales: int | None = None
    sums: int | None = None


def multiply(x: Tensor, weights: Sequence[PackedMatrix], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """x·Wᵀ + b of several weights.

    Args:
        x: (B, in), contiguous.
        weights: W, each (out, in): all of the dtype of x, or all of 8 bits.
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
        fields += weight.address, weight.scales or 0, weight.sums or 0
        fields += offset, out.data_ptr(), weight.panel, weight.outputs
    products = (_LONG * len(fields))(*fields)
    function = _multiply_function(x.dtype, x.shape[1], rows, weights)
    function(x.data_ptr(), *x.shape, ctypes.addressof(products), len(outs), torch.get_num_threads())
    return outs


def _multiply_function(
    dtype: torch.dtype, inputs: int, rows: int, weights: Sequence[PackedMatrix]
) -> Callable[..., None]:
    if all(weight.scales is None for weight in weights):
        return _product_function("multiply", dtype, inputs)
    if any(weight.sums is None for weight in weights):
        return _function("multiply", dtype)
    by_matrices = rows > MOST_VECTOR_ROWS and _has_int8_matrices(inputs)
    return getattr(matrix_library() if by_matrices else int8_library(), _entry("multiply_int8", dtype))


def multiply_address(dtype: torch.dtype, inputs: int, rows: int, weights: Sequence[PackedMatrix]) -> int | None:
    """Of the compiled function behind `multiply`.

    Args:
        dtype: Of what is multiplied.
        inputs: Of the weights.
        rows: At most.
        weights: All that it will be called with, as of `multiply`.
    """
    function: Any = _multiply_function(dtype, inputs, rows, weights)
    return ctypes.cast(function, _POINTER).value


def step(dtype: torch.dtype, address: int) -> None:
    """A soft token through all layers, as `gircse.fast.whole_steps` describes it.

    Args:
        dtype: Of all weights and states.
        address: Of a `Step` as in kernels/whole_step.h.
    """
    _call("step", dtype, address)


@cache
def most_soft_tokens(dtype: torch.dtype, width: int) -> float:
    """Rows up to which `soft_tokens` is faster than two products and a softmax.

    With AVX512 any number; with AVX2, any of bfloat16, which such processors do not multiply.
    """
    if dtype == torch.float32:
        always = _lanes() == 16
    else:
        always = _fast_library(dtype, width) is not None or not torch.cpu._is_avx512_bf16_supported()
    return math.inf if always else MOST_SOFT_TOKENS


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
    dtype, width = hidden.dtype, hidden.shape[1]
    function = _product_function("soft_tokens", dtype, width)
    pointers = table.data_ptr(), len(table), scale, out.data_ptr()
    function(hidden.data_ptr(), *hidden.shape, *pointers, torch.get_num_threads())
    return out
