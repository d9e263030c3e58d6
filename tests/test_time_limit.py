"""A run that must end in time does so with its learning rate at the schedule's end, also after an interruption."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from gircse.model import GIRCSE
from gircse.train.callbacks import TimeLimit
from gircse.train.recipe import load_recipe
from gircse.train.run import train
from tests.training_recipe import values, write, write_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    return tmp_path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, 30 more after every optimiser step."""
    from gircse.train.callbacks import StepLosses

    now, checked = [0.0], StepLosses.on_pre_optimizer_step

    def count(self: StepLosses, *args: object, **kwargs: object) -> None:
        now[0] += 30
        checked(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(StepLosses, "on_pre_optimizer_step", count)
    monkeypatch.setattr("gircse.train.callbacks.time.perf_counter", lambda: now[0])
    return now


def logged(folder: Path, backbone: Path, name: str, minutes: float | None, **options: bool) -> list[dict[str, float]]:
    """Entries of the six steps, or of as many as there is time for."""
    content = values(folder, backbone)
    content["training"] |= {"max_minutes": minutes, "schedule": "linear"}
    logs: list[dict[str, float]] = []
    train(load_recipe(write(folder, content)), folder / name, report=logs.append, **options)
    return [entry for entry in logs if "loss" in entry]


@pytest.mark.usefixtures("clock")
def test_the_schedule_goes_by_time_where_time_is_short(
    folder: Path, backbone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    free, roomy, short = (
        logged(folder, backbone, name, minutes) for name, minutes in (("free", None), ("roomy", 60), ("short", 2))
    )
    rates = [[entry["learning_rate"] for entry in entries] for entries in (free, roomy, short)]
    assert rates[1] == rates[0], "time enough: nothing changes"
    assert [entry["loss"] for entry in roomy] == [entry["loss"] for entry in free]
    assert len(short) == 4, "two minutes are four steps"
    assert "2 minutes are over at step 4 of 6" in caplog.text
    assert rates[2][2] < rates[0][2], "the schedule is ahead of the steps"
    assert [entry["seconds_left"] for entry in short] == [90, 60, 30, 0]
    facts = [GIRCSE(str(folder / name), device="cpu").encoder.training_facts for name in ("roomy", "short")]
    assert [told["steps"] for told in facts] == [6, 4]


@pytest.mark.usefixtures("clock")
def test_the_last_weights_are_scored_and_kept(folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two minutes end at step 4, where neither an evaluation nor a checkpoint is due."""
    pytest.importorskip("mteb")
    from gircse.train.evaluation import TaskFolderEvaluator
    from tests.task_folders import write_all

    scores = iter((0.5, 0.9))
    monkeypatch.setattr(TaskFolderEvaluator, "__call__", lambda *_, **__: {"mean": next(scores)})
    write_all(folder / "eval")
    content = values(folder, backbone)
    content["training"] |= {"max_minutes": 2, "save_every": 10}
    train(load_recipe(write(folder, content)), folder / "plain")
    assert (folder / "plain" / "checkpoints" / "checkpoint-4").is_dir(), "--resume has something to go on from"
    content["evaluation"] = {"folder": str(folder / "eval"), "tasks": ["STSBenchmark"], "every": 3}
    logs: list[dict[str, float]] = []
    model = train(load_recipe(write(folder, content)), folder / "scored", report=logs.append)
    assert [entry["step"] for entry in logs if "eval_mean" in entry] == [3, 4]
    assert model.encoder.training_facts["best"] == {"step": 4, "mean": 0.9}


def test_minutes_before_an_interruption_count(folder: Path, backbone: Path, clock: list[float]) -> None:
    class Stop(Exception):
        pass

    content = values(folder, backbone)
    content["training"] |= {"max_minutes": 2, "schedule": "linear"}

    def stop_after_two(log: dict[str, float]) -> None:
        if log["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        train(load_recipe(write(folder, content)), folder / "broken", report=stop_after_two)
    clock[0] += 3600  # between the processes; nobody waits for it
    rest = logged(folder, backbone, "broken", 2, resume=True)
    assert [entry["step"] for entry in rest] == [3, 4]


def test_all_processes_go_by_the_first_ones_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of one's own would end one process a step before another, which then waits for ever."""
    monkeypatch.setattr("gircse.train.callbacks.time.perf_counter", lambda: 0.0)
    monkeypatch.setattr("gircse.train.callbacks.broadcast_object_list", lambda values: values.__setitem__(0, 3.0))
    limit, state = TimeLimit(2.0), SimpleNamespace(global_step=4, max_steps=6, is_world_process_zero=False)
    for processes, ended in ((1, False), (2, True)):
        control = TrainerControl()
        arguments = SimpleNamespace(world_size=processes, eval_strategy="no")
        limit.on_optimizer_step(arguments, state, control)
        limit.on_step_end(arguments, state, control)
        assert control.should_training_stop is ended


def test_the_dry_run_tells_of_the_limit(folder: Path, backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb, recipe = import_module("gircse.cli.train").train, write(folder, values(folder, backbone))
    verb(recipe, dry_run=True, changes=["training.max_minutes=7"])
    assert "of warm-up, at its end after 7 minutes" in capsys.readouterr().out
    verb(recipe, dry_run=True)
    assert "minutes" not in capsys.readouterr().out.split("LoRA")[0]
