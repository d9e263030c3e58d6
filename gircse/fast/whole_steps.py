"""A soft token through all layers in one call of the compiled kernels, where all weights are packed.

Knows layers of Llama and families like it, and `step_kernels`; knows nothing of texts, pooling or losses. For
inference alone. A step of one row is 270 calls otherwise, and a fifth of its time is what lies between them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gircse.decoders import Decoder
from gircse.fast import step_kernels
from gircse.fast.norms import is_fused
from gircse.fast.packed_linear import KernelLinear

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
LINEAR = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
"""The linear layers of a layer, in the order of `_Layer`."""


class Rows(Protocol):
    """Rows whose prompts are of similar length, and what they attend to.

    Attributes:
        rows: How many.
        starts: (rows,) int64: the first position of each that is no padding.
        length: Positions that are in the cache.
        cache: Of every layer, keys and values, (rows, key-value heads, capacity, d_head) each.
        prefix: Of every layer, keys and values before those of every row, (key-value heads, P, d_head) each; or empty.
    """

    rows: int
    starts: Tensor
    length: int
    cache: Sequence[tuple[Tensor, Tensor]]
    prefix: Sequence[tuple[Tensor, Tensor]]


# As in kernels/products.h and kernels/whole_step.h.


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _POINTER), ("epsilon", _FLOAT)]


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("packed", "scales", "sums", "bias", "out")),
        *((name, _LONG) for name in ("panel", "outputs")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [("norms", _Norm * 4), ("products", _Product * 7), ("scaling", _FLOAT)]


class _Group(ctypes.Structure):
    _fields_ = [("starts", _POINTER), ("rows", _LONG), ("capacity", _LONG), ("length", _LONG), ("prefix", _LONG)]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("layers", "groups", "caches")),
        ("last", _Norm),
        ("room", _POINTER * 9),
        *((name, _POINTER) for name in ("cosines", "sines", "out")),
        *((name, _LONG) for name in ("count", "group_count", "rows", "size", "inner", "heads", "shared", "width")),
        ("multiply", _POINTER),
    ]


# Parts of modules come from their dictionaries: `nn.Module.__getattr__` was half of what it costs to describe thirty
# layers for every batch.


def _norm(module: Any) -> _Norm:
    return _Norm() if module is None else _Norm(module._parameters["weight"].data_ptr(), module.variance_epsilon)


def _product(layer: KernelLinear) -> _Product:
    place, bias = layer.place, layer._buffers["bias"]
    assert place is not None
    offset = None if bias is None else bias.data_ptr()
    return _Product(place.address, place.scales, place.sums, offset, None, place.panel, place.outputs)


def _layer(layer: nn.Module) -> _Layer:
    attention, norms = layer._modules["self_attn"], _norms(layer)
    assert attention is not None
    made = _Layer(scaling=attention.scaling)
    made.norms = (_Norm * 4)(*map(_norm, norms))
    made.products = (_Product * 7)(*map(_product, _linear(layer)))
    return made


def _norms(layer: Any) -> tuple[Any, ...]:
    """In the order of the kernels; queries and keys have none in most families."""
    own, attention = layer._modules, layer._modules["self_attn"]._modules
    return own["input_layernorm"], attention.get("q_norm"), attention.get("k_norm"), own["post_attention_layernorm"]


def _linear(layer: Any) -> list[Any]:
    return [layer._modules[part]._modules[name] for part, names in LINEAR.items() for name in names]


def takes_whole_steps(decoder: Decoder, rows: int) -> bool:
    """Whether steps of so many rows are computed by `WholeStep`.

    Args:
        decoder: One that `gircse.fast.kernel_steps.takes_kernels`.
        rows: All that there will ever be.
    """
    transformer: Any = decoder.transformer
    dtype = decoder.vocabulary.embedding.weight.dtype
    linear = [module for layer in transformer.layers for module in _linear(layer)]
    norms = [norm for layer in transformer.layers for norm in _norms(layer)[1:3] if norm is not None]
    are_read = all(isinstance(module, KernelLinear) and module.joins(dtype) for module in linear)
    if not are_read or len(set(map(type, linear))) > 1:
        return False
    weights = [module.place for module in linear]
    sizes = {module.in_features for module in linear}
    return (
        all(is_fused(norm) and norm.weight.dtype == dtype for norm in norms)
        and len({step_kernels.multiply_address(dtype, size, rows, weights) for size in sizes}) == 1
        and rows <= min(module.most_rows(dtype) for module in linear)
    )


class WholeStep:
    """The steps of a batch, one after the other.

    Args:
        decoder: One that `takes_whole_steps`.
        groups: At least one. The rows of all of them, in this order, are the batch.
    """

    def __init__(self, decoder: Decoder, groups: Sequence[Rows]) -> None:
        transformer: Any = decoder.transformer
        self._layers = list(transformer.layers)
        self._groups = groups
        first, rows = self._layers[0], sum(group.rows for group in groups)
        attention, size, inner = first.self_attn, first.mlp.gate_proj.in_features, first.mlp.gate_proj.out_features
        query, key = attention.q_proj.out_features, attention.k_proj.out_features
        dtype = decoder.vocabulary.embedding.weight.dtype
        weights = [module.place for layer in self._layers for module in _linear(layer)]
        # states, normed, query, key, value, mixed, gate, up, added
        widths = size, size, query, key, key, query, inner, inner, size
        self._room = [torch.empty(rows, width, dtype=dtype) for width in widths]
        self._made = (_Layer * len(self._layers))(*map(_layer, self._layers))
        self._described = (_Group * len(groups))()
        pointers = [self._pointers(group, index) for index in range(len(self._layers)) for group in groups]
        self._caches = (_POINTER * (4 * len(pointers)))(*(pointer for four in pointers for pointer in four))
        self._step = _Step(
            *map(ctypes.addressof, (self._made, self._described, self._caches)),
            _norm(transformer.norm),
            (_POINTER * 9)(*(part.data_ptr() for part in self._room)),
            *(None, None, None),
            *(len(self._layers), len(groups), rows, size, inner),
            *(query // attention.head_dim, key // attention.head_dim, attention.head_dim),
            step_kernels.multiply_address(dtype, size, rows, weights),
        )

    @staticmethod
    def _pointers(group: Rows, index: int) -> list[int | None]:
        prefix = group.prefix[index] if group.prefix else ()
        found = [part.data_ptr() for part in (*group.cache[index], *prefix)]
        return [*found, None, None][:4]

    def next_states(self, tokens: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """One soft token of every row through all layers.

        Args:
            tokens: (B, d).
            turn: Cosines and sines of their positions, (B, ..., d_head) float32, contiguous.

        Returns:
            h_k, (B, d).
        """
        rows = tokens.shape[0]
        self._room[0][:rows] = tokens
        out = torch.empty_like(tokens)
        for made, group in zip(self._described, self._groups, strict=True):
            capacity = group.cache[0][0].shape[2]
            if group.length >= capacity:
                raise ValueError("more positions than the cache was made for")
            made.starts, made.rows, made.capacity = group.starts.data_ptr(), group.rows, capacity
            made.length, made.prefix = group.length, group.prefix[0][0].shape[1] if group.prefix else 0
            group.length += 1
        self._step.rows = rows
        self._step.cosines, self._step.sines = (part.data_ptr() for part in turn)
        self._step.out = out.data_ptr()
        step_kernels.step(tokens.dtype, ctypes.addressof(self._step))
        return out
