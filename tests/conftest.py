"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub; one that tried would hang on a closed network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from gircse.model import GIRCSE
from tests.tiny import tiny_backbone


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama with a tokenizer of characters."""
    return tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def model(backbone: Path) -> GIRCSE:
    """An untrained tiny model, K = 3."""
    return GIRCSE.from_backbone(str(backbone), num_steps=3, max_seq_length=48, device="cpu")


@pytest.fixture(scope="session")
def shipped() -> GIRCSE:
    """The model that ships with the package, over the real backbone."""
    return GIRCSE(device="cpu")
