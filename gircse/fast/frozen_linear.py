"""Linear layers for inference alone: the weights are kept once, in the form that products read them in.

Knows linear layers and peft's; knows nothing of soft tokens, texts or checkpoints. There is no way back from here to
weights that can be trained or saved: whoever wants those loads the model again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from gircse.errors import UsageError


class FrozenLinear(nn.Module):
    """y = x·Wᵀ + b on a CPU, with W in a form that has no storage of its own: oneDNN's.

    A subclass keeps the matrix in `_keep` and gives it back in `matrix`.

    Args:
        weight: W, (out, in).
        bias: b, (out,), or None.

    Attributes:
        kind: What these weights are called in errors.
        dtype: Of inputs; None where any will do.
        opaque: Attributes that can be neither copied nor sent to other processes, and are made again by `_keep`.
    """

    kind: ClassVar[str]
    dtype: torch.dtype | None = None
    opaque: ClassVar[tuple[str, ...]] = ("_packed",)
    bias: Tensor | None
    _packed: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def matrix(self) -> Tensor:
        """What was kept, (out, in), as an ordinary tensor."""
        raise NotImplementedError

    def _keep(self, matrix: Tensor) -> None:
        raise NotImplementedError

    def _check(self, x: Tensor) -> None:
        """Raise what `forward` cannot do.

        Raises:
            UsageError: x is not on the CPU, a gradient is wanted, or the model's dtype has changed since.
        """
        if x.device.type != "cpu":
            raise UsageError(f"{self.kind} compute on the CPU; choose device cpu, or load the model again")
        if self.dtype is not None and x.dtype != self.dtype:
            wanted, given = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, x.dtype))
            raise UsageError(f"{self.kind} stay {wanted} and were given {given}; load the model again in that dtype")
        if x.requires_grad and torch.is_grad_enabled():
            raise UsageError(f"{self.kind} have no gradients; load the model again to train it")

    def extra_repr(self) -> str:
        """As `nn.Linear` shows itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in self.opaque}
        matrix = self.matrix()
        # By value: PyTorch hands tensors to other processes by file descriptors, which end with a tensor of the moment.
        # As bytes: NumPy knows no bfloat16.
        return {**state, "_matrix": (matrix.view(torch.uint8).numpy(), matrix.dtype)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "_matrix"})
        values, dtype = state["_matrix"]
        self._keep(torch.from_numpy(values).view(dtype))

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenLinear:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.matrix()


@torch.no_grad()
def freeze_linear_layers(module: nn.Module, make: Callable[[Tensor, Tensor | None], nn.Module]) -> int:
    """Put a frozen layer in the place of every linear layer, LoRA layers with their adapter folded in.

    Layer by layer, so that there are never two copies of all weights. What is no linear layer (embedding tables, norms,
    the convolutions that GPT-2 multiplies by) stays as it is.

    Args:
        module: Changed in place; its own weights are gone afterwards.
        make: Weight, (out, in), and bias, (out,) or None, to a layer. The weight is in float32 where an adapter was
            folded into it.

    Returns:
        How many layers were replaced.
    """
    tables = {child.weight.data_ptr() for child in module.modules() if isinstance(child, nn.Embedding)}
    return _freeze(module, make, tables)


def _freeze(module: nn.Module, make: Callable[[Tensor, Tensor | None], nn.Module], tables: set[int]) -> int:
    count = 0
    for name, child in module.named_children():
        linear = folded(child, tables)
        if type(linear) is nn.Linear:
            setattr(module, name, make(linear.weight, linear.bias))
            count += 1
        else:
            count += _freeze(child, make, tables)
    return count


def folded(module: nn.Module, tables: Collection[int] = ()) -> nn.Module:
    """The layer under a LoRA layer, with BA added in float32; any other module as it is.

    Args:
        module: Changed in place.
        tables: Addresses of weights that others read; those of other processes and these stay as they are.
    """
    if not isinstance(module, LoraLayer):
        return module
    layer = module.get_base_layer()
    if not module.merged:
        for name, parameter in layer.named_parameters(recurse=False):
            shared = parameter.data_ptr() in tables or parameter.is_shared()  # with other processes
            # In float32: rounded once, after the sum.
            setattr(layer, name, nn.Parameter(parameter.to(torch.float32, copy=shared), requires_grad=False))
        module.merge()
    return layer
