"""The model that the ``start_from`` of a recipe names, and whether it fits the recipe.

Knows names, folders and the configurations in them; loads no weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sentence_transformers.util import load_file_path

from gircse.backbones import known_backbones, resolve_backbone
from gircse.checkpoint import BackboneReference, Checkpoint
from gircse.errors import GircseError
from gircse.model import pretrained_path
from gircse.train.recipe import Recipe

SHIPPED = "shipped"
"""What ``start_from`` calls the model that comes with the package."""

LoraSizes = tuple[int, float, float]
"""r, alpha and dropout of an adapter."""


def saved_model(start_from: str) -> str | None:
    """The folder or hub id of the model to start from; None for the one that comes with the package.

    Raises:
        GircseError: It is the name of a backbone, which is no trained model.
    """
    if Path(start_from).exists():
        return start_from
    if start_from in known_backbones():
        raise GircseError(
            f"{start_from} is a backbone, no trained model; start_from: {SHIPPED} is the model that comes with gircse, "
            "and without start_from a run begins with the bare backbone"
        )
    return None if start_from == SHIPPED else start_from


def check_saved_model(recipe: Recipe, start_from: str) -> None:
    """See whether a model fits the recipe, by its files on this machine; one that is on the hub only is let pass.

    Raises:
        GircseError: It does not fit, or is no saved GIRCSE model.
    """
    place = saved_model(start_from) or pretrained_path()
    names = ("gircse_config.json", "adapter_config.json")
    config, adapter = (load_file_path(place, name, local_files_only=True) for name in names)
    if config is None:
        if Path(place).is_dir():
            raise GircseError(f"{start_from} is no saved GIRCSE model: it has no gircse_config.json")
        return
    try:
        checkpoint = Checkpoint.from_dict(json.loads(Path(config).read_text(encoding="utf-8")), start_from)
        sizes = []
        if checkpoint.weights == "adapter" and adapter is not None:
            values = json.loads(Path(adapter).read_text(encoding="utf-8"))
            sizes = [(values["r"], values["lora_alpha"], values["lora_dropout"])]
    except (ValueError, KeyError) as error:
        raise GircseError(f"{start_from} is damaged ({error}); save it anew, or start from another model") from error
    check_fit(recipe, start_from, checkpoint.backbone, sizes)


def check_fit(recipe: Recipe, start_from: str, backbone: BackboneReference, lora: Sequence[LoraSizes]) -> None:
    """See whether a model has the backbone and the LoRA sizes of the recipe.

    Args:
        recipe: The recipe.
        start_from: Its name of the model.
        backbone: The model's.
        lora: Of the model's adapter; empty where it has none.

    Raises:
        GircseError: It has others, or the recipe's backbone is not to be had.
    """
    if (expected := resolve_backbone(recipe.backbone).sha256) != backbone.sha256:
        raise GircseError(
            f"{start_from} was trained on {backbone.name} (sha256 {backbone.sha256[:12]}), the recipe "
            f"names {recipe.backbone} (sha256 {expected[:12]}); name the same backbone"
        )
    wanted = [] if recipe.lora is None else [(recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout)]
    if list(lora) != wanted:
        raise GircseError(
            f"{start_from} has LoRA layers of (r, alpha, dropout) {list(lora)}, the recipe asks for {wanted}; make "
            "them equal"
        )
