"""Generative text embeddings: a decoder LLM writes soft tokens about a text, and their mean is its vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gircse._version import __version__

if TYPE_CHECKING:
    from gircse.losses import CachedICRLoss, ICRLoss
    from gircse.model import GIRCSE

__all__ = ["GIRCSE", "CachedICRLoss", "ICRLoss", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the heavy rooms only when somebody enters them: ``gircse --help`` must not wait for torch."""
    if name == "GIRCSE":
        from gircse.model import GIRCSE

        return GIRCSE
    if name in ("CachedICRLoss", "ICRLoss"):
        from gircse import losses

        return getattr(losses, name)
    raise AttributeError(f"module 'gircse' has no attribute {name!r}")
