"""The refinement loop against a plain loop that sends the whole sequence through the Hugging Face model each step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gircse.decoders import PARITY_TESTED, Decoder
from gircse.errors import UsageError
from gircse.pooling import keep_finished, pool_steps
from gircse.prompts import plan_prompts, shared_prefix
from gircse.refiner import refine
from gircse.soft_tokens import Vocabulary
from tests.tiny import FAMILIES, random_batch, relative_error, tiny_model

STEPS = 4
LENGTHS = [9, 3, 12, 1]


def plain_states(model: PreTrainedModel, ids: Tensor, num_steps: int, temperature: float) -> Tensor:
    """h_0..h_K of one unpadded row, through the whole model's own forward with nothing of ours. (K + 1, d)."""
    embeddings = model.get_input_embeddings()
    vocabulary = torch.arange(embeddings.num_embeddings)  # type: ignore[union-attr]
    inputs = embeddings(ids[None])
    states = []
    for step in range(num_steps + 1):
        out = model(inputs_embeds=inputs, output_hidden_states=True, use_cache=False)
        states.append(out.hidden_states[-1][0, -1])
        if step < num_steps:
            soft = F.softmax(out.logits[0, -1] / temperature, dim=-1) @ embeddings(vocabulary)
            inputs = torch.cat([inputs, soft.view(1, 1, -1)], dim=1)
    return torch.stack(states)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_equal_the_recompute_loop(family: str, side: str) -> None:
    model = tiny_model(family)
    ids, mask = random_batch(LENGTHS, side=side)
    with torch.no_grad():
        states = refine(Decoder.from_model(model), ids, mask, num_steps=STEPS, temperature=0.7)
        for row in range(len(LENGTHS)):
            expected = plain_states(model, ids[row][mask[row].bool()], STEPS, 0.7)
            assert relative_error(states[row], expected) <= 1e-4
            assert relative_error(states[row, -1], states[row, 0]) > 1e-2, (
                "the steps must not all be the prompt's state"
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_recompute_loop(family: str) -> None:
    ids, mask = random_batch(LENGTHS, side="right")
    weights = torch.randn(len(LENGTHS), STEPS, 32, generator=torch.Generator().manual_seed(3))

    ours = tiny_model(family)
    states = refine(Decoder.from_model(ours), ids, mask, num_steps=STEPS)
    (pool_steps(states, "mean") * weights).sum().backward()

    plain = tiny_model(family)
    rows = [plain_states(plain, ids[row][mask[row].bool()], STEPS, 1.0) for row in range(len(LENGTHS))]
    (pool_steps(torch.stack(rows), "mean") * weights).sum().backward()

    compared = 0
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None or not theirs.grad.abs().max() > 1e-7:
            continue
        assert mine.grad is not None, name
        assert relative_error(mine.grad, theirs.grad) <= 1e-4, name
        compared += 1
    assert compared >= 8


@pytest.mark.parametrize("num_steps", [0, STEPS])
@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "mistral-sliding", "mistral-wide", "gemma2-softcap", "gpt2-learned-positions"]
)
def test_grouped_prompt_passes_and_a_shared_prefix_change_nothing(family: str, num_steps: int) -> None:
    ids, mask = random_batch([14, 9, 20, 12, 8, 17, 4, 1], side="right")
    ids[:6, :7] = ids[0, :7].clone()  # six rows begin alike: an instruction
    weights = torch.randn(8, num_steps + 1, 32, generator=torch.Generator().manual_seed(3))
    results, gradients = [], []
    for tokens in (None, 40):
        model = tiny_model(family)
        states = refine(Decoder.from_model(model), ids, mask, num_steps=num_steps, prompt_tokens=tokens)
        (states * weights).sum().backward()
        results.append(states.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert relative_error(results[1], results[0]) <= 1e-5
    assert relative_error(gradients[1], gradients[0]) <= 1e-4
    with torch.no_grad():  # several groups written into one preallocated cache
        states = refine(Decoder.from_model(tiny_model(family)), ids, mask, num_steps=num_steps, prompt_tokens=40)
    assert relative_error(states, results[0]) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma2-softcap", "gpt2-learned-positions"])
def test_rows_with_a_k_of_their_own_equal_runs_of_that_k(family: str) -> None:
    own = [2, 0, 4, 1, 4, 3]
    ids, mask = random_batch([14, 9, 20, 12, 8, 17], side="left")
    results, gradients = [], []
    for ragged in (True, False):
        model = tiny_model(family)
        if ragged:
            states = refine(Decoder.from_model(model), ids, mask, num_steps=own, prompt_tokens=40)
        else:  # one run for each row
            rows = [
                refine(Decoder.from_model(model), ids[[row]], mask[[row]], num_steps=steps)[0]
                for row, steps in enumerate(own)
            ]
            states = torch.stack([F.pad(row, (0, 0, 0, max(own) + 1 - len(row))) for row in rows])
        states.square().sum().backward()
        results.append(states.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert relative_error(results[0], results[1]) <= 1e-5
    assert relative_error(gradients[0], gradients[1]) <= 1e-4
    with torch.no_grad():  # the preallocated cache
        states = refine(Decoder.from_model(tiny_model(family)), ids, mask, num_steps=own, prompt_tokens=40)
    assert relative_error(states, results[1]) <= 1e-5
    pooled = keep_finished(pool_steps(states, "mean"), states, own)
    for row, steps in enumerate(own):
        expected = states[row, 1 : steps + 1].mean(dim=0) if steps else states[row, 0]
        assert relative_error(pooled[row, -1], expected) <= 1e-6
    with pytest.raises(UsageError, match="3 numbers for 6 texts"):
        refine(Decoder.from_model(tiny_model(family)), ids, mask, num_steps=[1, 2, 3])


def test_the_shared_prefix_is_found_and_leaves_every_row_a_token() -> None:
    alike = (1, 2, 3, 4, 5, 6, 7, 8)
    texts = [(*alike, 9, 9), (*alike, 3), alike, (*alike, 4, 4, 4), (5, 5)]
    assert shared_prefix(texts) == (alike[:7], {0, 1, 2, 3})
    assert shared_prefix(texts[:3]) == ((), set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_cpus_soft_token_without_gradients_is_the_same(dtype: torch.dtype, temperature: float) -> None:
    """There the softmax is taken in the dtype of the logits, which must not be one in 16 bits."""
    model: Any = tiny_model("llama")
    vocabulary = Decoder.from_model(model.to(dtype)).vocabulary
    hidden = 5 * torch.randn(7, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = vocabulary.soft_token(hidden, temperature).detach()
    with torch.no_grad():
        found = vocabulary.soft_token(hidden, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_every_listed_family_is_in_the_matrix() -> None:
    assert {str(make().model_type) for make in FAMILIES.values()} == PARITY_TESTED


@pytest.mark.parametrize(("head", "table"), [(10, 12), (12, 10), (11, 11)])
def test_a_head_and_a_table_of_different_lengths_agree_on_what_both_have(head: int, table: int) -> None:
    torch.manual_seed(0)
    vocabulary = Vocabulary(nn.Linear(8, head, bias=False), nn.Embedding(table, 8))
    hidden, common = torch.randn(3, 8), min(head, table)
    weights = torch.softmax(vocabulary.logits(hidden), dim=-1)[:, :common]
    torch.testing.assert_close(vocabulary.soft_token(hidden), weights @ vocabulary.embedding.weight[:common])


def test_a_prefix_is_shared_only_where_it_saves_enough() -> None:
    ids = torch.arange(3, 15).repeat(6, 1)
    ids[:, 8:] += torch.arange(6).unsqueeze(1)
    mask = torch.ones_like(ids)
    assert plan_prompts(ids, mask, 1000)[0].prefix == tuple(range(3, 11))
    assert plan_prompts(ids, mask, 1000, worth=48)[0].prefix == tuple(range(3, 11)), "6 rows of 8 tokens"
    assert plan_prompts(ids, mask, 1000, worth=49)[0].prefix == ()


def test_soft_tokens_of_some_rows_at_a_time_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = Decoder.from_model(tiny_model("llama")).vocabulary
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    seen = []
    plain = Vocabulary.logits
    monkeypatch.setattr(Vocabulary, "logits", lambda *args: seen.append(len(args[1])) or plain(*args))
    with torch.no_grad():
        expected = vocabulary.soft_token(hidden, 0.7)
        monkeypatch.setattr("gircse.soft_tokens.ROWS_AT_A_TIME", 2)
        torch.testing.assert_close(vocabulary.soft_token(hidden, 0.7), expected)
    torch.testing.assert_close(vocabulary.soft_token(hidden.requires_grad_(), 0.7), expected)
    assert seen == [5, 2, 2, 1, 5], "with gradients all rows at once, as everything is kept anyway"
