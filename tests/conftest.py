"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub; one that tried would hang on a closed network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():  # before anything imports Triton, whose own functions read it too
    os.environ.setdefault("TRITON_INTERPRET", "1")

from gircse.model import GIRCSE
from tests.kernel_models import compiled, taken  # noqa: F401  # fixtures
from tests.tiny import tiny_backbone


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama with a tokenizer of characters."""
    return tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def model(backbone: Path) -> GIRCSE:
    """An untrained tiny model, K = 3."""
    return GIRCSE.from_backbone(str(backbone), num_steps=3, max_seq_length=48, device="cpu")


@pytest.fixture(scope="module")
def saved(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a saved tiny model with an adapter, K = 3, of at most 60 tokens."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    GIRCSE.from_backbone(str(backbone), num_steps=3, max_seq_length=60, lora=lora, device="cpu").save_pretrained(
        str(folder)
    )
    return str(folder)


@pytest.fixture
def without_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbone itself computes, as where no packed copy of it is made: on processors without AVX512, say."""
    monkeypatch.setattr("gircse.fast.inference_copy.packs_in_place", lambda dtype: False)


@pytest.fixture(scope="session")
def shipped() -> GIRCSE:
    """The model that ships with the package, over the real backbone."""
    return GIRCSE(device="cpu")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium. For one file of tests: the loop it keeps running is in the way of other files' event loops."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: install it (apt-get install chromium) or set CHROMIUM to its path")
    playwright = pytest.importorskip("playwright.sync_api")
    quiet = ["background-networking", "component-update", "quic", "sync", "gpu"]
    flags = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=chromium, args=flags)
        yield started
        started.close()
