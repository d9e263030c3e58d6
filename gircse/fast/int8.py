"""Linear layers with weights of 8 bits, for inference on a CPU: less memory, and products of whole numbers.

Knows linear layers and integer products, oneDNN's and those of the compiled kernels; knows nothing of soft tokens,
texts or checkpoints. Every row of a weight matrix has a scale of its own. An input is not rounded to 8 bits: where two
batches differ by a last bit, rounding would make a whole step of it, and the same text would get two vectors. It goes
through the product in two parts of 8 bits, each row with a scale of its own, which together keep it to 16. The kernels
read the weights as oneDNN packs them and compute the same sums in a fraction of its time. Processors that do not
multiply such integers widen the weights to float32, and leave inputs as they are. What it costs: docs/experiments.md.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from gircse.fast import step_kernels
from gircse.fast.packed_linear import KernelLinear, TableLinear

_LARGEST = 127
"""Of the integers, in both directions."""

_ZERO = 127
"""The unsigned integer that stands for 0 in inputs: without AMX, oneDNN is slow where they are signed."""

_PARTS = 254
"""How many steps of an input's second part make one of its first."""

_ROWS_PACKED_FOR = 64
"""What oneDNN is told that products will have; the result is right for all others too."""


def multiplies_int8() -> bool:
    """Whether this processor multiplies such integers without loss: sums of products overflow 16 bits without VNNI."""
    has_vectors = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_vectors and torch.cpu._is_vnni_supported()


class Int8Linear(KernelLinear):
    """y = x·Wᵀ + b with W rounded to 8 bits, one scale a row, and x to 16, as products of integers.

    For processors of which `multiplies_int8` holds.

    Args:
        weight: W, (out, in), of any floating dtype.
        bias: b, (out,), or None.
    """

    kind = "8-bit weights"
    opaque = (*KernelLinear.opaque, "_zeros", "_read_by_kernels")
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        wide = weight.detach().float()
        scale = _scale(wide)  # (out, 1)
        self.scale = scale.flatten()  # no buffer: it stays float32
        self._keep((wide / scale).round_().to(torch.int8))

    def _keep(self, matrix: Tensor) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(matrix, [_ROWS_PACKED_FOR, self.in_features])
        self._zeros = torch.zeros(self.out_features, dtype=torch.int32)
        self.place = None
        panel = step_kernels.panel_width(*matrix.shape, torch.int8, _ROWS_PACKED_FOR)
        if panel is not None:
            # Tensors of their own: a scale that is sent to another process moves to shared memory in this one too.
            self._read_by_kernels = self.scale.clone(), matrix.sum(dim=1, dtype=torch.int32)
            places = [part.data_ptr() for part in self._read_by_kernels]
            address = torch.ops.mkldnn.data_ptr(self._packed)
            self.place = step_kernels.PackedMatrix(address, panel, self.out_features, *places)

    def takes(self, dtype: torch.dtype) -> bool:
        """As of any `KernelLinear`; inputs may be of either dtype that there are kernels for."""
        return super().takes(dtype) and step_kernels.serves(dtype, self.in_features)

    def most_rows(self, dtype: torch.dtype) -> int:
        """Any number: the kernels are always faster."""
        return sys.maxsize

    def matrix(self) -> Tensor:
        """W / scale, (out, in) int8."""
        return self._packed.to_dense().t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """The product, (..., out), of the dtype of x.

        Raises:
            UsageError: x is not on the CPU, or a gradient is wanted.
        """
        self._check(x)
        rows = x.reshape(-1, self.in_features)  # (N, in)
        if self.takes(x.dtype):
            out = self._by_kernels(rows, [self])[0]
        else:
            out = self._product(rows.float())
            if self.bias is not None:
                out.add_(self.bias)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _product(self, rows: Tensor) -> Tensor:
        """x·Wᵀ, (N, out), of x, (N, in), in float32, by PyTorch's operations."""
        scale = _scale(rows)  # (N, 1)
        out = torch.ops.onednn.qlinear_pointwise(
            _two_parts(rows, scale), 1.0, _ZERO, self._packed, self.scale, self._zeros, None, 1.0, 0,
            torch.float32, "none", [], "",
        )  # (2N, out)  # fmt: skip
        first, second = out.chunk(2)
        return first.add_(second, alpha=1 / _PARTS).mul_(scale)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}scale"] = self.scale


class WidenedInt8Linear(Int8Linear):
    """y = x·Wᵀ + b with W rounded to 8 bits, one scale a row, and multiplied in float32.

    For processors that do not multiply such integers: the kernels widen weights in the processor's registers, which
    takes no longer than to read them. Without kernels a copy of W in float32 is made for every product.
    """

    def _keep(self, matrix: Tensor) -> None:
        panel = step_kernels.widened_panel_width(*matrix.shape)
        self._packed = matrix.view(-1, panel or 1, self.in_features).transpose(1, 2).contiguous()  # (panels, in, panel)
        self.place = None
        if panel is not None:
            self._read_by_kernels = (self.scale.clone(),)
            addresses = self._packed.data_ptr(), panel, self.out_features, self._read_by_kernels[0].data_ptr()
            self.place = step_kernels.PackedMatrix(*addresses)

    def matrix(self) -> Tensor:
        """W / scale, (out, in) int8."""
        return self._packed.transpose(1, 2).reshape(self.out_features, self.in_features)

    def _product(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.linear(rows, self.matrix().float()).mul_(self.scale)


def int8_linear(weight: Tensor, bias: Tensor | None, *, table: Tensor) -> Int8Linear | TableLinear:
    """The layer of a weight that is rounded to 8 bits, unless it is tied to the embedding table and stays there.

    Args:
        weight: W, (out, in).
        bias: b, (out,), or None.
        table: The embedding table.
    """
    if weight is table:
        return TableLinear(weight, bias)
    return Int8Linear(weight, bias) if multiplies_int8() else WidenedInt8Linear(weight, bias)


def _scale(rows: Tensor) -> Tensor:
    """What one integer stands for in each row, (N, 1)."""
    return rows.abs().amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny).div_(_LARGEST)


def _two_parts(rows: Tensor, scale: Tensor) -> Tensor:
    """Whole steps of the inputs above their rest in parts of a step, (2N, in) of unsigned integers."""
    parts = torch.empty(2 * len(rows), rows.shape[1], dtype=torch.uint8)
    first, second = parts.chunk(2)
    steps = (rows * scale.reciprocal()).add_(_ZERO + 0.5)  # from 0.5 to 254.5; a copy to integers rounds down
    first.copy_(steps)
    second.copy_(steps.frac_().mul_(_PARTS).add_(0.5))
    return parts
