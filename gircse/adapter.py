"""LoRA layers of a backbone at inference: folded into the weights under them, or switched off.

Knows peft's layers; knows nothing of refinement, texts or checkpoints. A LoRA layer costs two thin matrix products
beside every thick one, which on a CPU take as long as the thick one itself; folded into the weights it costs nothing.
"""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from gircse.errors import UsageError

_changing = threading.Lock()
"""Held while weights are changed: two threads that fold at a time would both add BA."""

_ORIGINAL = "_weight_before_folding"
"""The attribute of a folded layer that keeps the weight of 16 bits."""


def lora_layers(backbone: nn.Module) -> list[LoraLayer]:
    """The LoRA layers, in the order of the modules."""
    return [module for module in backbone.modules() if isinstance(module, LoraLayer)]


def is_of_adapter(name: str) -> bool:
    """Whether a backbone's parameter is its adapter's: of LoRA layers, or of modules that are saved whole."""
    return "lora_" in name or ".modules_to_save." in name


def let_train(backbone: nn.Module, *, adapter_only: bool) -> None:
    """Let the adapter be trained and nothing else, or all weights."""
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(not adapter_only or is_of_adapter(name))


def _weight(layer: LoraLayer) -> Tensor:
    """The weight under a LoRA layer, (out, in)."""
    return cast(Tensor, layer.get_base_layer().weight)


def can_fold(backbone: PreTrainedModel, layers: list[LoraLayer]) -> bool:
    """Whether folding keeps the vectors: frozen layers over weights of their own, in float32 or bfloat16.

    A layer that is being trained must stay apart, and what is folded into a tied LM head would also change the
    embedding table.
    """
    embedding = backbone.get_input_embeddings().weight
    weights = [_weight(layer) for layer in layers]
    trained = any(parameter.requires_grad for layer in layers for parameter in _parameters(layer))
    return (
        not trained
        and not any(layer.disable_adapters for layer in layers)
        and all(weight is not embedding and weight.dtype in (torch.float32, torch.bfloat16) for weight in weights)
    )


def bytes_to_fold(layers: list[LoraLayer]) -> int:
    """What folding would take: of weights in 16 bits the originals are kept, as they cannot be computed back."""
    weights = [_weight(layer) for layer in layers if not layer.merged]
    return sum(weight.nbytes for weight in weights if weight.dtype != torch.float32)


@torch.inference_mode(mode=False)  # weights made in inference mode could be neither packed nor trained later
@torch.no_grad()
def fold(layers: list[LoraLayer]) -> None:
    """W becomes W + BA of the active adapters; in float32 in place, without a copy of this process's own weights."""
    with _changing:
        for layer in layers:
            if layer.merged and layer.merged_adapters != list(layer.active_adapters):
                _unfold(layer)
            if not layer.merged:
                _fold(layer)


@torch.inference_mode(mode=False)
@torch.no_grad()
def unfold(layers: list[LoraLayer]) -> None:
    """Take BA out of the weights again, which restores those in float32 up to rounding (about 1e-7 of a weight)."""
    with _changing:
        for layer in layers:
            if layer.merged:
                _unfold(layer)


def _fold(layer: LoraLayer) -> None:
    weight = _weight(layer)
    if weight.dtype == torch.float32:
        _make_own(layer)
        layer.merge()
        return
    original = weight.data
    weight.data = original.float()  # rounded once, after the sum
    layer.merge()
    weight.data = weight.data.to(original.dtype)
    setattr(layer, _ORIGINAL, original)


def _unfold(layer: LoraLayer) -> None:
    _make_own(layer)
    layer.unmerge()
    original = vars(layer).pop(_ORIGINAL, None)
    if original is not None:
        weight = _weight(layer)
        weight.data = original.to(weight)  # the model may have moved meanwhile


def _make_own(layer: LoraLayer) -> None:
    """A copy of weights in shared memory, with which other processes compute."""
    weight = _weight(layer)
    if weight.device.type == "cpu" and weight.is_shared():
        weight.data = weight.data.clone()


