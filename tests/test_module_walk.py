"""Before every `encode` the model is looked at, and changed only where it is not yet as it should be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from gircse import GIRCSE
from gircse.fast.module_walk import all_modules, are_in_mode, is_wholly_on

CPU = torch.device("cpu")


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where models are moved to."""
    calls: list[Any] = []
    monkeypatch.setattr(SentenceTransformer, "to", lambda self, device: calls.append(device))
    return calls


def test_all_modules_are_seen(model: GIRCSE) -> None:
    assert set(all_modules(model)) == set(model.modules())
    shared = nn.Linear(1, 1)
    assert all_modules(nn.ModuleList([shared, shared])).count(shared) == 2


@pytest.mark.parametrize("mode", [True, False])
def test_one_module_in_another_mode_is_enough_to_set_all(
    model: GIRCSE, mode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    train = nn.Module.train
    monkeypatch.setattr(nn.Module, "train", lambda self, mode=True: calls.append(mode) or train(self, mode))
    model.train(mode)
    assert are_in_mode(model, training=mode)
    calls.clear()
    assert model.train(mode) is model
    assert not calls
    layer = model.encoder.backbone.get_submodule("model.layers.1.mlp")
    layer.training = not mode
    assert not are_in_mode(model, training=mode)
    model.train(mode)
    assert calls
    assert layer.training is mode
    assert {module.training for module in model.modules()} == {mode}


def test_what_is_trained_embeds_in_evaluation_mode(model: GIRCSE) -> None:
    expected = model.encode("a cat")
    model.train()
    assert (model.encode("a cat") == expected).all()
    assert are_in_mode(model, training=False)


def test_a_model_that_is_where_it_should_be_is_not_moved(model: GIRCSE, moves: list[Any]) -> None:
    for device in (None, "cpu", CPU, "cpu:0"):
        assert model._resolve_inference_device(device) == CPU
    assert not moves


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_part_elsewhere_moves_all(model: GIRCSE, kind: str, moves: list[Any]) -> None:
    elsewhere = torch.empty(1, device="meta")
    layer = model.encoder.backbone.get_submodule("model.layers.1")
    if kind == "parameter":
        layer.register_parameter("one_more", nn.Parameter(elsewhere))
    else:
        layer.register_buffer("one_more", elsewhere)
    assert not is_wholly_on(model, CPU)
    model._resolve_inference_device("cpu")
    assert moves == ["cpu"]
    model._resolve_inference_device("meta")
    assert moves == ["cpu", "meta"]
