"""What a teacher has read is read once, however often a run is killed. Tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gircse.train.recipe import load_recipe
from gircse.train.run import train
from gircse.train.teacher import keep_vectors
from tests.training_recipe import values, write, write_rows


class Killed(Exception):
    pass


def killed_at(step: int, logs: list[dict[str, float]]) -> Callable[[dict[str, float]], None]:
    def report(entry: dict[str, float]) -> None:
        if entry["step"] == step:
            raise Killed
        logs.append(entry)

    return report


def test_a_resumed_run_does_not_wait_for_the_teacher_again(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path)
    content: dict[str, Any] = values(tmp_path, backbone) | {"loss": {"teacher": "any"}}
    recipe, calls = load_recipe(write(tmp_path, content)), list[int]()

    def teacher(texts: list[str]) -> np.ndarray:
        calls.append(len(texts))
        return np.random.default_rng(len(calls)).normal(size=(len(texts), 5)).astype(np.float32)  # never twice the same

    monkeypatch.setattr("gircse.train.run.load_teacher", lambda name: teacher)
    output, logs = tmp_path / "out", list[dict[str, float]]()
    with pytest.raises(Killed):
        train(recipe, output, report=killed_at(4, logs))
    assert len(calls) == 2, "one call a source"
    first = logs[-1]
    train(recipe, output, resume=True, report=logs.append)
    assert len(calls) == 2
    again = next(entry for entry in logs[3:] if entry["step"] == first["step"])
    assert again["loss"] == first["loss"], "step 3 came after the checkpoint, and was taken again"
    assert not (output / "checkpoints" / "teacher").exists(), "a finished run keeps nothing of it"


def test_vectors_are_those_of_the_same_texts_and_teacher(tmp_path: Path) -> None:
    def teacher(texts: list[str]) -> np.ndarray:
        return np.array([[len(text)] for text in texts], dtype=np.float32)

    def refuse(texts: list[str]) -> np.ndarray:
        raise AssertionError(texts)

    expected = keep_vectors(teacher, "a", tmp_path)(["x", "yz"])
    assert keep_vectors(refuse, "a", tmp_path)(["x", "yz"]).tolist() == expected.tolist() == [[1], [2]]
    for name, texts in (("a", ["xy", "z"]), ("a", ["x", "yz", ""]), ("b", ["x", "yz"])):
        with pytest.raises(AssertionError):
            keep_vectors(refuse, name, tmp_path)(texts)
    assert not list(tmp_path.glob("*.partial"))