def keep_state_dicts_unfolded(backbone: PreTrainedModel) -> None:
    """Let state dicts of a backbone hold the weights under its adapter as they are without it, and loading one unfold.

    Otherwise BA of folded layers would be in both, and be added once more to whatever model the state dict goes to.
    """
    backbone.register_state_dict_post_hook(_show_unfolded)
    backbone.register_load_state_dict_pre_hook(_unfold_before_loading)


@torch.no_grad()
def _show_unfolded(backbone: nn.Module, state_dict: dict[str, Tensor], prefix: str, metadata: object) -> None:
    with _changing:
        for name, layer in backbone.named_modules():
            if isinstance(layer, LoraLayer) and layer.merged:
                if (original := vars(layer).get(_ORIGINAL)) is not None:
                    state_dict[f"{prefix}{name}.base_layer.weight"] = original.to(_weight(layer))
                    continue
                apart = copy.deepcopy(layer)
                _unfold(apart)
                for key, parameter in apart.get_base_layer().named_parameters():
                    state_dict[f"{prefix}{name}.base_layer.{key}"] = parameter.detach()


def _unfold_before_loading(backbone: nn.Module, *args: object) -> None:
    unfold(lora_layers(backbone))


def check_lora(config: LoraConfig, over_trained_weights: bool) -> None:
    """Refuse an adapter that would not be the same once it is saved and loaded.

    Args:
        config: Of the adapter.
        over_trained_weights: Whether the weights under it are no longer the backbone's.

    Raises:
        UsageError: It says so in a line.
    """
    if over_trained_weights:
        raise UsageError(
            "these weights were fine-tuned whole, and an adapter is saved without the weights under it; "
            "train them further without LoRA"
        )
    for name, is_set in (("bias", config.bias != "none"), ("use_dora", config.use_dora)):
        if is_set:
            raise UsageError(f"LoRA's {name} is not supported: a saved model would load without it; leave it out")


def save_adapter(backbone: PreTrainedModel, folder: str | Path, base: str) -> None:
    """Write the adapter and its configuration.

    Args:
        backbone: With LoRA layers.
        folder: Made where it is missing.
        base: What the configuration calls the model under the adapter; where it lay is nobody else's business.
    """
    for config in backbone.peft_config.values():
        config.base_model_name_or_path = None  # of a named one peft asks the hub at every save
    # Without the weights under it, which would be unfolded for nothing.
    own = {name: weight for name, weight in backbone.named_parameters() if ".base_layer." not in name}
    backbone.save_pretrained(folder, state_dict=own)
    path = Path(folder) / "adapter_config.json"
    facts = {**json.loads(path.read_text(encoding="utf-8")), "base_model_name_or_path": base}
    path.write_text(json.dumps(facts, indent=2, sort_keys=True), encoding="utf-8")


def widen(backbone: PreTrainedModel, folder: str | Path | None = None) -> None:
    """The adapter's own parameters in float32, whatever the weights are: bfloat16 rounds a small training step away.

    Args:
        backbone: With LoRA layers.
        folder: Where the adapter was read from, to read again what the dtype of the weights has rounded.
    """
    for layer in lora_layers(backbone):
        for parameter in _parameters(layer):
            parameter.data = parameter.data.float()
    if folder is not None:
        set_peft_model_state_dict(backbone, load_peft_weights(os.fspath(folder), device="cpu"))


@torch.inference_mode(mode=False)
@torch.no_grad()
def narrow(layers: list[LoraLayer]) -> None:
    """The dtype of the weights under them for layers that are neither trained nor folded: one dtype computes faster."""
    for layer in layers:
        dtype = _weight(layer).dtype
        for parameter in _parameters(layer):
            if parameter.dtype != dtype and not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)


@contextmanager
def adapter_off(backbone: PreTrainedModel) -> Iterator[None]:
    """The plain backbone for a while, on the same weights in memory: for writing text with the embedder's LLM."""
    layers = lora_layers(backbone)
    trained = [parameter for layer in layers for parameter in _parameters(layer) if parameter.requires_grad]
    unfold(layers)
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)  # which also marks every parameter as trainable
            for parameter in _parameters(layer):
                parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def _parameters(layer: LoraLayer) -> Iterator[nn.Parameter]:
    """The adapter's own parameters, without those of the layer under it."""
    for name in layer.adapter_layer_names:
        yield from getattr(layer, name).parameters()
