"""Steps over buffers that a GPU replays give the states and gradients of the plain loop; run one by one here."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from gircse.decoders import Decoder
from gircse.fast.step_graphs import StepGraphs
from gircse.losses import CachedICRLoss, ICRLoss
from gircse.model import GIRCSE
from gircse.refiner import CAUSAL, PromptReading, refine
from gircse.train.fused_lora import fused_lora
from tests.tiny import tiny_backbone, tiny_model

TEXTS = ["one", "two words", "a longer text of several words", "zz", "Instruct: x\nQuery: y", "Instruct: x\nQuery: zzz"]


@pytest.fixture
def graphs() -> StepGraphs:
    found = StepGraphs()
    found.anywhere = True
    return found


def batch(rows: int = 5, length: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(3, 97, (rows, length), generator=generator), torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        mask[row, : row % 4] = 0
    return ids, mask


def run(model: Any, graphs: StepGraphs | None, reading: PromptReading) -> tuple[Tensor, list[Any]]:
    model.zero_grad()
    states = refine(Decoder.from_model(model), *batch(), num_steps=4, temperature=0.8, graphs=graphs, reading=reading)
    (states * torch.linspace(0.5, 2.0, states.numel()).view_as(states)).sin().sum().backward()
    return states.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("reading", [CAUSAL, PromptReading("bidirectional", mean=True)], ids=str)
@pytest.mark.parametrize(
    "family", ["llama", "llama-tied", "qwen3", "gemma", "granite-multipliers", "gpt2-learned-positions"]
)
def test_states_and_gradients_are_those_of_the_plain_loop(
    family: str, reading: PromptReading, graphs: StepGraphs
) -> None:
    model = tiny_model(family)
    expected, gradients = run(model, None, reading)
    for _ in range(2):  # again over the same buffers
        found, others = run(model, graphs, reading)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for one, other in zip(others, gradients, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 1e-6)
    assert len(graphs._steps) == 1, "they were used"
    with torch.inference_mode():
        states = refine(
            Decoder.from_model(model), *batch(), num_steps=4, temperature=0.8, graphs=graphs, reading=reading
        )
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
    assert any(key[0] == 64 for key in graphs._steps), "rows are padded"


def test_windows_few_steps_and_steps_of_each_row_are_left_to_the_loop(graphs: StepGraphs) -> None:
    for family, num_steps in (("mistral-sliding", 3), ("llama", 1), ("llama", [1, 2, 3, 2, 2])):
        decoder = Decoder.from_model(tiny_model(family))
        with torch.no_grad():
            expected = refine(decoder, *batch(), num_steps=num_steps)
            torch.testing.assert_close(refine(decoder, *batch(), num_steps=num_steps, graphs=graphs), expected)
        assert not graphs._steps, family


def test_what_a_recording_could_not_repeat_is_left_to_the_loop(graphs: StepGraphs) -> None:
    model = tiny_model("llama")
    decoder, state = Decoder.from_model(model), torch.zeros(2, 32)
    assert graphs.serve(decoder, state, 3)
    model.train()
    assert graphs.serve(decoder, state, 3)
    model.config.attention_dropout = 0.1
    assert not graphs.serve(decoder, state, 3), "random numbers"
    assert graphs.serve(Decoder.from_model(model.eval()), state, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not graphs.serve(decoder, state, 3)
    weight = next(model.parameters())
    setattr(weight, "ds_id", 0)  # noqa: B010  # DeepSpeed's
    assert not graphs.serve(decoder, state, 3), "a part of a weight"
    delattr(weight, "ds_id")
    model.lm_head.to("meta")
    assert not graphs.serve(decoder, state, 3), "weights on several devices"


def lora_model(backbone: Path, dtype: torch.dtype = torch.float32) -> GIRCSE:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return GIRCSE.from_backbone(str(backbone), num_steps=3, lora=lora, device="cpu", dtype=dtype, max_seq_length=48)


@pytest.mark.parametrize("loss_type", [ICRLoss, CachedICRLoss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_over_buffers_goes_the_same_way(
    backbone: Path, loss_type: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three optimiser steps: recorded steps read adapters where they are rounded anew after each."""
    found = []
    for recorded in (True, False):
        if not recorded and dtype == torch.bfloat16:  # soft tokens by groups round elsewhere
            monkeypatch.setattr("gircse.refiner.takes_groups", lambda decoder: False)
        model = lora_model(backbone, dtype).train()
        model.encoder.step_graphs.anywhere = recorded
        trained = [p for n, p in model.named_parameters() if "lora_" in n]
        optimiser = torch.optim.SGD(trained, lr=0.05)
        loss = loss_type(model, temperature=0.5)
        losses = []
        with fused_lora(model):
            for _ in range(3):
                columns = [model.encoder.preprocess(texts) for texts in (TEXTS, TEXTS[::-1])]
                value = loss(columns)
                optimiser.zero_grad()
                value.backward()
                optimiser.step()
                losses.append(float(value.detach()))
        assert bool(model.encoder.step_graphs._steps) == recorded
        found.append(torch.tensor(losses))
    assert found[0][0] != found[0][2]
    torch.testing.assert_close(*found, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-4)


