"""What the ``start_from`` of a recipe names. Knows names and folders; loads nothing."""

from __future__ import annotations

from pathlib import Path

from gircse.backbones import known_backbones
from gircse.errors import GircseError

SHIPPED = "shipped"
"""What ``start_from`` calls the model that comes with the package."""


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
