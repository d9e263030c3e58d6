"""`gircse train --dry-run`: what a run would do, and what it would not find. Tiny models, no network."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import typer
from peft import LoraConfig

from gircse.errors import GircseError
from gircse.model import GIRCSE
from gircse.train.plan import plan_training
from gircse.train.recipe import load_recipe
from gircse.train.run import make_model
from tests.tiny import tiny_backbone
from tests.training_recipe import values, write, write_rows

verb = import_module("gircse.cli.train").train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    return tmp_path


@pytest.mark.parametrize("recipe", sorted(Path("recipes").glob("paper-*.yaml")), ids=lambda path: path.name)
def test_the_papers_recipes_are_valid_where_the_hub_is_out_of_reach(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GIRCSE_HOME", str(tmp_path))
    with pytest.raises(typer.Exit) as end:
        verb(recipe, dry_run=True)
    assert end.value.exit_code == 1
    shown = capsys.readouterr().out
    for text in (
        "the recipe is valid",
        "K 5, λ 1, τ 0.02, gradients of soft tokens full",
        "learning rate 0.0001, cosine",
        "r 16, alpha 64",
    ):
        assert text in shown
    assert "checked: trackers" in shown
    assert f"backbone: {load_recipe(recipe).backbone}" in shown, "with the reason"
    assert "data: the data set cfli/bge-full-data cannot be loaded (" in shown
    with pytest.raises(typer.Exit):
        verb(recipe, dry_run=True, json_output=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["checked"], set(told["problems"])) == (["trackers"], {"backbone", "data"})
    assert told["settings"]["lora"] == {"r": 16, "alpha": 64, "dropout": 0.0}


def test_a_dry_run_tells_the_settings_and_the_plan(
    folder: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(folder, values(folder, backbone))
    verb(path, dry_run=True, changes=["training.random_steps=[1, 4]", "loss.stepwise=false", "lora=null"])
    shown = capsys.readouterr().out
    for text in (
        "K 1 to 4, λ 0, τ 0.02",
        "learning rate 0.01, cosine after 1 steps",
        "LoRA: all weights",
        "24 examples",
    ):
        assert text in shown
    verb(path, dry_run=True, json_output=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["steps"], told["problems"]) == (6, {})
    assert told["checked"] == ["trackers", "backbone", "data"]
    assert told["settings"]["num_steps"] == 2


def test_a_run_that_is_all_warm_up_is_told(
    folder: Path, backbone: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = write(folder, values(folder, backbone))
    told = "6 steps are no more than the 7 of warm-up: raise training.epochs"
    for warm_up, expected in ((5, False), (7, True)):
        verb(path, dry_run=True, changes=[f"training.warmup_steps={warm_up}"])
        assert (told in capsys.readouterr().out) is expected
        verb(path, folder / f"out{warm_up}", changes=[f"training.warmup_steps={warm_up}"])
        assert (told in caplog.text) is expected


def test_a_dry_run_looks_for_the_model_to_start_from_and_for_the_teacher(
    folder: Path, backbone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = folder / "saved"
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    GIRCSE.from_backbone(str(backbone), num_steps=2, lora=lora, device="cpu").save_pretrained(str(saved))
    content = values(folder, backbone) | {"start_from": str(saved), "loss": {"teacher": str(saved)}}
    assert plan_training(load_recipe(write(folder, content))).steps == 6
    content |= {"start_from": "runs/nowhere", "loss": {"teacher": str(folder / "data")}}
    with pytest.raises(typer.Exit):
        verb(write(folder, content), dry_run=True)
    shown = capsys.readouterr().out
    assert "start_from: runs/nowhere is no saved model" in shown
    assert "teacher: " in shown
    assert "is no SentenceTransformer" in shown
    assert "24 examples" in shown, "the rest is told all the same"
    content |= {"start_from": "smollm2-135m"}
    with pytest.raises(typer.Exit):
        verb(write(folder, content), dry_run=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert "start_from: smollm2-135m is a backbone, no trained model; start_from: shipped is the model" in shown
    content |= {"start_from": None, "loss": {"teacher": "all-minilm-l6-v2"}}

    def missing() -> Path:
        raise GircseError("all-minilm-l6-v2 needs a package")

    monkeypatch.setattr("gircse.train.plan.minilm_folder", missing)
    with pytest.raises(GircseError, match="needs a package"):
        plan_training(load_recipe(write(folder, content)))


def test_a_dry_run_refuses_a_start_that_the_run_would_refuse(
    folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same words, and the model that ships too."""
    saved = folder / "saved"
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    GIRCSE.from_backbone(str(backbone), num_steps=2, lora=lora, device="cpu").save_pretrained(str(saved))
    monkeypatch.setattr("gircse.train.start.pretrained_path", lambda: str(saved))
    monkeypatch.setattr("gircse.model.pretrained_path", lambda: str(saved))
    content, other = values(folder, backbone), tiny_backbone(folder / "other", seed=5)
    for start in (str(saved), "shipped"):
        for changes, message in (
            (
                {"lora": {"r": 3, "alpha": 4}},
                r"LoRA layers of .* \[\(2, 4, 0.0\)\].* make them equal",
            ),
            ({"lora": None}, "make them equal"),
            ({"backbone": str(other)}, "name the same backbone"),
        ):
            recipe = load_recipe(write(folder, content | {"start_from": start} | changes))
            with pytest.raises(GircseError, match=message):
                plan_training(recipe)
            with pytest.raises(GircseError, match=message):
                make_model(recipe)
        assert plan_training(load_recipe(write(folder, content | {"start_from": start}))).steps == 6
    with pytest.raises(GircseError, match="it has no gircse_config"):
        plan_training(load_recipe(write(folder, content | {"start_from": str(backbone)})))
