"""Merging trained models: one whose weights are the mean of theirs.

Knows saved models and their weights; knows nothing of training or texts. sentence-transformers merges whole models
only, and peft's weighted adapters are no means of their factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.utils.save_and_load import set_peft_model_state_dict
from torch import Tensor

from gircse._version import __version__
from gircse.adapter import lora_layers
from gircse.errors import GircseError, UsageError
from gircse.model import GIRCSE


def merge_models(models: Sequence[str], weights: Sequence[float] | None = None) -> GIRCSE:
    """A model whose trained weights are the weighted mean of several models' (a "model soup", arXiv 2203.05482).

    That keeps what models have in common that have once been the same: stages of one training, or runs from one start.
    Of LoRA adapters the mean is taken of A and of B, not of B·A, so the result is no larger than one of them. Adapters
    that were initialised apart have nothing in common, and their mean is no better than noise.

    Args:
        models: Two or more folders or hub ids. Of the first the result has the K, the prompts and the longest prompt.
        weights: One of each, above 0; their sum does not matter. Equal ones where not given.

    Returns:
        The merged model, in float32. Its `training_facts` hold those of all models.

    Raises:
        UsageError: Fewer than two models, or weights that do not fit them.
        GircseError: A model is not to be had, has no trained weights, or differs from the first in its backbone, in
            what the vectors depend on, or in the shapes of its weights.
    """
    shares = merging_shares(weights, len(models))
    merged = GIRCSE(models[0], device="cpu")
    totals = {name: tensor.float() * shares[0] for name, tensor in _trained_weights(merged, models[0]).items()}
    history = [_facts(models[0], merged, shares[0])]
    for place, share in zip(models[1:], shares[1:], strict=True):
        other = GIRCSE(place, device="cpu")
        found = _trained_weights(other, place)
        _require_alike(merged, other, f"{models[0]} and {place}")
        if {name: tensor.shape for name, tensor in found.items()} != {name: t.shape for name, t in totals.items()}:
            raise GircseError(f"{models[0]} and {place} have weights of different names or shapes; they have no mean")
        for name, tensor in found.items():
            totals[name] += tensor.float() * share
        history.append(_facts(place, other, share))
    _set_weights(merged, totals)
    merged.encoder.training_facts = {"gircse": __version__, "merged": history}
    merged._model_card_text = None  # the first model's card does not describe this one
    return merged


def merging_shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """Each model's part of the mean; they add up to 1.

    Raises:
        UsageError: Fewer than two models, or weights that do not fit them.
    """
    weights = [1.0] * count if weights is None else weights
    if count < 2:
        raise UsageError("merging takes two models or more")
    if len(weights) != count or not all(0 < weight < float("inf") for weight in weights):
        raise UsageError(f"{count} models need {count} weights above 0")
    return [weight / sum(weights) for weight in weights]


def _trained_weights(model: GIRCSE, place: str) -> dict[str, Tensor]:
    kind = model.encoder.weights
    if kind == "backbone":
        raise GircseError(f"{place} has no trained weights, only a backbone's; there is nothing to merge")
    if model.encoder.has_adapter:
        return {name: tensor.detach() for name, tensor in get_peft_model_state_dict(model.encoder.backbone).items()}
    return {name: parameter.detach() for name, parameter in model.encoder.backbone.named_parameters()}


def _set_weights(model: GIRCSE, weights: dict[str, Tensor]) -> None:
    backbone = model.encoder.backbone
    if model.encoder.has_adapter:
        set_peft_model_state_dict(backbone, weights)
        return
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.copy_(weights[name])


def _require_alike(first: GIRCSE, other: GIRCSE, names: str) -> None:
    if first.encoder.reference.sha256 != other.encoder.reference.sha256:
        raise GircseError(f"{names} were trained over different backbones; they have no mean")
    values, others = _what_vectors_depend_on(first), _what_vectors_depend_on(other)
    differing = next((key for key in values if values[key] != others[key]), None)
    if differing is not None:
        raise GircseError(f"{names} differ in {differing}: {values[differing]} and {others[differing]}")


def _what_vectors_depend_on(model: GIRCSE) -> dict[str, Any]:
    """Besides the weights, and what every call can choose."""
    values = asdict(model.encoder.refinement)
    layers = lora_layers(model.encoder.backbone)
    scaling = sorted({scale for layer in layers for scale in layer.scaling.values()})
    kept = {key: value for key, value in values.items() if key not in ("num_steps", "max_seq_length")}
    return {"weights": model.encoder.weights, **kept, "the scaling of LoRA": scaling}


def _facts(place: str, model: GIRCSE, share: float) -> dict[str, Any]:
    return {"model": str(place), "weight": share, "training": model.encoder.training_facts}
