"""Evaluation during training, which training does not notice; the best checkpoint; runs that diverge. Tiny models."""

from __future__ import annotations

import json
import random
import sys
from importlib import import_module, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml

from gircse.errors import GircseError, MissingExtraError
from gircse.evaluate.encoder import GenerativeSource
from gircse.evaluate.run import EvaluationSettings, evaluate_model
from gircse.evaluate.suites import TaskRequest
from gircse.losses import ICRLoss
from gircse.model import GIRCSE
from gircse.train import evaluation
from gircse.train.callbacks import COLLAPSED, PATIENCE, Collapse, Divergence, StepLosses
from gircse.train.evaluation import TaskFolderEvaluator, describe_evaluation, plan_evaluation
from gircse.train.recipe import EvaluationSection, load_recipe
from gircse.train.run import train
from tests.task_folders import write_all, write_rows
from tests.tiny import tiny_backbone

TASKS = ["STSBenchmark", "MyClassification", "MyClustering"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny, with room for the instructions of real tasks: a token is a character."""
    folder = tiny_backbone(tmp_path_factory.mktemp("backbone"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of every kind; STSBenchmark has development data of its own, with the opposite scores."""
    folder = tmp_path_factory.mktemp("eval")
    write_all(folder)
    rows = [json.loads(line) for line in (folder / "STSBenchmark" / "test.jsonl").read_text().splitlines()]
    write_rows(folder / "STSBenchmark" / "dev.jsonl", [{**row, "score": 5 - row["score"]} for row in rows])
    return folder


@pytest.fixture
def recipe(tmp_path: Path, backbone: Path, data: Path) -> Path:
    """24 rows in six steps; scored after steps 4 and 6."""
    rows = [
        {"task": "a", "instruction": "do", "query": f"query {i}", "pos": [f"pos {i}"], "neg": [f"neg {i}"]}
        for i in range(24)
    ]
    write_rows(tmp_path / "data" / "rows.jsonl", rows)
    content = {
        "backbone": str(backbone),
        "seed": 3,
        "model": {"num_steps": 2, "max_seq_length": 200},
        "lora": {"r": 2, "alpha": 4, "dropout": 0.2},
        "data": {
            "folder": str(tmp_path / "data"),
            "max_seq_length": 30,
            "sources": [{"file": "rows", "task": "a", "examples": 24, "negatives": 1, "licence": "x"}],
        },
        "training": {"batch_size": 4, "learning_rate": 0.01, "warmup_steps": 1, "save_every": 3, "log_every": 1},
        "evaluation": {"folder": str(data), "tasks": TASKS, "limit": 20, "every": 4},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def losses(logs: list[dict[str, float]]) -> dict[float, float]:
    return {log["step"]: log["loss"] for log in logs if "loss" in log}


def test_scores_are_those_of_the_evaluation_verb(backbone: Path, data: Path, tmp_path: Path) -> None:
    model = GIRCSE.from_backbone(str(backbone), num_steps=2, max_seq_length=30, device="cpu")
    names = sorted(path.name for path in data.iterdir())
    section = EvaluationSection(folder=data, tasks=names, split="test", limit=15)
    found = TaskFolderEvaluator(section, seed=7, max_seq_length=200)(model)
    assert model.max_seq_length == 30
    model.max_seq_length = 200
    events: list[Any] = []
    source = GenerativeSource(model, [2], "test/tiny", "0")
    settings = EvaluationSettings(data=data, limit=15, seed=7)
    evaluate_model(source, [TaskRequest(name) for name in names], tmp_path, settings, events.append)
    expected = {event.task: event.scores[2] for event in events if event.stage == "scored"}
    control = "MyFacets.other-instruction"
    assert expected.keys() == {*names, control}
    del expected[control]
    assert found.pop("mean") == pytest.approx(sum(expected.values()) / len(expected))
    assert found == pytest.approx(expected, abs=1e-6)


def test_development_data_where_there_are_any(backbone: Path, data: Path) -> None:
    model = GIRCSE.from_backbone(str(backbone), num_steps=1, max_seq_length=200, device="cpu")
    section = EvaluationSection(folder=data, tasks=["STSBenchmark", "MyClustering", "SciFact"], limit=None)
    described = {"STSBenchmark": "dev.jsonl", "MyClustering": "test.jsonl", "SciFact": "all queries"}
    assert describe_evaluation(section) == {"tasks": described, "limit": None, "every": 100}
    test = section.model_copy(update={"split": "test"})
    assert describe_evaluation(test)["tasks"]["STSBenchmark"] == "test.jsonl"
    a, b = (TaskFolderEvaluator(one, seed=0, max_seq_length=200)(model) for one in (section, test))
    assert a["STSBenchmark"] == pytest.approx(-b["STSBenchmark"])
    assert a["STSBenchmark"] != 0
    assert a["MyClustering"] == b["MyClustering"]


def test_an_evaluation_leaves_random_states_alone(backbone: Path, data: Path) -> None:
    model = GIRCSE.from_backbone(str(backbone), num_steps=1, max_seq_length=200, device="cpu").train()

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seeded() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seeded()
    expected = draw()
    seeded()
    evaluator = TaskFolderEvaluator(EvaluationSection(folder=data, tasks=TASKS), seed=0, max_seq_length=200)
    first = evaluator(model)
    assert draw() == expected
    assert model.training
    assert evaluator(model) == first, "the same clusters and samples every time"


@pytest.mark.slow
def test_a_resumed_run_is_an_uninterrupted_one_and_both_ignore_the_evaluation(recipe: Path, tmp_path: Path) -> None:
    """With dropout and K drawn at random: whatever an evaluation or a stop changed would show in the losses."""
    options = {"training.random_steps": [1, 2]}
    whole: list[dict[str, float]] = []
    train(load_recipe(recipe, options), tmp_path / "whole", report=whole.append)
    scored = {log["step"]: log for log in whole if "eval_mean" in log}
    assert sorted(scored) == [4, 6], "every 4 steps and at the end"
    for log in scored.values():
        assert log["eval_mean"] == pytest.approx(sum(log[f"eval_{task}"] for task in TASKS) / 3)

    plain: list[dict[str, float]] = []
    train(load_recipe(recipe, {**options, "evaluation": None}), tmp_path / "plain", report=plain.append)
    assert not any("eval_mean" in log for log in plain)
    assert losses(plain) == losses(whole)

    class Stop(Exception):
        pass

    def stop_at_five(log: dict[str, float]) -> None:
        if log["step"] == 5:
            raise Stop

    with pytest.raises(Stop):
        train(load_recipe(recipe, options), tmp_path / "broken", report=stop_at_five)
    saved = sorted(path.name for path in (tmp_path / "broken" / "checkpoints").glob("checkpoint-*"))
    assert saved == ["checkpoint-3", "checkpoint-4"], "an evaluation saves a checkpoint as well"
    rest: list[dict[str, float]] = []
    train(load_recipe(recipe, options), tmp_path / "broken", resume=True, report=rest.append)
    assert sorted(losses(rest)) == [5, 6]
    for step, loss in losses(rest).items():
        assert loss == pytest.approx(losses(whole)[step], rel=1e-4)
    final = [log["eval_mean"] for logs in (whole, rest) for log in logs if log.get("eval_mean") and log["step"] == 6]
    assert final[0] == pytest.approx(final[1], abs=1e-3)


def test_the_best_checkpoint_becomes_the_model(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"2": 0.3, "4": 0.9, "6": 0.5}
    monkeypatch.setattr(evaluation, "_score", lambda task, source: scores[source.revision])
    model = train(load_recipe(recipe, {"evaluation.every": 2, "training.save_every": 50}), tmp_path / "out")
    checkpoints = tmp_path / "out" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    best, last = (GIRCSE(str(checkpoints / f"checkpoint-{step}"), device="cpu") for step in (4, 6))
    saved = GIRCSE(str(tmp_path / "out"), device="cpu")
    texts = ["a cat", "some dogs"]
    vectors = [one.encode(texts) for one in (model, saved, best, last)]
    assert np.abs(vectors[0] - vectors[2]).max() < 1e-5
    assert np.abs(vectors[1] - vectors[2]).max() < 1e-5
    assert np.abs(vectors[1] - vectors[3]).max() > 1e-4, "the last step was another model"
    assert saved.encoder.training_facts["best"] == {"step": 4, "mean": pytest.approx(0.9)}
    assert "folder" not in saved.encoder.training_facts["recipe"]["evaluation"], "a path of this machine"


def test_what_is_missing_is_said_before_anything_is_trained(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = import_module("gircse.cli.train").train
    for changes, problem in (
        (
            ["evaluation.folder=/nowhere"],
            "/nowhere: no such folder; name that of the evaluation tasks with --eval-data",
        ),
        (["evaluation.tasks=[Nothing]"], "no folder Nothing"),
        (["evaluation.tasks=[STSBenchmark/de]"], "no subset de"),
    ):
        with pytest.raises(GircseError, match=problem):
            verb(recipe, tmp_path / "out", changes=changes)
    for name in [name for name in sys.modules if name.startswith(("gircse.evaluate", "gircse.train.evaluation"))]:
        monkeypatch.delitem(sys.modules, name)
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "mteb" else find(name, *rest))
    with pytest.raises(MissingExtraError, match=r"gircse\[eval\]"):
        verb(recipe, tmp_path / "out")
    with pytest.raises(typer.Exit):
        verb(recipe, tmp_path / "out", dry_run=True)
    assert "gircse[eval]" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_dry_run_says_what_will_be_scored(
    recipe: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = import_module("gircse.cli.train").train
    verb(recipe, dry_run=True, changes=["evaluation.folder=/nowhere"], eval_data=data)
    shown = " ".join(capsys.readouterr().out.split())
    assert "evaluation: every 4 steps and at the end, up to 20 items a task STSBenchmark (dev.jsonl)" in shown
    verb(recipe, dry_run=True, json_output=True)
    assert json.loads(capsys.readouterr().out)["evaluation"]["tasks"]["MyClustering"] == "test.jsonl"
    verb(recipe, dry_run=True, changes=["evaluation=null"])
    assert "evaluation" not in capsys.readouterr().out
    assert [task.name for task in plan_evaluation(EvaluationSection(folder=data, tasks=["MyFacets"]))] == ["MyFacets"]


def test_an_explosion_is_many_times_the_median_several_times_in_a_row() -> None:
    def found(losses: list[float], names: str = "a") -> list[int | None]:
        divergence = Divergence()
        return [divergence.add(names[i % len(names)], loss, i + 1) for i, loss in enumerate(losses)]

    calm = [1.0, 0.8, 1.2, 0.9, 1.1, 1.0]
    assert found(calm + [11.0] * PATIENCE)[-2:] == [None, 7]
    assert set(found(calm + [11.0] * (PATIENCE - 1) + [1.0] + [11.0] * (PATIENCE - 1))) == {None}, "not in a row"
    assert set(found(calm + [9.0] * 20)) == {None}, "not many times"
    assert set(found([0.001] * 9 + [0.5] * 20)) == {None}, "a solved data set"
    assert set(found([0.2, 20.0] * 30, "ab")) == {None}, "data sets differ"
    assert set(found([20.0] * 30)) == {None}, "hard from the first"


def test_a_collapse_is_told_once_for_every_data_set() -> None:
    collapse = Collapse()
    alike = COLLAPSED + 0.001
    batches = [("a", alike)] * (PATIENCE - 1) + [("a", 0.5)] + [("b", alike), ("a", alike)] * PATIENCE * 2
    told = [(place, name) for place, (name, cosine) in enumerate(batches) if collapse.add(name, cosine)]
    assert told == [(3 * PATIENCE - 2, "b"), (3 * PATIENCE - 1, "a")], "in a row, by name, and not again"


def test_a_diverging_run_names_the_last_good_checkpoint(tmp_path: Path, backbone: Path) -> None:
    model = GIRCSE.from_backbone(str(backbone), num_steps=2, full_finetune=True, device="cpu")
    for step in (10, 20, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()

    def run(losses: list[list[float]], first: int, gradient: float = 1.0) -> None:
        loss = ICRLoss(model)
        callback = StepLosses({"rows/a": loss}, None)
        parameter = next(model.parameters())
        parameter.grad = torch.full_like(parameter, gradient)
        for step, values in enumerate(losses, start=first):
            loss.last_step_losses = values
            state = SimpleNamespace(global_step=step - 1, is_world_process_zero=True)
            callback.on_pre_optimizer_step(SimpleNamespace(output_dir=str(tmp_path)), state, None, model=model)

    run([[1.0, 0.9]] * 30, first=1)
    calm, bad, nan = [[1.0, 0.9]] * 8, [[60.0, 50.0]] * PATIENCE, [[1.0, float("nan")]]
    with pytest.raises(GircseError, match=r"exploded: from step 23 on.*start_from=.*checkpoint-20$"):
        run(calm + bad, first=15)
    with pytest.raises(GircseError, match=r"exploded: from step 21 on.*start_from=.*checkpoint-10$"):
        run(calm + bad, first=13)
    with pytest.raises(GircseError, match=r"loss at step 38 is not a number.*checkpoint-30$"):
        run(calm + nan, first=30)
    with pytest.raises(GircseError, match=r"gradient at step 21 is not finite.*checkpoint-20$"):
        run(calm[:1], first=21, gradient=float("inf"))
    with pytest.raises(GircseError, match=r"gradient at step 3 is not finite; start again with a lower"):
        run(calm[:1], first=3, gradient=float("nan"))
