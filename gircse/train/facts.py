"""What a run is made of: its recipe, and the checksums of its data and of the model that it starts from.

Knows what a checkpoint remembers of that, and that a resumed run must be made of the same; trains nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard
from pydantic import ValidationError

from gircse._version import __version__
from gircse.checksum import vectors_checksum
from gircse.errors import GircseError, UsageError
from gircse.model import GIRCSE
from gircse.train.recipe import Recipe
from gircse.train.sources import source_path

BEGUN = "begun.json"
"""Beside the checkpoints: the facts that the run was begun with."""

_FREE = {
    "data.folder",
    "evaluation.folder",
    "evaluation.every",
    *(f"training.{name}" for name in ("max_minutes", "micro_batch_size", "save_every", "log_every", "trackers")),
}
"""Keys of a recipe that may change while a run is interrupted: what is learned does not depend on them."""


def training_facts(recipe: Recipe) -> dict[str, Any]:
    """What the checkpoint remembers of its run: the recipe, and the checksums of the data files.

    Raises:
        GircseError: A data file is missing.
    """
    values = recipe.model_dump(mode="json", exclude={"data": {"folder"}, "evaluation": {"folder"}})
    if not recipe.loss.stepwise:
        values["loss"]["refinement_weight"] = 0.0  # there is no penalty, and the recipe can be read again
    files = {source_path(recipe.data.folder, source) for source in recipe.data.sources if source.file is not None}
    return {
        "gircse": __version__,
        "recipe": values,
        "data_sha256": {path.relative_to(recipe.data.folder).as_posix(): _sha256(path) for path in sorted(files)},
    }


def start_facts(place: str, model: GIRCSE) -> dict[str, Any]:
    """Of a model that is to be trained further: its checksum, the licence in its card, and its own training.

    Args:
        place: What the recipe calls it.
        model: As it was saved.
    """
    card = model._model_card_text or ""
    stated = RepoCard(card, ignore_metadata_errors=True).data.get("license") if card.startswith("---") else None
    return {
        "model": place,
        "vectors_sha256": vectors_checksum(model.encoder),
        "licence": stated,
        "training": model.encoder.training_facts,
    }


def note_facts(facts: dict[str, Any], checkpoints: Path) -> None:
    """Keep what a run is begun with: its facts, and the checksum of its backbone as ``backbone_sha256``."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    partial = checkpoints / f"{BEGUN}.partial"
    partial.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    os.replace(partial, checkpoints / BEGUN)  # whole or not at all


def check_facts(facts: dict[str, Any], checkpoints: Path) -> None:
    """See whether an interrupted run goes on with what it was begun with.

    A run of a version that kept no facts is let pass.

    Raises:
        UsageError: It does not. The message names the first keys that differ.
        GircseError: This version cannot read the recipe of that time.
    """
    if not (checkpoints / BEGUN).is_file():
        return
    begun = json.loads((checkpoints / BEGUN).read_text(encoding="utf-8"))
    try:
        recipe = Recipe.model_validate(begun["recipe"])  # with the keys that have come since
    except ValidationError as error:
        raise GircseError(
            f"{checkpoints.parent} was begun with gircse {begun['gircse']}, whose recipe this version cannot read; "
            "go on with that version, or choose another folder"
        ) from error
    before, now = _compared(begun, recipe.model_dump(mode="json")), _compared(facts, facts["recipe"])
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    if changed:
        shown = ", ".join(f"{key} was {_shown(before.get(key))} and is {_shown(now.get(key))}" for key in changed[:2])
        more = f", and {len(changed) - 2} more" if len(changed) > 2 else ""
        raise UsageError(
            f"{checkpoints.parent} was begun otherwise: {shown}{more}; resume it as it was begun, or choose another "
            "folder"
        )


def _compared(facts: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """What must stay, by dotted keys; of models not where they lie, but what they are."""
    checksums = dict(facts["data_sha256"])
    if "backbone_sha256" in facts:
        checksums["backbone"] = facts["backbone_sha256"]
    if "start" in facts:
        checksums["start_from"] = facts["start"]["vectors_sha256"]
    free = {*_FREE, *({"backbone", "start_from"} & checksums.keys())}
    values = {key: value for key, value in _flat(recipe).items() if not _is_free(key, free)}
    return values | {f"the checksum of {name}": sha256[:12] for name, sha256 in checksums.items()}


def _is_free(key: str, free: set[str]) -> bool:
    return key.endswith(".licence") or any(key == name or key.startswith(f"{name}.") for name in free)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists by their dotted keys."""
    if not isinstance(values, dict | list):
        return {prefix: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    return {
        key: leaf
        for name, value in items
        for key, leaf in _flat(value, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _shown(value: Any, limit: int = 60) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
