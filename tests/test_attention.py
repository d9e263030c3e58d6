"""Attention in float32 without AMX, and padding that sees something: the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gircse import GIRCSE
from gircse import attention as attention_module
from gircse.attention import ATTENTION
from gircse.refiner import refine

TEXTS = ["a cat", "a much longer text about dogs and cats", "x"]


def load(backbone: Path, **options: object) -> GIRCSE:
    return GIRCSE.from_backbone(str(backbone), num_steps=3, device="cpu", dtype=torch.bfloat16, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("amx", [False, True])
def test_attention_is_computed_in_float32_without_amx(
    backbone: Path, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "_has_amx", lambda: amx)
    seen = set()
    plain = attention_module.sdpa_attention_forward

    def spy(module: object, query: torch.Tensor, key: torch.Tensor, *args: object, **options: object) -> object:
        seen.add((query.dtype, key.dtype))
        return plain(module, query, key, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(attention_module, "sdpa_attention_forward", spy)
    model = load(backbone)
    model.encode(TEXTS)
    dtype = torch.bfloat16 if amx else torch.float32
    assert seen == {(dtype, dtype)}
    seen.clear()
    model.train()(model.encoder.preprocess(TEXTS))
    assert seen == {(torch.float32, torch.float32)}, "AMX does not make training faster"


def test_gradients_are_those_of_plain_attention(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, gradients = load(backbone, full_finetune=True), []
    features = model.encoder.preprocess(TEXTS)
    for amx in (False, True):
        monkeypatch.setattr(attention_module, "_has_amx", lambda amx=amx: amx)
        model.zero_grad()
        states = refine(model.encoder.decoder, features["input_ids"], features["attention_mask"], num_steps=3)
        (states.float() * torch.arange(states.shape[-1])).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0
    assert float(torch.nn.functional.cosine_similarity(*gradients, dim=0)) > 0.99


def test_another_attention_stays_what_was_asked_for(backbone: Path) -> None:
    assert load(backbone).encoder.backbone.config._attn_implementation == ATTENTION
    eager = load(backbone, attn_implementation="eager")
    assert eager.encoder.backbone.config._attn_implementation == "eager"
    assert eager.encode(TEXTS).shape == (3, eager.get_embedding_dimension())


def test_padding_that_sees_something_changes_no_token(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where rows that see nothing have made gradients that are no numbers."""
    mask = torch.tensor([[[[False, False], [False, True]], [[True, False], [True, True]]]])
    assert attention_module.show_something(mask).tolist() == [
        [[[True, True], [False, True]], [[True, False], [True, True]]]
    ]
    model = GIRCSE.from_backbone(str(backbone), num_steps=3, device="cpu")
    expected, gradients = [], []
    original, shown = attention_module.sdpa_mask, []

    def opened(*args: Any, **options: Any) -> Any:
        mask = original(*args, **options)
        shown.append(mask is not None and not bool(mask.any(dim=-1).all()))
        return mask if mask is None else attention_module.show_something(mask)

    for masks in (original, opened):
        monkeypatch.setattr(attention_module, "sdpa_mask", masks)
        embeddings = model.encoder.decoder.vocabulary.embedding.weight.requires_grad_()
        embeddings.grad = None
        features = model.encoder.preprocess(TEXTS)
        states = refine(model.encoder.decoder, features["input_ids"], features["attention_mask"], num_steps=3)
        (states * torch.arange(states.shape[-1])).sum().backward()
        expected.append(states.detach())
        assert embeddings.grad is not None
        gradients.append(embeddings.grad.clone())
    assert any(shown), "there was padding that saw nothing"
    torch.testing.assert_close(*expected)
    torch.testing.assert_close(*gradients)
