"""A look at all modules of a model that takes half a millisecond: what `encode` asks of it before every call.

Knows modules and sentence-transformers; knows nothing of soft tokens or texts. With an adapter a model of thirty layers
has 2,500 modules. To set the mode of every one, and to look at every parameter's device through `nn.Module.parameters`,
took 14 ms, in which nothing changed: a fifth of a short text's encoder-only vector (docs/experiments.md).
"""

from __future__ import annotations

from typing import Self

import torch
from sentence_transformers import SentenceTransformer
from torch import nn


def all_modules(root: nn.Module) -> list[nn.Module]:
    """The module and all within it; one that is there twice is listed twice.

    Read from the modules' own dictionaries: `nn.Module.modules` and attributes take four times as long.
    """
    found = [root]
    for module in found:  # which grows meanwhile
        if children := module.__dict__["_modules"]:
            found += [child for child in children.values() if child is not None]
    return found


def are_in_mode(root: nn.Module, *, training: bool) -> bool:
    """Whether all modules of a model are in training, or all in evaluation mode."""
    return all(module.__dict__["training"] is training for module in all_modules(root))


def is_wholly_on(root: nn.Module, device: torch.device) -> bool:
    """Whether all parameters and buffers of a model are on a device."""
    own = [module.__dict__ for module in all_modules(root)]
    kinds = [kind for names in own for kind in (names["_parameters"], names["_buffers"]) if kind]
    return all(tensor is None or tensor.device == device for kind in kinds for tensor in kind.values())


class SteadySentenceTransformer(SentenceTransformer):
    """A SentenceTransformer that finds out quickly that it is already as `encode` wants it."""

    def train(self, mode: bool = True) -> Self:
        """As for any module."""
        return self if are_in_mode(self, training=mode) else super().train(mode)

    def _resolve_inference_device(self, device: int | str | torch.device | None) -> torch.device:
        if not self._placement_is_delegated:
            # A tensor's device has an index where a GPU was named without one.
            wanted = self.device if device is None else torch.empty(0, device=device).device
            if is_wholly_on(self, wanted):
                return wanted
        return super()._resolve_inference_device(device)
