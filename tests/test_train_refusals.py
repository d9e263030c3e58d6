"""What a run, and its dry run, refuse before the first step instead of training on nothing or failing on the way."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import MambaConfig

from gircse.errors import GircseError, UsageError
from gircse.model import GIRCSE
from gircse.train.data import load_training_data
from gircse.train.plan import try_recipe
from gircse.train.recipe import load_recipe
from gircse.train.run import _last_checkpoint, train
from tests.training_recipe import values, write, write_rows


@pytest.fixture
def content(tmp_path: Path, backbone: Path) -> dict[str, Any]:
    write_rows(tmp_path)
    return values(tmp_path, backbone)


def refused(tmp_path: Path, content: dict[str, Any], where: str, words: str) -> None:
    """By the dry run, and by the run, in the same words and before anything is written."""
    recipe = load_recipe(write(tmp_path, content))
    assert words in str(try_recipe(recipe).problems[where])
    with pytest.raises(GircseError, match=words.replace("(", r"\(").replace(")", r"\)")):
        train(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "gircse_config.json").exists()


def test_an_instruction_that_leaves_no_room_for_texts(tmp_path: Path, content: dict[str, Any]) -> None:
    content["data"]["max_seq_length"] = 21
    refused(tmp_path, content, "data", "the instruction 'do a' alone takes 21 tokens")


def test_a_largest_k_beyond_the_positions(tmp_path: Path, content: dict[str, Any]) -> None:
    content["training"]["random_steps"] = [1, 35]
    refused(tmp_path, content, "backbone", "data.max_seq_length (30) and the largest K (35) exceed the 64 positions")


def test_a_backbone_without_a_cache_of_keys_and_values(tmp_path: Path, content: dict[str, Any]) -> None:
    folder = tmp_path / "mamba"
    shutil.copytree(content["backbone"], folder)
    MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, state_size=4).save_pretrained(folder)
    recipe = load_recipe(write(tmp_path, {**content, "backbone": str(folder)}))
    assert "recurrent state" in str(try_recipe(recipe).problems["backbone"])


def test_a_source_without_a_share_is_told_of(
    tmp_path: Path, content: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    for source in content["data"]["sources"]:
        source["examples"] = None
    content["data"] |= {"examples": 4}
    with caplog.at_level(logging.WARNING, "gircse.train"):
        data = load_training_data(load_recipe(write(tmp_path, content)))
    assert len(data) == 1
    assert "left out: its share of data.examples is less than a batch of 4" in caplog.text


def test_resuming_does_not_replace_a_finished_model(tmp_path: Path, content: dict[str, Any]) -> None:
    recipe = load_recipe(write(tmp_path, content))
    train(recipe, tmp_path / "out")
    assert recipe.data.max_seq_length < recipe.model.max_seq_length
    for place in (tmp_path / "out", next((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))):
        assert GIRCSE(str(place), device="cpu").max_seq_length == recipe.model.max_seq_length
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    with pytest.raises(UsageError, match="holds a finished model and no checkpoint"):
        train(recipe, tmp_path / "out", resume=True)


def test_a_damaged_checkpoint_leaves_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step, state in ((2, '{"global_step": 2}'), (4, '{"global_step": 4'), (6, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert _last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-4 is damaged" in caplog.text
