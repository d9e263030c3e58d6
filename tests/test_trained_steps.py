"""Soft tokens by groups of rows in training: values and gradients of transformers' own pass and the recompute loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from peft import LoraConfig
from torch import Tensor

from gircse import refiner
from gircse.adapter import lora_layers
from gircse.decoders import Decoder
from gircse.fast.grouped_steps import GroupedSteps
from gircse.fast.step_graphs import StepGraphs
from gircse.fast.trained_steps import Collected
from gircse.model import GIRCSE
from gircse.refiner import recompute_states, refine
from gircse.train import fused_lora as fused_lora_module
from gircse.train import step_lora
from gircse.train.fused_lora import fused_lora
from tests.tiny import instructed_batch, random_batch, relative_error, tiny_backbone, tiny_model

KNOWN = ["llama", "llama-tied", "llama-scaled-positions", "mistral", "qwen2", "qwen3"]
LENGTHS = [14, 9, 20, 12, 8, 17, 4, 1, 20, 3]


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The groups of every step."""
    groups: list[int] = []
    step = GroupedSteps.next_states
    monkeypatch.setattr(
        GroupedSteps, "next_states", lambda self, tokens: groups.append(len(self._groups)) or step(self, tokens)
    )
    return groups


@pytest.fixture
def plain() -> Iterator[pytest.MonkeyPatch]:
    """A switch: once its `undo` is called soft tokens go by groups, before that through transformers' own pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refiner, "takes_groups", lambda decoder: False)
        yield patch


def weighed(states: Tensor) -> Tensor:
    """A loss in which every number of every state counts."""
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(5))
    return (states.float().tanh() * weights).sum()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-3) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= tolerance * float(gradient.norm()) + 1e-5, name


@pytest.mark.parametrize("shared", [0, 7])
@pytest.mark.parametrize("padding", [0, 512])
@pytest.mark.parametrize("family", KNOWN)
def test_values_and_gradients_of_all_weights(
    family: str,
    padding: int,
    shared: int,
    plain: pytest.MonkeyPatch,
    steps_taken: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refiner, "DECODE_PADDING", padding)
    model = tiny_model(family).train()
    ids, mask = random_batch(LENGTHS, side="right")
    ids[:6, :shared] = ids[0, :shared].clone()  # six rows begin alike: an instruction
    results = []
    for _ in range(2):
        states = refine(Decoder.from_model(model), ids, mask, num_steps=4, temperature=0.7, prompt_tokens=40)
        weighed(states).backward()
        results.append((states.detach(), gradients(model)))
        if len(results) == 1:
            assert not steps_taken
            plain.undo()
    assert len(steps_taken) == 4
    assert (steps_taken[0] > 1) == (padding == 0 or shared > 0)
    assert relative_error(results[1][0], results[0][0]) <= 1e-4
    assert_same_gradients(results[1][1], results[0][1])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=7),
    shared=st.integers(0, 12),
    num_steps=st.integers(1, 4),
    prompt_tokens=st.none() | st.integers(1, 120),
    side=st.sampled_from(["left", "right"]),
)
def test_any_layout_has_the_gradients_of_the_recompute_loop(
    lengths: list[int], shared: int, num_steps: int, prompt_tokens: int | None, side: str
) -> None:
    model = tiny_model("llama")
    ids, mask = instructed_batch(lengths, shared, side=side)
    decoder, results = Decoder.from_model(model), []
    for run in (recompute_states, partial(refine, prompt_tokens=prompt_tokens)):
        states = run(decoder, ids, mask, num_steps=num_steps)
        weighed(states).backward()
        results.append((states.detach(), gradients(model)))
    assert relative_error(results[1][0], results[0][0]) <= 1e-4
    assert_same_gradients(results[1][1], results[0][1])


def test_bfloat16_stays_as_near_to_float32_as_transformers_own_pass() -> None:
    """On average: the gradients of one random model may be twice as near by either."""
    errors: list[tuple[float, float]] = []
    for seed in range(6):
        batch, found = random_batch(LENGTHS, seed=seed), []
        for dtype, groups in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
            model: Any = tiny_model("llama", seed)
            decoder = Decoder.from_model(model.to(dtype).train())
            with pytest.MonkeyPatch.context() as patch:
                if not groups:
                    patch.setattr(refiner, "takes_groups", lambda decoder: False)
                states = refine(decoder, *batch, num_steps=4, prompt_tokens=40)
            assert states.dtype == dtype
            weighed(states).backward()
            found.append(torch.cat([gradient.float().flatten() for gradient in gradients(model).values()]))
        errors.append((relative_error(found[1], found[0]), relative_error(found[2], found[0])))
    own, by_groups = torch.tensor(errors).mean(dim=0)
    assert by_groups <= 1.5 * own


@pytest.mark.parametrize("family", ["llama-tied", "gemma2-softcap", "gpt2-learned-positions"])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", ["bounded", "none"])
def test_gradients_between_soft_tokens_are_the_recompute_loops(family: str, recorded: bool, kind: str) -> None:
    model, graphs = tiny_model(family), StepGraphs()
    temperature = 0.1  # gradients grow on their way through sharper tokens
    graphs.anywhere = recorded
    decoder, results = Decoder.from_model(model), []
    ids, mask = random_batch(LENGTHS)
    ours = partial(refine, prompt_tokens=60, graphs=graphs, soft_token_gradients=kind)
    for run in (partial(recompute_states, soft_token_gradients=kind), ours, recompute_states):
        states = run(decoder, ids, mask, num_steps=3, temperature=temperature)
        weighed(states).backward()
        results.append((states.detach(), gradients(model)))
    assert bool(graphs._steps) == (recorded and family != "gemma2-softcap"), "windows go through the loop"
    assert relative_error(results[1][0], results[0][0]) <= 1e-4
    assert_same_gradients(results[1][1], results[0][1])
    assert relative_error(results[2][0], results[0][0]) == 0, "the states are the same"
    flat = [torch.cat([gradient.flatten() for gradient in found.values()]) for _, found in results]
    assert relative_error(flat[2], flat[0]) > 0.05


@pytest.mark.parametrize("until", [0, 1, 3])
def test_steps_that_a_loss_leaves_out_have_no_gradients(until: int, plain: pytest.MonkeyPatch) -> None:
    model, results = tiny_model("qwen2").train(), []
    for _ in range(2):
        states = refine(Decoder.from_model(model), *random_batch(LENGTHS), num_steps=4, prompt_tokens=60)
        weighed(states[:, : until + 1]).backward()
        results.append(gradients(model))
        plain.undo()
    assert_same_gradients(results[1], results[0])


def test_a_backward_pass_takes_nothing_from_the_one_before() -> None:
    """Neither from a whole one nor from one that has ended before it came to the prompts' keys."""
    model = tiny_model("llama").train()
    norm: Any = model.get_submodule("model.norm").weight
    loss = weighed(refine(Decoder.from_model(model), *random_batch(LENGTHS), num_steps=3, prompt_tokens=60))
    (alone,) = torch.autograd.grad(loss, [norm], retain_graph=True)
    loss.backward(retain_graph=True)
    first = gradients(model)
    torch.testing.assert_close(first["model.norm.weight"], alone)
    loss.backward()
    assert_same_gradients(gradients(model), first, 1e-6)


