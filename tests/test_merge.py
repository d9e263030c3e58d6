"""A merged model's weights are the mean of its parts', and parts without a mean are refused. Tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from typer.testing import CliRunner

from gircse.cli import app
from gircse.errors import GircseError, UsageError
from gircse.merge import merge_models
from gircse.model import GIRCSE
from tests.tiny import tiny_backbone

TEXTS = ["a cat", "some dogs run"]


def saved(folder: Path, backbone: Path, seed: int, r: int = 2, **options: Any) -> str:
    """A model with an adapter, or all weights, that are the seed's."""
    torch.manual_seed(seed)
    if not options.get("full_finetune"):
        options["lora"] = LoraConfig(r=r, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    model = GIRCSE.from_backbone(str(backbone), device="cpu", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(str(folder))
    return str(folder)


def factors(model: GIRCSE) -> torch.Tensor:
    """A and B of all layers, in one row."""
    return torch.cat([p.flatten() for name, p in model.encoder.backbone.named_parameters() if "lora_" in name])


def test_adapters_are_averaged_factor_by_factor(tmp_path: Path, backbone: Path) -> None:
    a, b = saved(tmp_path / "a", backbone, 1, num_steps=3), saved(tmp_path / "b", backbone, 2)
    merged = merge_models([a, b], [3, 1])
    expected = 0.75 * factors(GIRCSE(a, device="cpu")) + 0.25 * factors(GIRCSE(b, device="cpu"))
    torch.testing.assert_close(factors(merged), expected)
    assert merged.num_steps == 3, "of the first"
    merged.save_pretrained(str(tmp_path / "c"))
    again = GIRCSE(str(tmp_path / "c"), device="cpu").encode(TEXTS)
    torch.testing.assert_close(torch.tensor(again), torch.tensor(merged.encode(TEXTS)))
    alone = torch.tensor(GIRCSE(a, device="cpu").encode(TEXTS))
    assert not torch.allclose(torch.tensor(again), alone, atol=1e-3)
    torch.testing.assert_close(torch.tensor(merge_models([a, a, a]).encode(TEXTS)), alone, rtol=1e-4, atol=1e-5)


def test_whole_weights_are_averaged(tmp_path: Path, backbone: Path) -> None:
    places = [saved(tmp_path / str(seed), backbone, seed, full_finetune=True) for seed in (1, 2)]
    models = [dict(GIRCSE(place, device="cpu").named_parameters()) for place in places]
    for name, parameter in merge_models(places).named_parameters():
        torch.testing.assert_close(parameter, (models[0][name] + models[1][name]) / 2)


def test_what_has_no_mean_is_refused(tmp_path: Path, backbone: Path) -> None:
    first = saved(tmp_path / "first", backbone, 1)
    others = {
        "different backbones": saved(tmp_path / "x", tiny_backbone(tmp_path / "qwen2", "qwen2"), 1),
        "differ in pooling: mean and last": saved(tmp_path / "y", backbone, 1, pooling="last"),
        "differ in the scaling of LoRA": saved(tmp_path / "z", backbone, 1, r=4),
        "differ in weights: adapter and full": saved(tmp_path / "w", backbone, 1, full_finetune=True),
    }
    for message, other in others.items():
        with pytest.raises(GircseError, match=message):
            merge_models([first, other])
    GIRCSE.from_backbone(str(backbone)).save_pretrained(str(tmp_path / "bare"))
    with pytest.raises(GircseError, match="no trained weights"):
        merge_models([str(tmp_path / "bare"), first])
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(UsageError, match="2 models need 2 weights above 0"):
            merge_models([first, first], weights)
    with pytest.raises(UsageError, match="two models or more"):
        merge_models([first])


def test_the_verb_saves_a_model_that_says_what_it_is_made_of(tmp_path: Path, backbone: Path) -> None:
    a, b = saved(tmp_path / "a", backbone, 1), saved(tmp_path / "b", backbone, 2)
    call = ["merge", a, b, "-o", str(tmp_path / "c"), "--json"]
    done = CliRunner().invoke(app, [*call, "--weights", "1,3"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["models"] == [{"model": a, "weight": 0.25}, {"model": b, "weight": 0.75}]
    card = (tmp_path / "c" / "README.md").read_text()
    assert f"| {b} | 0.75 |" in card
    assert [part["weight"] for part in GIRCSE(str(tmp_path / "c")).encoder.training_facts["merged"]] == [0.25, 0.75]
    for more, message in ((["--weights", "1,3"], "is there already"), (["--weights", "x"], "numbers separated")):
        call[4] = str(tmp_path / "c") if "already" in message else str(tmp_path / "d")
        refused = CliRunner().invoke(app, [*call, *more])
        assert refused.exit_code != 0
        assert message in str(refused.exception)


def test_a_wrong_call_of_the_verb_fetches_no_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verb = sys.modules["gircse.cli.merge"]  # gircse.cli.merge itself is the function
    monkeypatch.setattr(verb, "prepare_backbone", lambda *_: pytest.fail("fetched"))
    two = ["runs/one", "runs/two"]
    for call in (two[:1], [*two, "--weights", "1"], [*two, "--weights", "1,0"]):
        result = CliRunner().invoke(app, ["merge", *call, "-o", str(tmp_path / "out")])
        assert isinstance(result.exception, UsageError), call
