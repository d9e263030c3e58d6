"""LoRA layers of a backbone at inference: folded into the weights under them, or switched off.

Knows peft's layers; knows nothing of refinement, texts or checkpoints. A LoRA layer costs two thin matrix products
beside every thick one, which on a CPU take as long as the thick one itself; folded into the weights it costs nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

_changing = threading.Lock()
"""Held while weights are changed: two threads that fold at a time would both add BA."""


def lora_layers(backbone: PreTrainedModel) -> list[LoraLayer]:
    """The LoRA layers, in the order of the modules."""
    return [module for module in backbone.modules() if isinstance(module, LoraLayer)]


def can_fold(backbone: PreTrainedModel, layers: list[LoraLayer]) -> bool:
    """Whether folding keeps the vectors: frozen layers over float32 weights of their own.

    Weights of 16 bits would round the small update away, a layer that is being trained must stay apart, and what is
    folded into a tied LM head would also change the embedding table.
    """
    embedding = backbone.get_input_embeddings().weight
    weights = [layer.get_base_layer().weight for layer in layers]
    trained = any(parameter.requires_grad for layer in layers for parameter in _parameters(layer))
    return (
        not trained
        and not any(layer.disable_adapters for layer in layers)
        and all(weight.dtype == torch.float32 and weight is not embedding for weight in weights)
    )


@torch.no_grad()
def fold(layers: list[LoraLayer]) -> None:
    """W becomes W + BA of the active adapters, in place and without a copy of weights that are this process's own."""
    with _changing:
        for layer in layers:
            if layer.merged and layer.merged_adapters != list(layer.active_adapters):
                _make_own(layer)
                layer.unmerge()
            if not layer.merged:
                _make_own(layer)
                layer.merge()


@torch.no_grad()
def unfold(layers: list[LoraLayer]) -> None:
    """Take BA out of the weights again, which restores them up to rounding (about 1e-7 of a weight)."""
    with _changing:
        for layer in layers:
            if layer.merged:
                _make_own(layer)
                layer.unmerge()


def _make_own(layer: LoraLayer) -> None:
    """A copy of weights in shared memory, with which other processes compute."""
    weight = cast(Tensor, layer.get_base_layer().weight)
    if weight.device.type == "cpu" and weight.is_shared():
        weight.data = weight.data.clone()


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
