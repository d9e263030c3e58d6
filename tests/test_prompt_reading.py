"""How a prompt is read: which tokens see which, which states count, what a checkpoint keeps of it. Tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from gircse.decoders import Decoder
from gircse.errors import GircseError, UnsupportedBackboneError
from gircse.losses import ICRLoss
from gircse.model import GIRCSE
from gircse.refiner import PromptReading, recompute_states, refine
from tests.tiny import FAMILIES, random_batch, relative_error, tiny_model

KINDS = [("prompt_mean", "causal"), ("last", "bidirectional"), ("prompt_mean", "bidirectional")]
READINGS = [PromptReading(mean=True), PromptReading("bidirectional"), PromptReading("bidirectional", mean=True)]
TEXTS = ["a cat", "some dogs ran far away over the hills", "is it", "a cat sat", "what would they say to that"]


def two_sided(family: str, ids: torch.Tensor) -> torch.Tensor:
    """States (N, d) of an unpadded row under a mask of zeros, which hides nothing from anyone."""
    transformer = Decoder.from_model(tiny_model(family)).transformer
    mask = torch.zeros(1, 1, len(ids), len(ids))
    return transformer(input_ids=ids[None], attention_mask=mask, use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_sees_every_token_and_no_padding(family: str) -> None:
    """Against the family's own forward pass of each row alone; rows fit into every window, so that all is visible."""
    lengths = [5, 3, 4] if "sliding" in family or family.startswith("gemma") else [9, 3, 6]
    for side in ("left", "right"):
        ids, mask = random_batch(lengths, side=side)
        with torch.no_grad():
            decoder = Decoder.from_model(tiny_model(family))
            for mean in (False, True):
                for tokens in (None, 8):
                    reading = PromptReading("bidirectional", mean)
                    found = refine(decoder, ids, mask, num_steps=0, reading=reading, prompt_tokens=tokens)
                    for row in range(len(ids)):
                        states = two_sided(family, ids[row][mask[row].bool()])
                        expected = states.mean(dim=0) if mean else states[-1]
                        torch.testing.assert_close(found[row, 0], expected, rtol=1e-4, atol=1e-5)


