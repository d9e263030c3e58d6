"""Linear layers whose weights are kept once: packed, `packed_weights` without its second copy, or as a table.

Knows linear layers and oneDNN; knows nothing of soft tokens, texts or checkpoints. oneDNN's packed weights serve any
number of rows and can be unpacked without loss, so nothing needs the ordinary ones but training and saving.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from gircse.fast import step_kernels
from gircse.fast.frozen_linear import FrozenLinear
from gircse.fast.packed_weights import ROWS_PACKED_FOR

OUTPUTS_AT_A_TIME = 8192
"""Of a `TableLinear`: what is packed for the moment, 9 or 19 MB of SmolLM2's, costs less than a millisecond more."""

ROWS_AT_A_TIME = 256
"""Of a product by kernels: more are slower, as they leave the processor's cache."""

MOST_ROWS_ON_THE_RIGHT = 64
"""Up to which a `TableLinear` of bfloat16 lets the rows be packed instead; with more the transposing takes longer."""


def packs_in_place(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed products of a dtype are as fast as any on this machine, with few rows and with many."""
    if not torch.backends.mkldnn.is_available():
        return False
    capability = torch.backends.cpu.get_cpu_capability()
    if dtype == torch.float32:
        return capability in ("AVX512", "AVX2")
    return dtype == torch.bfloat16 and capability == "AVX512" and torch.cpu._is_avx512_bf16_supported()


class KernelLinear(FrozenLinear):
    """A frozen layer whose products of few rows the compiled kernels compute.

    Attributes:
        place: Where W lies, if that is as the kernels read it.
    """

    opaque = ("_packed", "place")
    place: step_kernels.PackedMatrix | None

    def most_rows(self, dtype: torch.dtype) -> int:
        """Rows of a dtype up to which the kernels are faster."""
        return step_kernels.most_product_rows(dtype, self.in_features)

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether there are kernels for this layer and rows of a dtype."""
        fits = (self.dtype or dtype) == dtype and (self.bias is None or self.bias.dtype == dtype)
        return self.place is not None and fits

    def joins(self, dtype: torch.dtype) -> bool:
        """Whether they may be used without calling this layer."""
        return self.takes(dtype) and not (self._forward_hooks or self._forward_pre_hooks)

    @staticmethod
    def products(x: Tensor, layers: Sequence[KernelLinear]) -> list[Tensor]:
        """Those of the same rows with several layers of one size of input: in one call where each would be a kernel's.

        Args:
            x: (B, in).
            layers: As many as are wanted.

        Returns:
            (B, out) of each.
        """
        few = x.dim() == 2 and all(layer.joins(x.dtype) and len(x) <= layer.most_rows(x.dtype) for layer in layers)
        together = few and len(set(map(type, layers))) == 1
        return KernelLinear._by_kernels(x, layers) if together else [layer(x) for layer in layers]

    @staticmethod
    def _by_kernels(rows: Tensor, layers: Sequence[KernelLinear]) -> list[Tensor]:
        layers[0]._check(rows)
        if len(rows) > ROWS_AT_A_TIME:
            parts = [KernelLinear._by_kernels(part, layers) for part in rows.split(ROWS_AT_A_TIME)]
            return [torch.cat(outs) for outs in zip(*parts, strict=True)]
        weights = [layer.place for layer in layers if layer.place is not None]
        return step_kernels.multiply(rows.contiguous(), weights, [layer.bias for layer in layers])


class PackedLinear(KernelLinear):
    """y = x·Wᵀ + b with W as oneDNN reads it.

    Args:
        weight: W, (out, in).
        bias: b, (out,), or None.
        dtype: What W and b are kept in, and x has to be.
    """

    kind = "packed weights"
    dtype: torch.dtype

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype) -> None:
        super().__init__(weight, None if bias is None else bias.to(dtype))
        self.dtype = dtype
        self._keep(weight.detach().to(dtype))

    def _keep(self, matrix: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(matrix, ROWS_PACKED_FOR)
        self.place = None
        panel = step_kernels.panel_width(*matrix.shape, self.dtype, ROWS_PACKED_FOR)
        if panel is not None:
            address = torch.ops.mkldnn.data_ptr(self._packed)
            self.place = step_kernels.PackedMatrix(address, panel, self.out_features)

    def matrix(self) -> Tensor:
        """W, (out, in)."""
        return self._packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """The product, (..., out).

        Raises:
            UsageError: x is not on the CPU or of another dtype, or a gradient is wanted.
        """
        self._check(x)
        rows = x.reshape(-1, self.in_features)  # (N, in)
        if self.place is not None and len(rows) <= self.most_rows(self.dtype):
            out = self._by_kernels(rows, [self])[0]
        else:
            out = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")  # (N, out)
        return out.view(*x.shape[:-1], self.out_features)


class TableLinear(nn.Linear):
    """y = x·Wᵀ + b with W as a module of embeddings keeps it, which looks its rows up and so cannot have it packed.

    oneDNN packs its right factor anew at every product, here a few thousand outputs at a time: 2 to 6 ms for 28 million
    weights, whose packed copy would take 57 MB in bfloat16 and 113 in float32. With few rows of bfloat16 those are the
    right factor, which is as fast as a packed copy (docs/experiments.md). The result is the same up to rounding.

    Args:
        weight: W, (out, in): the parameter of both.
        bias: b, (out,), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # without a weight of its own
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = cast(nn.Parameter, weight), cast("nn.Parameter | None", bias)

    def forward(self, input: Tensor) -> Tensor:
        """The product, (..., out)."""
        if torch.is_grad_enabled() or input.device.type != "cpu" or input.dtype != self.weight.dtype:
            return super().forward(input)
        rows = input.reshape(-1, self.in_features)  # (N, in)
        few = len(rows) <= MOST_ROWS_ON_THE_RIGHT and rows.dtype == torch.bfloat16 and self.bias is None
        out = rows.new_empty(len(rows), self.out_features)
        for start in range(0, self.out_features, OUTPUTS_AT_A_TIME):
            part = slice(start, start + OUTPUTS_AT_A_TIME)
            if few:
                out[:, part] = (self.weight[part] @ rows.T).T
                continue
            bias = None if self.bias is None else self.bias[part]
            out[:, part] = torch.ops.mkldnn._linear_pointwise(rows, self.weight[part], bias, "none", [], "")
        return out.view(*input.shape[:-1], self.out_features)


def packed_linear(
    weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype, table: Tensor
) -> PackedLinear | TableLinear:
    """The layer of a weight that is no longer trained.

    Args:
        weight: W, (out, in).
        bias: b, (out,), or None.
        dtype: What W and b are kept in.
        table: The embedding table. A weight that is tied to it stays where it is.
    """
    return TableLinear(weight, bias) if weight is table else PackedLinear(weight, bias, dtype=dtype)
