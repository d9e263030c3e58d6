"""The ablation grid: every run a valid recipe, a failure that does not end it, seeds, runs that go on from others."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from gircse.train.recipe import load_recipe

FOLDER = Path("recipes/ablation")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """recipes/ablation/run.py as a module."""
    spec = importlib.util.spec_from_file_location("ablation_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ablation_run", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def overrides(changes: list[str]) -> dict[str, Any]:
    """As `gircse train --set` reads them."""
    return {key: value for key, _, value in (change.partition("=") for change in changes)}


def test_the_grid_is_made_of_valid_recipes(script: ModuleType) -> None:
    """In the text form in which the script hands the changes over."""
    grid = yaml.safe_load((FOLDER / "grid.yaml").read_text())
    runs = list(script.runs_of(grid, Path("out")))
    loaded = {run.name: load_recipe(FOLDER / "base.yaml", overrides(run.changes)) for run in runs}
    assert list(loaded) == list(grid)
    assert len(set(map(repr, loaded.values()))) == len(grid), "every run differs from every other"
    assert loaded["encoder-only-bidirectional"].refinement().attention == "bidirectional"
    assert loaded["random-steps"].training.random_steps == (1, 5)
    assert loaded["higher-rate"].training.learning_rate == 1e-3
    assert loaded["encoder-only-first"].start_from == "out/encoder-only"
    assert {run.name for run in runs if run.encoder_only} == {n for n, r in loaded.items() if not r.model.num_steps}


def test_every_seed_has_runs_of_its_own(script: ModuleType) -> None:
    grid = {"a": {"model.num_steps": 0}, "b": {"start_from": "{output}/a"}}
    runs = {run.name: overrides(run.changes) for run in script.runs_of(grid, Path("out"), [17, 18])}
    assert list(runs) == ["a-s17", "b-s17", "a-s18", "b-s18"]
    recipe = load_recipe(FOLDER / "base.yaml", runs["b-s18"])
    assert (recipe.seed, recipe.start_from) == (18, "out/a-s18")


def test_a_failure_does_not_end_the_grid(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[tuple[str, ...]] = []

    def gircse(*arguments: str) -> bool:
        called.append(arguments)
        return not any(argument.endswith("stepwise") for argument in arguments)

    monkeypatch.setattr(script, "gircse", gircse)
    only = "encoder-only,stepwise,stepwise+penalty"
    options = ["--data", "d", "--evaluate", "e", "-o", str(tmp_path), "--only", only]
    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == "failed: stepwise (training)", "printed, and the exit code is 1"
    assert [arguments[0] for arguments in called] == ["train", "evaluate", "train", "train", "evaluate", "report"]