def test_the_mean_is_over_the_tokens_of_a_causal_prompt() -> None:
    ids, mask = random_batch([9, 3, 6], side="right")
    decoder = Decoder.from_model(tiny_model())
    with torch.no_grad():
        found = refine(decoder, ids, mask, num_steps=0, reading=PromptReading(mean=True), prompt_tokens=8)
        for row in range(3):
            tokens = ids[row][mask[row].bool()]
            prefixes = [
                refine(decoder, tokens[None, :n], torch.ones(1, n), num_steps=0) for n in range(1, len(tokens) + 1)
            ]
            torch.testing.assert_close(found[row, 0], torch.cat(prefixes)[:, 0].mean(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reading", READINGS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_soft_tokens_after_any_reading_equal_the_plain_loop(family: str, reading: PromptReading, side: str) -> None:
    """Values at inference and in training, and gradients; rows fit into every window."""
    lengths = [2, 1, 2] if "sliding" in family or family.startswith("gemma") else [9, 3, 6]
    model = tiny_model(family)
    decoder = Decoder.from_model(model)
    ids, mask = random_batch(lengths, side=side)
    expected = recompute_states(decoder, ids, mask, num_steps=3, reading=reading)
    with torch.no_grad():
        assert not torch.allclose(expected, refine(decoder, ids, mask, num_steps=3), rtol=1e-3), "the reading counts"
        for tokens in (None, 8):
            found = refine(decoder, ids, mask, num_steps=3, reading=reading, prompt_tokens=tokens)
            assert relative_error(found, expected) <= 1e-4
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)
    states = refine(decoder, ids, mask, num_steps=3, reading=reading, prompt_tokens=8)
    assert relative_error(states, expected) <= 1e-4
    found = torch.autograd.grad((states * weights).sum(), parameters, allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert relative_error(ours, theirs) <= 1e-4


@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize(("pooling", "attention"), KINDS)
def test_same_text_same_vector_in_any_batch_and_after_loading(
    backbone: Path, tmp_path: Path, pooling: str, attention: str, num_steps: int
) -> None:
    options = {"num_steps": num_steps, "max_seq_length": 60, "device": "cpu"}
    plain = torch.tensor(GIRCSE.from_backbone(str(backbone), **options).encode(TEXTS))
    model = GIRCSE.from_backbone(str(backbone), pooling=pooling, attention=attention, **options)
    vectors = torch.tensor(model.encode(TEXTS))
    assert F.cosine_similarity(vectors, plain).max() < 0.999, "the setting changes every vector"
    for index, text in enumerate(TEXTS):
        torch.testing.assert_close(torch.tensor(model.encode(text)), vectors[index], rtol=1e-4, atol=1e-5)
    # An instruction that all rows share may not be computed once for all: its states depend on the text, or count.
    under = torch.tensor(model.encode(TEXTS, prompt="find alike: "))
    for index, text in enumerate(TEXTS):
        alone = torch.tensor(model.encode("find alike: " + text))
        torch.testing.assert_close(alone, under[index], rtol=1e-4, atol=1e-5)
    model.save_pretrained(str(tmp_path / "saved"))
    kept = json.loads((tmp_path / "saved" / "gircse_config.json").read_text())["refinement"]
    assert (kept["pooling"], kept["attention"]) == (pooling, attention)
    loaded = GIRCSE(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(torch.tensor(loaded.encode(TEXTS)), vectors)


@pytest.mark.parametrize(("pooling", "attention"), KINDS)
def test_all_calls_read_a_prompt_alike(backbone: Path, pooling: str, attention: str) -> None:
    """Each K from one run, each by itself, rows with different K, and what soft tokens are made of."""
    model = GIRCSE.from_backbone(str(backbone), num_steps=3, device="cpu")
    causal = model.explain(TEXTS[1], num_steps=1)[0]
    model.encoder.configure(pooling=pooling, attention=attention)
    steps = torch.tensor(model.encode_steps(TEXTS))
    for k in (1, 2, 3):
        torch.testing.assert_close(
            torch.tensor(model.encode(TEXTS, num_steps=k)), steps[:, k - 1], rtol=1e-4, atol=1e-5
        )
    states = model.encode_states(TEXTS)
    pooled = states[:, 3] if pooling == "last" else states.mean(dim=1)
    torch.testing.assert_close(pooled, steps[:, 2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[:, 0], torch.tensor(model.encode(TEXTS, num_steps=0)), rtol=1e-4, atol=1e-5)
    features = model.preprocess(TEXTS)
    with torch.no_grad():
        own = model.encoder(features, num_steps=[0, 1, 2, 3, 1])["sentence_embedding"]
    expected = torch.stack([states[0, 0], *(steps[row, k - 1] for row, k in ((1, 1), (2, 2), (3, 3), (4, 1)))])
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    made = model.explain(TEXTS[1], num_steps=1)[0]
    assert made.entropy != pytest.approx(causal.entropy, rel=1e-4), "the first soft token is written by what h_0 is now"


def test_a_checkpoint_without_the_key_is_causal(backbone: Path, tmp_path: Path) -> None:
    """Models saved before there was a choice, the one that ships among them, must not change."""
    model = GIRCSE.from_backbone(str(backbone), num_steps=2, device="cpu")
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "gircse_config.json"
    values = json.loads(path.read_text())
    assert values["refinement"].pop("attention") == "causal"
    path.write_text(json.dumps(values))
    loaded = GIRCSE(str(tmp_path), device="cpu")
    assert loaded.encoder.refinement == model.encoder.refinement
    values["refinement"]["attention"] = "sideways"
    path.write_text(json.dumps(values))
    with pytest.raises(GircseError, match="attention must be one of causal, bidirectional"):
        GIRCSE(str(tmp_path), device="cpu")


def test_families_without_a_test_are_refused() -> None:
    model = tiny_model()
    model.config.model_type = model.model.config.model_type = "llama-of-tomorrow"  # type: ignore[union-attr]
    ids, mask = random_batch([4])
    with pytest.raises(UnsupportedBackboneError, match="llama-of-tomorrow; use attention: causal"):
        refine(Decoder.from_model(model), ids, mask, num_steps=0, reading=PromptReading("bidirectional"))


@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize(("pooling", "attention"), KINDS)
def test_a_model_is_trained_through_what_it_reads(backbone: Path, pooling: str, attention: str, num_steps: int) -> None:
    """Gradients agree with a finite difference."""
    model = GIRCSE.from_backbone(str(backbone), num_steps=num_steps, full_finetune=True, device="cpu")
    model.encoder.configure(pooling=pooling, attention=attention)
    loss = ICRLoss(model, 0.5)
    batch = [model.preprocess(TEXTS[:2]), model.preprocess(TEXTS[2:4])]
    loss(batch).backward()
    parameter = model.encoder.backbone.model.layers[0].self_attn.v_proj.weight  # type: ignore[union-attr]
    assert parameter.grad is not None
    direction, step, values = parameter.grad / parameter.grad.norm(), 1e-2, []
    with torch.no_grad():
        for sign in (1, -1):
            parameter.add_(direction, alpha=sign * step)
            values.append(float(loss(batch)))
            parameter.add_(direction, alpha=-sign * step)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(parameter.grad.norm()), rel=0.05)
