"""log.jsonl: every step once, whatever was stopped and resumed; how fast it goes and how long it will take."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from gircse.errors import GircseError
from gircse.gradient_chain import SOFT_TOKEN_GRADIENTS
from gircse.losses import ICRLoss
from gircse.train.callbacks import RunLog, Speed
from gircse.train.data import load_training_data
from gircse.train.recipe import load_recipe
from gircse.train.run import make_model, train
from tests.training_recipe import ROWS, values, write, write_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    return tmp_path


def logged(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_steps_are_logged_once_after_stop_and_resume(
    folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at step 5, two after the checkpoint of step 3; and the last line was cut off."""
    verb, report = import_module("gircse.cli.train").train, RunLog.__call__
    content = values(folder, backbone)
    content["training"]["save_every"] = 3
    recipe, log = write(folder, content), folder / "out" / "log.jsonl"

    class Stop(Exception):
        pass

    def stop_after_five(self: RunLog, entry: dict[str, float]) -> None:
        report(self, entry)
        if entry["step"] == 5:
            raise Stop

    monkeypatch.setattr(RunLog, "__call__", stop_after_five)
    with pytest.raises(Stop):
        verb(recipe, folder / "out")
    monkeypatch.setattr(RunLog, "__call__", report)
    assert [entry["step"] for entry in logged(log)] == [1, 2, 3, 4, 5]
    with log.open("a") as file:
        file.write('{"loss": 1.')
    verb(recipe, folder / "out", resume=True)
    entries = logged(log)
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert entries[0]["tokens_per_second"] > 0
    assert entries[5]["seconds_left"] == 0
    verb(recipe, folder / "out", resume=True)
    assert logged(log) == entries, "there was nothing left to do"


def test_a_run_without_a_checkpoint_begins_its_log_anew(tmp_path: Path) -> None:
    path = tmp_path / "run" / "log.jsonl"
    RunLog(path)({"step": 1, "loss": 2.0})
    log = RunLog(path)
    assert logged(path) == [{"step": 1, "loss": 2.0}], "nothing is dropped before there is something new"
    log({"step": 1, "loss": 3.0})
    log({"step": 2, "loss": 3.0})
    assert logged(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 3.0}]


@pytest.mark.parametrize("answer", [None, "pos *"])
def test_speed_counts_the_tokens_of_prompts_and_soft_tokens(
    folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch, answer: str | None
) -> None:
    """Not those of answers, which are not embedded."""
    counted: list[int] = []
    on_log = Speed.on_log

    def spy(self: Speed, *arguments: Any, **options: Any) -> None:
        counted.append(self.tokens)
        on_log(self, *arguments, **options)

    monkeypatch.setattr(Speed, "on_log", spy)
    content = values(folder, backbone)
    content["data"]["sources"] = content["data"]["sources"][:1]
    content["data"]["sources"][0] |= {"examples": 4, "answer": answer}  # one batch
    recipe, logs = load_recipe(write(folder, content)), list[dict[str, float]]()
    train(recipe, folder / "out", report=logs.append)
    rows = load_training_data(recipe)["rows/a"]
    texts = [text for column in ("anchor", "positive", "negative_1") for text in rows[column]]
    assert counted[0] == sum(min(len(text), 30) + 2 for text in texts), "a token is a character; K = 2"
    assert logs[0]["tokens_per_second"] > 0


def test_time_left_is_the_pace_so_far(folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run of ten steps, two of which this process took in three seconds, of them two of training."""
    from types import SimpleNamespace

    model = make_model(load_recipe(write(folder, values(folder, backbone))))
    speed = Speed(model, [ICRLoss(model)])
    now = 0.0
    monkeypatch.setattr("gircse.train.callbacks.time.perf_counter", lambda: now)
    state, arguments = SimpleNamespace(global_step=4, max_steps=10), SimpleNamespace(world_size=2)
    for _ in range(2):
        speed.on_step_begin(arguments, state, None)
        now, state.global_step, speed.tokens = now + 1.0, state.global_step + 1, speed.tokens + 50
        speed.on_step_end(arguments, state, None)
        now += 0.5
    logs = {"loss": 1.0}
    speed.on_log(arguments, state, None, logs=logs)
    assert logs == {"loss": 1.0, "tokens_per_second": 100.0, "seconds_left": 6.0}


def test_the_loss_of_the_prompts_step_is_logged_and_trains(folder: Path, backbone: Path) -> None:
    def logs(name: str) -> list[dict[str, float]]:
        found: list[dict[str, float]] = []
        train(load_recipe(write(folder, content)), folder / name, report=found.append)
        return [entry for entry in found if "loss" in entry]

    content = values(folder, backbone)
    without = logs("without")
    content["loss"] = {"prompt_step": True}
    own = logs("with")
    assert not any("step_loss_0" in entry for entry in without)
    assert all({"step_loss_0", "step_loss_1", "step_loss_2"} == {k for k in e if k.startswith("step_")} for e in own)
    assert own[0]["step_loss_1"] == pytest.approx(without[0]["step_loss_1"], rel=1e-4), "steps keep their numbers"
    assert own[-1]["step_loss_1"] != pytest.approx(without[-1]["step_loss_1"], rel=1e-4), "other weights were learned"


def test_a_recipe_says_where_gradients_of_soft_tokens_go(folder: Path, backbone: Path) -> None:
    """The first losses are the same, the steps after them not."""
    logs = {}
    for kind in SOFT_TOKEN_GRADIENTS:
        content = {**values(folder, backbone), "loss": {"soft_token_gradients": kind}}
        entries: list[dict[str, float]] = []
        train(load_recipe(write(folder, content)), folder / kind, report=entries.append)
        logs[kind] = [entry["loss"] for entry in entries if "loss" in entry]
    for kind in ("bounded", "none"):
        assert logs[kind][0] == pytest.approx(logs["full"][0], rel=1e-4)
        assert logs[kind][-1] != pytest.approx(logs["full"][-1], rel=1e-3)


def test_a_source_whose_texts_cannot_be_told_apart_is_warned_of(
    folder: Path, backbone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Source a is one text again and again; b is left alone."""
    rows = [row if row["task"] == "b" else row | {"query": "x", "pos": ["x"], "neg": ["x"]} for row in ROWS]
    (folder / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data" / "rows.jsonl.zst").unlink()
    content = values(folder, backbone)
    content["data"]["sources"][0]["examples"] = 24
    logs: list[dict[str, float]] = []
    train(load_recipe(write(folder, content)), folder / "out", report=logs.append)
    a, b = ([entry[key] for entry in logs if key in entry] for key in ("cosine_of/rows/a", "cosine_of/rows/b"))
    assert a == pytest.approx([1.0] * 6, abs=1e-3)
    assert max(b) < 0.99
    assert [record.args[0] for record in caplog.records if "have become alike" in record.message] == ["rows/a"]  # type: ignore[index]


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])  # a GPU's, and a CPU's
def test_a_run_out_of_memory_says_what_to_do(
    folder: Path, backbone: Path, kind: type[RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = ["out of memory. Tried to allocate 42.00 MiB.\nAnd so on", "mat1 and mat2 shapes cannot be multiplied"]

    def full(*_: object, **__: object) -> None:
        raise kind(problems.pop(0))

    monkeypatch.setattr(ICRLoss, "forward", full)
    recipe = load_recipe(write(folder, values(folder, backbone)))
    with pytest.raises(GircseError, match=r"batches of 4 rows of up to 30 tokens; .* training\.micro_batch_size"):
        train(recipe, folder / "out")
    if kind is RuntimeError:
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            train(recipe, folder / "other")
