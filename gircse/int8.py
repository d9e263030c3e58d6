"""Linear layers with weights of 8 bits, for inference on a CPU: a third of the memory, and products of whole numbers.

Knows linear layers and oneDNN's integer product; knows nothing of soft tokens, texts or checkpoints. Every row of a
weight matrix has a scale of its own. An input is not rounded to 8 bits: where two batches differ by a last bit,
rounding would make a whole step of it, and the same text would get two vectors. It goes through the product in two
parts of 8 bits, each row with a scale of its own, which together keep it to 16. docs/experiments.md has what both cost.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from gircse.errors import UsageError

_LARGEST = 127
"""Of the integers, in both directions."""

_ZERO = 127
"""The unsigned integer that stands for 0 in inputs: without AMX, oneDNN is slow where they are signed."""

_PARTS = 254
"""How many steps of an input's second part make one of its first."""

_ROWS_PACKED_FOR = 64
"""What oneDNN is told that products will have; the result is right for all others too."""


def check_int8() -> None:
    """Raise where this processor cannot multiply integers without loss.

    Raises:
        UsageError: It has no VNNI: sums of products would overflow 16 bits there. Or PyTorch was built without oneDNN.
    """
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
        raise UsageError("8-bit weights need a processor with AVX512-VNNI and PyTorch with oneDNN; leave quantize out")


class Int8Linear(nn.Module):
    """y = x·Wᵀ + b with W rounded to 8 bits, one scale a row, and x to 16.

    Args:
        weight: W, (out, in), of any floating dtype.
        bias: b, (out,), or None.
    """

    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        wide = weight.detach().float()
        scale = _scale(wide)  # (out, 1)
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._pack((wide / scale).round_().to(torch.int8))

    def _pack(self, integers: Tensor) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(integers, [_ROWS_PACKED_FOR, self.in_features])
        self._zeros = torch.zeros(self.out_features, dtype=torch.int32)

    def integers(self) -> Tensor:
        """W / scale, (out, in) int8, as it is kept for the product."""
        return self._packed.to_dense().t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """The product, (..., out), of the dtype of x.

        Raises:
            UsageError: x is not on the CPU, or a gradient is wanted.
        """
        if x.device.type != "cpu":
            raise UsageError("8-bit weights compute on the CPU; choose device cpu, or leave quantize out")
        if x.requires_grad and torch.is_grad_enabled():
            raise UsageError("8-bit weights have no gradients; load the model without quantize to train it")
        rows = x.reshape(-1, self.in_features).float()  # (N, in)
        scale = _scale(rows)  # (N, 1)
        out = torch.ops.onednn.qlinear_pointwise(
            _two_parts(rows, scale), 1.0, _ZERO, self._packed, self.scale, self._zeros, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # (2N, out)  # fmt: skip
        first, second = out.chunk(2)
        out = first.add_(second, alpha=1 / _PARTS).mul_(scale)
        if self.bias is not None:
            out.add_(self.bias)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As `nn.Linear` shows itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    # The packed matrix has no storage to be copied or sent; its integers do.

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_packed", "_zeros")}
        # By value: PyTorch hands tensors to other processes by file descriptors, which end with a tensor of the moment.
        return {**state, "_integers": self.integers().numpy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "_integers"})
        self._pack(torch.from_numpy(state["_integers"]))

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Linear:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.integers()


def _scale(rows: Tensor) -> Tensor:
    """What one integer stands for in each row, (N, 1)."""
    return rows.abs().amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny).div_(_LARGEST)


def _two_parts(rows: Tensor, scale: Tensor) -> Tensor:
    """Whole steps of the inputs above their rest in parts of a step, (2N, in) of unsigned integers."""
    parts = torch.empty(2 * len(rows), rows.shape[1], dtype=torch.uint8)
    first, second = parts.chunk(2)
    steps = (rows / scale).add_(_ZERO + 0.5)  # from 0.5 to 254.5; a copy to integers rounds down
    first.copy_(steps)
    second.copy_(steps.frac_().mul_(_PARTS).add_(0.5))
    return parts


@torch.no_grad()
def quantize_linear_layers(module: nn.Module) -> int:
    """Put an `Int8Linear` in the place of every linear layer, LoRA layers with their adapter folded in.

    Layer by layer, so that there are never two copies of all weights. What is no linear layer (embedding tables, norms,
    the convolutions that GPT-2 multiplies by) stays as it is.

    Args:
        module: Changed in place; its own weights are gone afterwards.

    Returns:
        How many layers were replaced.
    """
    count = 0
    for name, child in module.named_children():
        linear = _folded(child)
        if type(linear) is nn.Linear:
            setattr(module, name, Int8Linear(linear.weight, linear.bias))
            count += 1
        else:
            count += quantize_linear_layers(child)
    return count


def _folded(module: nn.Module) -> nn.Module:
    """The layer under a LoRA layer, with BA added."""
    if not isinstance(module, LoraLayer):
        return module
    layer = module.get_base_layer()
    if not module.merged:
        for parameter in layer.parameters():
            parameter.data = parameter.data.float()  # rounded once, after the sum
        module.merge()
    return layer
