"""A copy of a backbone for inference beside the weights that can be trained and saved: what `encode` computes with.

Knows modules, LoRA layers and packed ones; knows nothing of soft tokens, texts or checkpoints. Linear layers of the
copy are packed, with the adapter folded in; all else it shares with the backbone. So the compiled kernels serve a model
that has not been given up to them by `pack_weights`, and its own weights are never touched.
"""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from gircse.adapter import can_fold, lora_layers
from gircse.decoders import Decoder
from gircse.fast.frozen_linear import folded
from gircse.fast.module_walk import all_modules
from gircse.fast.packed_linear import packed_linear, packs_in_place
from gircse.fast.packed_weights import SHARE_OF_MEMORY, can_pack, places_of
from gircse.hardware import free_memory


class InferenceCopy:
    """The copy of one backbone, made when it is first asked for and again whenever the backbone has changed.

    A copy or pickle of this holds none.
    """

    def __init__(self) -> None:
        self._made: _Made | None = None
        self._has_room: bool | None = None
        self._lock = threading.Lock()  # several threads may encode

    def __reduce__(self) -> tuple[type[InferenceCopy], tuple[()]]:
        return InferenceCopy, ()

    def drop(self) -> None:
        """Give its memory back."""
        with self._lock:
            self._made = None

    def decoder(self, backbone: PreTrainedModel) -> Decoder | None:
        """The copy, taken apart; None where there is none to be had.

        That is on a GPU, on processors whose products are not fastest with packed weights, while anything is trained or
        hooked, and where it would take more than a quarter of the memory that was free at first.
        """
        with self._lock:
            parts = _Parts.of(backbone) if backbone.device.type == "cpu" else None
            if parts is None or parts.hooked:
                self._made = None
            elif self._made is None or not self._made.is_of(parts):
                self._made = None
                if _can_copy(backbone) and self._fits(backbone):
                    self._made = _Made(backbone, parts)
            return None if self._made is None else self._made.decoder

    def _fits(self, backbone: PreTrainedModel) -> bool:
        if self._has_room is None:  # decided once: vectors should not change by the hour
            table = _table(backbone)
            nbytes = sum(weight.nbytes for weight in _weights(backbone) if weight is not table)
            self._has_room = nbytes <= SHARE_OF_MEMORY * free_memory()
        return self._has_room


class _Made:
    """A copy, and what tells whether its backbone is still what it was.

    Args:
        backbone: One that `_can_copy`.
        parts: All of it.
    """

    @torch.inference_mode(mode=False)  # the copy serves passes without gradients outside of that mode as well
    @torch.no_grad()
    def __init__(self, backbone: PreTrainedModel, parts: _Parts) -> None:
        self._parts = parts
        self._layers = lora_layers(backbone)
        self._adapters = list(map(_adapters, self._layers))
        self._versions = list(map(_version, parts.parameters))
        self._places = list(map(places_of, parts.parameters))
        self._sample = torch.cat(self._places)
        make = partial(packed_linear, dtype=backbone.dtype, table=_table(backbone))
        self.decoder = Decoder.from_model(cast(PreTrainedModel, _copied(backbone, make)))

    def is_of(self, parts: _Parts) -> bool:
        """Whether the backbone has the same parts, with the same adapters and the same weights in the same memory.

        Of weights that count no changes, as those that are written through ``.data``, a few values are compared.
        """
        mine = self._parts
        return (
            parts.modules == mine.modules
            and list(map(id, parts.parameters)) == list(map(id, mine.parameters))
            and list(map(_adapters, self._layers)) == self._adapters
            and list(map(_version, parts.parameters)) == self._versions
            and torch.equal(self._sample, torch.cat(self._places))
        )


@dataclass(frozen=True)
class _Parts:
    """What a backbone is made of, one within the other.

    Attributes:
        modules: All of them.
        parameters: All of theirs.
        hooked: Whether someone wants to see one at work, or has replaced what it does: the copy would pass him by.
    """

    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    hooked: bool

    @classmethod
    def of(cls, backbone: nn.Module) -> _Parts:
        """All that is there now."""
        modules, parameters, hooked = all_modules(backbone), [], False
        for module in modules:
            own = vars(module)
            if own["_parameters"]:
                parameters += [part for part in own["_parameters"].values() if part is not None]
            if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                hooked = True
            if "forward" in own and (own["_modules"] or isinstance(module, nn.Linear)):
                hooked = True
        return cls(modules, parameters, hooked)


def _adapters(layer: LoraLayer) -> tuple[Any, ...]:
    return (*layer.active_adapters, *layer.merged_adapters, *layer.scaling.values(), layer.disable_adapters)


def _version(parameter: nn.Parameter) -> tuple[int, int]:
    return parameter._version, parameter.data_ptr()


def _table(backbone: PreTrainedModel) -> Tensor:
    return cast(Tensor, backbone.get_input_embeddings().weight)


def _outside(backbone: nn.Module) -> list[nn.Module]:
    """All modules but LoRA layers and what they are made of."""
    inside = {id(part) for layer in lora_layers(backbone) for part in cast(nn.Module, layer).modules()}
    return [part for part in backbone.modules() if id(part) not in inside]


def _weights(backbone: nn.Module) -> list[Tensor]:
    """Of the linear layers that the copy packs."""
    own = [part for part in _outside(backbone) if type(part) is nn.Linear]
    under = [layer.get_base_layer() for layer in lora_layers(backbone)]
    return [cast(Tensor, layer.weight) for layer in (*own, *under)]


def _can_copy(backbone: PreTrainedModel) -> bool:
    layers = lora_layers(backbone)
    return (
        packs_in_place(backbone.dtype)
        and all(map(_can_watch, backbone.parameters()))
        and all(type(layer.get_base_layer()) is nn.Linear for layer in layers)
        and can_fold(backbone, layers)
        and all(can_pack(weight) and weight.dtype == backbone.dtype for weight in _weights(backbone))
        # peft's other layers have states that nobody here knows.
        and not any(type(part).__module__.startswith("peft.") for part in _outside(backbone))
    )


def _can_watch(parameter: nn.Parameter) -> bool:
    """Whether it is an ordinary one that nobody trains and that counts its changes."""
    known = type(parameter) is nn.Parameter and parameter.dtype in (torch.float32, torch.bfloat16)
    return known and not parameter.requires_grad and not parameter.is_inference()


def _copied(module: nn.Module, make: Any) -> nn.Module:
    """The module itself where nothing in it is linear, otherwise a copy that shares all but linear layers with it."""
    if isinstance(module, LoraLayer):
        linear = folded(copy.deepcopy(module))
        return make(linear.weight, linear.bias)
    if type(module) is nn.Linear:
        return make(module.weight, module.bias)
    children = {name: None if child is None else _copied(child, make) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    made = module.__class__.__new__(module.__class__)
    made.__dict__ = {**vars(module), "_modules": children}
    return made
