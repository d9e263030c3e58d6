"""Encoder-only baselines: which tokens see which, which states count, what a checkpoint keeps of it. Tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from gircse.checkpoint import RefinementConfig
from gircse.decoders import Decoder
from gircse.errors import GircseError, UnsupportedBackboneError, UsageError
from gircse.losses import ICRLoss
from gircse.model import GIRCSE
from gircse.refiner import encode_prompt, refine
from tests.tiny import FAMILIES, random_batch, tiny_model

KINDS = [("prompt_mean", "causal"), ("last", "bidirectional"), ("prompt_mean", "bidirectional")]
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
            for pooling in ("last", "prompt_mean"):
                for tokens in (None, 8):
                    found = encode_prompt(
                        decoder, ids, mask, pooling=pooling, attention="bidirectional", prompt_tokens=tokens
                    )
                    for row in range(len(ids)):
                        states = two_sided(family, ids[row][mask[row].bool()])
                        expected = states[-1] if pooling == "last" else states.mean(dim=0)
                        torch.testing.assert_close(found[row, 0], expected, rtol=1e-4, atol=1e-5)


def test_the_mean_is_over_the_tokens_of_a_causal_prompt() -> None:
    ids, mask = random_batch([9, 3, 6], side="right")
    decoder = Decoder.from_model(tiny_model())
    with torch.no_grad():
        found = encode_prompt(decoder, ids, mask, pooling="prompt_mean", attention="causal", prompt_tokens=8)
        for row in range(3):
            tokens = ids[row][mask[row].bool()]
            prefixes = [
                refine(decoder, tokens[None, :n], torch.ones(1, n), num_steps=0) for n in range(1, len(tokens) + 1)
            ]
            torch.testing.assert_close(found[row, 0], torch.cat(prefixes)[:, 0].mean(dim=0), rtol=1e-4, atol=1e-5)
        last = encode_prompt(decoder, ids, mask, pooling="last", attention="causal")
        torch.testing.assert_close(last, refine(decoder, ids, mask, num_steps=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("pooling", "attention"), KINDS)
def test_same_text_same_vector_in_any_batch_and_after_loading(
    backbone: Path, tmp_path: Path, pooling: str, attention: str
) -> None:
    model = GIRCSE.from_backbone(str(backbone), num_steps=0, max_seq_length=60, device="cpu")
    plain = torch.tensor(model.encode(TEXTS))
    model.encoder.configure(pooling=pooling, attention=attention)
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
def test_there_are_no_refinement_steps(backbone: Path, pooling: str, attention: str) -> None:
    model = GIRCSE.from_backbone(str(backbone), num_steps=0, device="cpu")
    model.encoder.configure(pooling=pooling, attention=attention)
    assert model.encode_states(TEXTS).shape == (len(TEXTS), 1, 32)
    for wrong in (
        lambda: model.encode(TEXTS, num_steps=2),
        lambda: setattr(model, "num_steps", 1),
        lambda: RefinementConfig(num_steps=3, pooling=pooling, attention=attention),
    ):
        with pytest.raises(UsageError, match=r"encoder-only models.*use num_steps 0"):
            wrong()
    assert model.num_steps == 0


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
        encode_prompt(Decoder.from_model(model), ids, mask, pooling="last", attention="bidirectional")


@pytest.mark.parametrize(("pooling", "attention"), KINDS)
def test_a_baseline_is_trained_through_what_it_reads(backbone: Path, pooling: str, attention: str) -> None:
    """Gradients agree with a finite difference."""
    model = GIRCSE.from_backbone(str(backbone), num_steps=0, full_finetune=True, device="cpu")
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
