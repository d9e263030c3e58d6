"""A resumed run is made of what it was begun with, or is refused in a line. Tiny models, real trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gircse.errors import GircseError, UsageError
from gircse.train.facts import check_facts, note_facts, training_facts
from gircse.train.recipe import load_recipe
from gircse.train.run import train
from tests.training_recipe import values, write, write_rows


class Stop(Exception):
    pass


@pytest.fixture
def content(tmp_path: Path, backbone: Path) -> dict[str, Any]:
    """A recipe whose run in ``tmp_path/run`` was stopped after two of six steps."""
    write_rows(tmp_path)
    found = values(tmp_path, backbone)

    def stop(log: dict[str, float]) -> None:
        if log["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        train(load_recipe(write(tmp_path, found)), tmp_path / "run", report=stop)
    return found


def resume(folder: Path, content: dict[str, Any]) -> list[int]:
    logs: list[dict[str, float]] = []
    train(load_recipe(write(folder, content)), folder / "run", resume=True, report=logs.append)
    return [int(log["step"]) for log in logs if "loss" in log]


def test_another_recipe_is_refused_with_the_first_keys_that_differ(tmp_path: Path, content: dict[str, Any]) -> None:
    own, training, (first, second) = content["data"], content["training"], content["data"]["sources"]
    for changes, message in (
        (
            {"training": training | {"learning_rate": 0.5}},
            "training.learning_rate was 0.01 and is 0.5; ",
        ),
        ({"lora": {"r": 2, "alpha": 64}, "seed": 4}, "seed was 3 and is 4, lora.alpha was 4 and is 64; resume"),
        (
            {"loss": {"temperature": 0.5}, "seed": 4, "query_instruction": "x"},
            "x, and 1 more; resume it",
        ),
        ({"data": own | {"sources": [first]}}, r"data.sources.1.file was rows and is not there, .* and \d+ more"),
        ({"data": own | {"sources": [second, first]}}, "data.sources.0.task was a and is b"),
    ):
        with pytest.raises(UsageError, match=message):
            resume(tmp_path, content | changes)
    rows = tmp_path / "data" / "rows.jsonl.zst"
    whole = rows.read_bytes()
    rows.write_bytes(whole + whole)
    with pytest.raises(UsageError, match=r"the checksum of rows.jsonl.zst was [0-9a-f]{12} and is"):
        resume(tmp_path, content)
    rows.write_bytes(whole)
    assert resume(tmp_path, content) == [3, 4, 5, 6]


def test_what_changes_nothing_that_is_learned_may_change(tmp_path: Path, content: dict[str, Any]) -> None:
    content["training"] |= {"max_minutes": 60, "save_every": 4, "log_every": 2, "trackers": [], "micro_batch_size": 3}
    content["data"]["sources"][0]["licence"] = "CC BY 4.0"
    (tmp_path / "data").rename(tmp_path / "moved")
    content["data"]["folder"] = str(tmp_path / "moved")
    assert resume(tmp_path, content) == [4, 6]


def test_models_may_move_and_trackers_change(tmp_path: Path, content: dict[str, Any]) -> None:
    def facts(checksum: str, **changes: Any) -> dict[str, Any]:
        made = training_facts(load_recipe(write(tmp_path, content | changes)))
        return made | {"backbone_sha256": checksum, "start": {"vectors_sha256": "start"}}

    note_facts(facts("one", start_from="here", training=content["training"] | {"trackers": None}), tmp_path / "kept")
    moved = {"backbone": "elsewhere", "start_from": "there"}
    check_facts(facts("one", **moved, training=content["training"] | {"trackers": ["tensorboard"]}), tmp_path / "kept")
    with pytest.raises(UsageError, match="the checksum of backbone was one and is another"):
        check_facts(facts("another"), tmp_path / "kept")


def test_a_recipe_of_an_earlier_version_has_the_keys_that_came_since(tmp_path: Path, content: dict[str, Any]) -> None:
    begun = tmp_path / "run" / "checkpoints" / "begun.json"
    told = begun.read_text()
    begun.write_text(told.replace('"steps_distribution": "uniform",', ""))
    assert begun.read_text() != told
    assert resume(tmp_path, content) == [3, 4, 5, 6]
    begun.write_text(told.replace('"steps_distribution"', '"a_key_of_another_time"'))
    with pytest.raises(GircseError, match="whose recipe this version cannot read"):
        resume(tmp_path, content)
    begun.unlink()  # as versions before this one left it
    assert resume(tmp_path, content | {"seed": 5}) == []


def test_a_run_without_a_checkpoint_may_begin_otherwise(tmp_path: Path, content: dict[str, Any]) -> None:
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").unlink()  # as a kill in mid-save leaves it
    assert resume(tmp_path, content | {"seed": 4}) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(UsageError, match="seed was 4 and is 3"):
        resume(tmp_path, content)
