"""Linear layers whose weights are kept packed and in no other form: `gircse.packed_weights` without its second copy.

Knows linear layers and oneDNN; knows nothing of soft tokens, texts or checkpoints. oneDNN's packed weights serve any
number of rows and can be unpacked without loss, so nothing needs the ordinary ones but training and saving.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gircse.frozen_linear import FrozenLinear
from gircse.packed_weights import ROWS_PACKED_FOR


def packs_in_place(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed products of a dtype are as fast as any on this machine, with few rows and with many."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())


class PackedLinear(FrozenLinear):
    """y = x·Wᵀ + b with W as oneDNN reads it.

    Args:
        weight: W, (out, in).
        bias: b, (out,), or None.
        dtype: What W and b are kept in, and x has to be.
    """

    kind = "packed weights"

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype) -> None:
        super().__init__(weight, None if bias is None else bias.to(dtype))
        self.dtype = dtype
        self._keep(weight.detach().to(dtype))

    def _keep(self, matrix: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(matrix, ROWS_PACKED_FOR)

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
        out = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")  # (N, out)
        return out.view(*x.shape[:-1], self.out_features)
