"""Shared heads, attention in float32 without AMX, and padding that sees something: the same numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.import_utils import is_torch_greater_or_equal

from gircse import GIRCSE
from gircse import attention as attention_module
from gircse.attention import ATTENTION, attention_dtype, sdpa_float32_on_cpu
from gircse.refiner import refine

TEXTS = ["a cat", "a much longer text about dogs and cats", "x"]


RECENT = is_torch_greater_or_equal("2.13", accept_dev=True)


def load(backbone: Path, **options: object) -> GIRCSE:
    return GIRCSE.from_backbone(str(backbone), num_steps=3, device="cpu", dtype=torch.bfloat16, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_attention_is_computed_in_float32_without_amx(
    backbone: Path, amx: bool, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "_has_amx", lambda: amx)
    if not grouped:  # as in families whose layers `gircse.fast.grouped_steps` does not know
        monkeypatch.setattr("gircse.refiner.takes_groups", lambda decoder: False)
    seen = set()
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        # first, whether heads stand where queries do
        seen.add((key.shape[2] > query.shape[2] and query.shape[1] == key.shape[1], query.dtype, key.dtype))
        return plain(query, key, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model = load(backbone)
    model.encode(TEXTS)
    dtype = torch.bfloat16 if amx else torch.float32
    if RECENT:
        steps = (True, torch.bfloat16, torch.bfloat16)
        assert seen == {(False, dtype, dtype), steps}, "prompts in either dtype, single queries in theirs"
    else:
        assert {given for _, *both in seen for given in both} == {dtype}
    seen.clear()
    model.train()(model.encoder.preprocess(TEXTS))
    assert seen
    assert {dtype for _, *dtypes in seen for dtype in dtypes} == {torch.float32}, "AMX does not make training faster"


@pytest.mark.parametrize("masked", ["bool", "added"])
def test_shared_keys_and_values_are_not_copied_for_every_head(masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module: Any = SimpleNamespace(num_key_value_groups=3, training=False, is_causal=True)
    states = [torch.randn(4, heads, length, 8, requires_grad=True) for heads, length in ((6, 5), (2, 7), (2, 7))]
    mask = torch.ones(4, 1, 5, 7, dtype=torch.bool).tril(2)
    mask[1, :, :, :2] = False  # the first query still sees a position: what sees none is read by nobody
    if masked == "added":
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -1e9)
    weights = torch.randn(4, 5, 6, 8)
    results = []
    computes: list[Any] = [sdpa_attention_forward, sdpa_float32_on_cpu]
    for compute in computes:
        out, _ = compute(module, *states, mask, scaling=0.3)
        results.append((out.detach(), *torch.autograd.grad((out * weights).sum(), states)))
        if RECENT:
            monkeypatch.setattr("transformers.integrations.sdpa_attention.repeat_kv", None)  # a call would fail
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not RECENT, reason="older versions of PyTorch compute it as transformers does")
@pytest.mark.parametrize("masked", [None, "bool", "added", "by head"])
@torch.inference_mode()
def test_a_single_query_of_shared_heads(masked: str | None) -> None:
    """In bfloat16: the same as transformers' own in float32, with one product for the heads that share keys."""
    torch.manual_seed(0)
    module: Any = SimpleNamespace(num_key_value_groups=3, training=False, is_causal=True)
    states = [torch.randn(4, heads, length, 8).bfloat16() for heads, length in ((6, 1), (2, 7), (2, 7))]
    mask = torch.ones(4, 1, 1, 7, dtype=torch.bool)
    mask[1, :, :, :3] = False
    if masked in ("added", "by head"):
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -1e9)
    if masked == "by head":  # as ALiBi has it: there heads cannot be taken for queries
        mask = mask - torch.arange(6).view(1, 6, 1, 1) * torch.arange(7)
    mask = None if masked is None else mask if masked == "bool" else mask.bfloat16()
    query, key, value = states
    found, _ = sdpa_float32_on_cpu(module, query, key, value, mask, scaling=0.3)
    wide = mask.float() if mask is not None and mask.is_floating_point() else mask
    expected, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), wide, scaling=0.3)
    assert found.dtype == torch.bfloat16
    assert found.shape == (4, 1, 6, 8)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("training", [False, True])
def test_keys_are_kept_in_the_dtype_that_steps_compute_in(
    backbone: Path, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "_has_amx", lambda: False)
    transformer = load(backbone).train(training).encoder.decoder.transformer
    config: Any = transformer.config
    states = torch.zeros(1, 32, dtype=torch.bfloat16)
    narrow = torch.bfloat16 if RECENT and not training else torch.float32
    with torch.inference_mode(not training):
        assert attention_dtype(transformer, states) == narrow
        monkeypatch.setattr(config, "num_key_value_heads", config.num_attention_heads)
        assert attention_dtype(transformer, states) == torch.float32, "heads of their own: faster in float32"


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
