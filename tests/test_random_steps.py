"""The K of a batch is drawn from a range, as the recipe says, and its cost is estimated likewise."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest

from gircse.errors import GircseError
from gircse.train.callbacks import RandomSteps
from tests.training_recipe import values, write, write_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    return tmp_path


def test_small_steps_can_be_drawn_more_often(folder: Path, backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = SimpleNamespace(num_steps=5)
    drawn = {}
    for distribution in ("uniform", "log_uniform"):
        draw, found = RandomSteps(model, (1, 20), 7, distribution), []  # type: ignore[arg-type]
        for step in range(2000):
            draw.on_step_begin(None, SimpleNamespace(global_step=step), None)
            found.append(model.num_steps)
        drawn[distribution] = found
    assert all(set(found) == set(range(1, 21)) for found in drawn.values())
    assert abs(mean(drawn["uniform"]) - 10.5) < 0.5
    assert abs(mean(drawn["log_uniform"]) - 20 / sum(1 / k for k in range(1, 21))) < 0.5, "5.6"
    content = values(folder, backbone)
    content["training"] |= {"random_steps": [1, 20], "steps_distribution": "log_uniform"}
    verb = import_module("gircse.cli.train").train
    flops = []
    for distribution in ("log_uniform", "uniform"):
        content["training"]["steps_distribution"] = distribution
        verb(write(folder, content), dry_run=True, json_output=True)
        flops.append(json.loads(capsys.readouterr().out)["flops_per_step"])
    assert flops[0] < flops[1]
    verb(write(folder, content), dry_run=True, changes=["training.steps_distribution=log_uniform"])
    assert "K 1 to 20, each in proportion to 1/K" in capsys.readouterr().out
    with pytest.raises(GircseError, match=r"steps_distribution is that of training.random_steps"):
        verb(
            write(folder, content),
            dry_run=True,
            changes=["training.random_steps=null", "training.steps_distribution=log_uniform"],
        )
