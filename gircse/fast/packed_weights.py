"""Weights packed for products with few rows, which is what soft tokens are made of on a CPU.

Knows weights, MKL and oneDNN; knows nothing of layers, soft tokens or texts. Every product with few rows reorders the
whole weight matrix before it multiplies, which costs as much as multiplying. The libraries can do it once and keep the
result, which takes as much memory as the weights again. PyTorch's own float32 products are MKL's, whose fastest paths
are for Intel's processors alone; on others oneDNN's are faster with any number of rows. docs/experiments.md has what it
buys.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gircse.hardware import free_memory, is_intel

SHARE_OF_MEMORY = 0.25
"""Of the memory that is free when packing begins, how much all copies together may take."""

ROWS_PACKED_FOR = 64
"""What the libraries are told that products will have; the result is right for all others too (tested)."""


@dataclass(frozen=True)
class PackingLibrary:
    """Whose packed products a dtype takes, and for how many rows they are faster (benchmarks/packed_products.py).

    Attributes:
        reorder: (out, in) weight and a number of rows -> packed copy.
        multiply: x (rows, in), the copy, a tensor of the weight's shape, bias or None -> (rows, out).
        fewest: Rows of x from which on it is faster.
        most: Rows of x up to which it is.
    """

    reorder: Callable[[Tensor, int], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    fewest: int
    most: int


def _by_mkl(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Of the weight itself the operation takes the sizes alone: its rows are those that it is told to expect.
    return torch.ops.mkl._mkl_linear(x, packed, weight, bias, len(x))


def _by_onednn(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@cache
def packing_library(dtype: torch.dtype) -> PackingLibrary | None:
    """What packs weights of a dtype on this machine; None where nothing does."""
    onednn, capability = torch.backends.mkldnn.is_available(), torch.backends.cpu.get_cpu_capability()
    if dtype == torch.bfloat16 and onednn and capability == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        # Beyond these rows PyTorch's own products, which are oneDNN's too, are as fast.
        return PackingLibrary(torch.ops.mkldnn._reorder_linear_weight, _by_onednn, 1, 256)
    if dtype == torch.float32 and onednn and capability in ("AVX512", "AVX2") and not is_intel():
        return PackingLibrary(torch.ops.mkldnn._reorder_linear_weight, _by_onednn, 1, sys.maxsize)
    if dtype == torch.float32 and torch.backends.mkl.is_available():
        return PackingLibrary(torch.ops.mkl._mkl_reorder_linear_weight, _by_mkl, 4, 256)
    return None


@dataclass(frozen=True)
class _Packed:
    """A packed copy, and what tells whether its weight is still what it was."""

    weight: weakref.ref[Tensor]
    version: int
    address: int
    places: Tensor  # a view of a few values of the weight; until it is dropped, no other weight comes to this address
    sample: Tensor  # the same values when it was packed
    packed: Tensor
    nbytes: int


class PackedWeights:
    """Packed copies of weights, made at their first product with few rows. A copy or pickle of this holds none.

    How much memory the copies may take is decided once, at the first product: what is packed does not change with what
    other programs do meanwhile.

    Attributes:
        enabled: False packs nothing: where memory is shorter than time. It begins as False where the environment
            variable ``GIRCSE_PACKED_WEIGHTS`` is 0.
    """

    def __init__(self) -> None:
        self.enabled = os.environ.get("GIRCSE_PACKED_WEIGHTS") != "0"
        self._packed: dict[tuple[int, bool], _Packed] = {}
        self._budget: float | None = None  # bytes
        self._lock = threading.Lock()  # over changes of the copies: several threads may encode

    def __len__(self) -> int:
        return len(self._packed)

    def __reduce__(self) -> tuple[Callable[[bool], PackedWeights], tuple[bool]]:
        return _restored, (self.enabled,)

    def refresh(self) -> None:
        """Drop the copies of weights that have changed, or all of them where packing has been switched off."""
        with self._lock:
            if not self.enabled:
                self._packed.clear()
            for key in [key for key, entry in self._packed.items() if not _is_in_place(entry)]:
                del self._packed[key]
            entries = list(self._packed.values())
            # One comparison for all: this runs before every encode, and one for each of 211 weights took 9 ms.
            if not entries or torch.equal(_join(e.places for e in entries), _join(e.sample for e in entries)):
                return
            for key in [key for key, entry in self._packed.items() if not torch.equal(entry.places, entry.sample)]:
                del self._packed[key]

    def drop(self) -> None:
        """Give the memory of all copies back."""
        with self._lock:
            self._packed.clear()

    def _has_room(self, weight: Tensor) -> bool:
        if self._budget is None:
            self._budget = SHARE_OF_MEMORY * free_memory()
        return weight.nbytes + sum(entry.nbytes for entry in self._packed.values()) <= self._budget

    def products(self, device: torch.device) -> AbstractContextManager[Any]:
        """A context in which linear layers over parameters on the CPU use packed copies.

        Gradients know nothing of them, nor does autocast: where either is on, layers compute as always.

        Args:
            device: Where the products are computed; on others than the CPU the context does nothing.
        """
        if device.type != "cpu":
            self.drop()
            return nullcontext()
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return nullcontext()
        self.refresh()
        return _Products(self)

    def product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False
    ) -> Tensor | None:
        """x·Wᵀ + b, or x·W, by the packed copy, which is made if need be.

        Args:
            x: (..., in), or (..., out) for the transposed product.
            weight: (out, in).
            bias: (out,).
            transposed: Whether the product is x·W, as for the gradient of a linear layer's input.

        Returns:
            None where there is no packed copy, or the rows are too few or too many for it.
        """
        rows, library = x.numel() // x.shape[-1], packing_library(weight.dtype)
        if library is None or x.dtype != weight.dtype or not library.fewest <= rows <= library.most:
            return None
        packed = self._copy(weight, transposed)
        if packed is None:
            return None
        out = library.multiply(x.reshape(rows, -1), packed, weight.t() if transposed else weight, bias)
        return out.view(*x.shape[:-1], -1)

    def _copy(self, weight: Tensor, transposed: bool) -> Tensor | None:
        key = (id(weight), transposed)
        if (found := self._found(key, weight)) is not None:
            return found
        with self._lock:
            if (found := self._found(key, weight)) is not None:  # another thread's
                return found
            library = packing_library(weight.dtype)
            if library is None or not self.enabled or not can_pack(weight) or not self._has_room(weight):
                return None
            with torch.inference_mode():
                rows = weight.detach().t().contiguous() if transposed else weight.detach()
                packed = library.reorder(rows, ROWS_PACKED_FOR)
            places = places_of(weight)
            self._packed[key] = _Packed(
                weakref.ref(weight), weight._version, weight.data_ptr(), places, places.clone(), packed, weight.nbytes
            )
            return packed

    def _found(self, key: tuple[int, bool], weight: Tensor) -> Tensor | None:
        entry = self._packed.get(key)
        # Another weight may have come to its place in memory.
        return entry.packed if entry is not None and entry.weight() is weight else None


def _restored(enabled: bool) -> PackedWeights:
    weights = PackedWeights()
    weights.enabled = enabled
    return weights


def can_pack(weight: Tensor) -> bool:
    """Whether a weight may have a packed copy, whose memory can be told to be still that of the weight."""
    return (
        packing_library(weight.dtype) is not None
        and type(weight) is nn.Parameter  # not computed anew at every call, nor quantised behind a float32 face
        and weight.device.type == "cpu"
        and weight.dim() == 2
        and weight.is_contiguous()
        and not weight.is_inference()  # such tensors count no changes
    )


def _is_in_place(entry: _Packed) -> bool:
    """Whether the weight is still there, in the same memory, and knows of no change."""
    weight = entry.weight()
    return (
        weight is not None
        and weight._version == entry.version
        and weight.data_ptr() == entry.address
        and can_pack(weight)
    )


def places_of(weight: Tensor) -> Tensor:
    """A view of a few values: peft merges through `.data`, which counts no change."""
    flat = weight.detach().view(-1)
    return flat[:: max(1, flat.numel() // 15)]


def _join(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(tensors))


class _Products(TorchFunctionMode):
    """Takes over `torch.nn.functional.linear`."""

    def __init__(self, weights: PackedWeights) -> None:
        super().__init__()
        self.weights = weights

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs:
            out = self.weights.product(*args)
            if out is not None:
                return out
        return func(*args, **(kwargs or {}))