def test_encode_pads_rows_and_notices_new_weights(backbone: Path) -> None:
    model = lora_model(backbone)
    expected = torch.tensor(model.encode(TEXTS))
    model.encoder.step_graphs.anywhere = True
    torch.testing.assert_close(torch.tensor(model.encode(TEXTS)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(model.encode(TEXTS[:2])), expected[:2], rtol=1e-4, atol=1e-4)
    for fold in (False, True):
        model.encoder.fold_adapter = fold
        torch.testing.assert_close(torch.tensor(model.encode(TEXTS)), expected, rtol=1e-3, atol=1e-3)
    other = copy.deepcopy(model)
    assert not other.encoder.step_graphs._steps
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    other.encoder.step_graphs.anywhere = True
    changed = torch.tensor(other.encode(TEXTS))
    other.encoder.step_graphs.enabled = False
    torch.testing.assert_close(changed, torch.tensor(other.encode(TEXTS)), rtol=1e-3, atol=1e-3)
    assert not pickle.loads(pickle.dumps(model.encoder.step_graphs))._steps


def test_fewer_and_shorter_rows_after_a_longer_batch(tmp_path: Path) -> None:
    """Rows of the buffers that a batch leaves unused have positions too, and GPT-2 looks them up in a table."""
    path = str(tiny_backbone(tmp_path, "gpt2-learned-positions"))
    model = GIRCSE.from_backbone(path, num_steps=3, max_seq_length=40, device="cpu")
    expected = torch.tensor(model.encode(["ab", "cd"]))
    model.encoder.step_graphs.anywhere = True
    model.encode(["short", "a" * 26, "b" * 25])
    torch.testing.assert_close(torch.tensor(model.encode(["ab", "cd"])), expected, rtol=1e-4, atol=1e-4)


def test_a_copy_keeps_the_switch(graphs: StepGraphs) -> None:
    graphs.enabled = False
    assert not copy.deepcopy(graphs).enabled
    assert not pickle.loads(pickle.dumps(graphs)).enabled


def test_memory_is_given_back_where_the_model_has_left_the_gpu(backbone: Path) -> None:
    model = lora_model(backbone)
    model.encoder.step_graphs.anywhere = True
    model.encode(TEXTS)
    assert model.encoder.step_graphs._storage
    model.encoder.step_graphs.anywhere = False
    model.encode(TEXTS)
    assert not model.encoder.step_graphs._storage


def test_a_second_batch_before_the_first_ones_backward_is_refused(graphs: StepGraphs) -> None:
    decoder = Decoder.from_model(tiny_model("llama"))
    for rows in (5, 4):  # of another size too: they share their memory
        first = refine(decoder, *batch(5), num_steps=3, graphs=graphs)
        refine(decoder, *batch(rows), num_steps=3, graphs=graphs)
        with pytest.raises(RuntimeError, match="run backward after every forward pass"):
            first.sum().backward()


def test_sizes_share_their_memory(backbone: Path) -> None:
    model = lora_model(backbone).train()
    model.encoder.step_graphs.anywhere = True
    plain = copy.deepcopy(model)
    for count in (2, 6, 3, 2, 4):
        found, expected = (each(each.encoder.preprocess(TEXTS[:count]))["step_embeddings"] for each in (model, plain))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        found.sum().backward()
    graphs = model.encoder.step_graphs
    assert len(graphs._steps) == 4, "of 6, 3, 2 and 4 rows; the first of 2 went when the memory grew"
    places = {tensor.untyped_storage().data_ptr() for steps in graphs._steps.values() for tensor in steps.cache}
    assert len(places) == 1
    graphs.drop()
    assert not graphs._steps
    assert not graphs._storage


def test_steps_that_cannot_be_recorded_are_computed_one_by_one(
    graphs: StepGraphs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    decoder = Decoder.from_model(tiny_model("llama"))
    expected = refine(decoder, *batch(), num_steps=3)
    monkeypatch.setattr("gircse.fast.step_graphs._recorded", refuse)
    for _ in range(2):
        torch.testing.assert_close(refine(decoder, *batch(), num_steps=3, graphs=graphs), expected)
    ours = [record.message for record in caplog.records if record.name.startswith("gircse")]
    assert ours == [
        "steps cannot be recorded here and are computed one by one, which is slower (operation not permitted)"
    ], "told once"
    graphs.enabled = True

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("gircse.fast.step_graphs._recorded", full)
    with pytest.raises(torch.OutOfMemoryError):  # which encode meets with half the batch
        refine(decoder, *batch(), num_steps=3, graphs=graphs)