def test_a_pass_without_gradients_rounds_as_one_with_them(steps_taken: list[int]) -> None:
    """Gradient caching takes both."""
    model: Any = tiny_model("llama")
    decoder = Decoder.from_model(model.bfloat16().train())
    states = [refine(decoder, *random_batch(LENGTHS), num_steps=3, prompt_tokens=60)]
    with torch.no_grad():
        states.append(refine(decoder, *random_batch(LENGTHS), num_steps=3, prompt_tokens=60))
    assert len(steps_taken) == 6
    assert torch.equal(*states)


def test_rows_with_a_k_of_their_own_are_trained_by_transformers_own_pass(steps_taken: list[int]) -> None:
    decoder, (ids, mask) = Decoder.from_model(tiny_model("llama").train()), random_batch([5, 9, 3])
    states = refine(decoder, ids, mask, num_steps=[2, 0, 3])
    assert not steps_taken
    assert relative_error(states[2].detach(), recompute_states(decoder, ids, mask, num_steps=3)[2].detach()) <= 1e-4


@pytest.mark.parametrize("most_rows", [128, 5])
def test_adapters_have_their_gradients_once_for_all_steps(
    most_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_lora_module, "MOST_ROWS", most_rows)
    rows: list[int] = []
    take = Collected.take
    monkeypatch.setattr(
        step_lora.Collected, "take", lambda self: [rows.append(len(step[0])) or step for step in take(self)]
    )
    torch.manual_seed(0)
    options: Any = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 24, "up_proj": 2}}
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **options)
    path = str(tiny_backbone(tmp_path, "llama-scaled-positions"))
    model = GIRCSE.from_backbone(path, num_steps=3, lora=lora, device="cpu").train()
    texts = ["one text", "another one", "short", "a much longer text than these", "?", "six"]
    features, results = model.encoder.preprocess(texts), []
    for fused in (False, True):
        rows.clear()
        with fused_lora(model) if fused else nullcontext():
            weighed(model(dict(features))["step_embeddings"]).backward()
        results.append(gradients(model))
    groups = 2 * 4  # of layers: queries, keys and values; what attention has found; gate and up; down
    joined = 2  # layers' keys and values
    collected = [count for count in rows if count == len(texts)]
    assert len(collected) == (3 * groups if most_rows > len(texts) else 0)
    assert len(rows) == len(collected) + 3 * joined
    assert_same_gradients(results[1], results[0])


def test_some_layers_with_adapters(tmp_path: Path) -> None:
    """Whatever lies beside a fused layer computes as always."""
    path = str(tiny_backbone(tmp_path))
    for targets in (["q_proj", "v_proj", "up_proj"], ["k_proj", "gate_proj", "down_proj"]):
        torch.manual_seed(0)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        model = GIRCSE.from_backbone(path, num_steps=2, lora=lora, device="cpu").train()
        features, results = model.encoder.preprocess(["one text", "another"]), []
        for fused in (False, True):
            with fused_lora(model) if fused else nullcontext():
                weighed(model(dict(features))["step_embeddings"]).backward()
            results.append(gradients(model))
        assert_same_gradients(results[1], results[0])


def test_adapters_that_are_switched_off_add_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = GIRCSE.from_backbone(str(tiny_backbone(tmp_path)), num_steps=2, lora=lora, device="cpu").train()
    features = model.encoder.preprocess(["one text", "another"])
    added = model(dict(features))["step_embeddings"]
    for layer in lora_layers(model.encoder.backbone):
        layer.enable_adapters(False)
    expected = model(dict(features))["step_embeddings"]
    with fused_lora(model):
        found = model(dict(features))["step_embeddings"]
    torch.testing.assert_close(found, expected)
    assert relative_error(found.detach(), added.detach()) > 0.1
