"""Whole models by compiled kernels, against the recompute loop."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from gircse import refiner
from gircse.decoders import Decoder
from gircse.fast import int8, kernel_steps, step_kernels
from gircse.fast.int8 import Int8Linear, WidenedInt8Linear
from gircse.fast.kernel_steps import takes_kernels
from gircse.fast.packed_linear import packs_in_place
from gircse.fast.whole_steps import WholeStep, takes_whole_steps
from gircse.model import GIRCSE
from gircse.refiner import PromptReading, refine
from tests.kernel_models import DTYPES, FAMILIES, PACKED, int8_model, kernel_model, packed_model, recomputed
from tests.tiny import instructed_batch, random_batch, relative_error

LENGTHS = [14, 9, 20, 12, 8, 17, 4, 1, 20, 3]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("shared", [0, 7])
def test_states_equal_the_recompute_loop(
    family: str, two_sided: bool, shared: int, compiled: str, taken: dict[str, int]
) -> None:
    decoder = kernel_model(family)
    ids, mask = random_batch(LENGTHS, side="right")
    ids[:6, :shared] = ids[0, :shared].clone()  # six rows begin alike: an instruction
    reading = PromptReading("bidirectional", mean=True) if two_sided else refiner.CAUSAL
    expected = recomputed(decoder, ids, mask, num_steps=5, temperature=0.7, reading=reading)
    with torch.no_grad():
        states = refine(decoder, ids, mask, num_steps=5, temperature=0.7, prompt_tokens=40, reading=reading)
        alone = refine(decoder, ids, mask, num_steps=0, prompt_tokens=40, reading=reading)
    tied = family != "own-heads"
    assert taken["steps"] == 5
    assert taken["soft tokens"] == (5 if tied else 0)
    assert taken["prompts"] >= 4
    assert relative_error(states, expected) <= 1e-4
    assert relative_error(alone[:, 0], expected[:, 0]) <= 1e-4
    assert relative_error(states[:, -1], states[:, 1]) > 1e-2, "steps differ"


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=9),
    shared=st.integers(0, 12),
    own=st.lists(st.integers(0, 5), min_size=9, max_size=9),
    prompt_tokens=st.none() | st.integers(1, 120),
    side=st.sampled_from(["left", "right"]),
    padding=st.sampled_from([0, 512]),
    packed=st.booleans(),
)
def test_any_layout_gives_the_states_of_the_recompute_loop(
    lengths: list[int], shared: int, own: list[int], prompt_tokens: int | None, side: str, padding: int, packed: bool
) -> None:
    if step_kernels.library() is None:
        pytest.skip("nothing was compiled at installation")
    packed = packed and packs_in_place(torch.float32)
    decoder = packed_model("packed") if packed else kernel_model()
    ids, mask = instructed_batch(lengths, shared, side=side)
    own = own[: len(lengths)]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(refiner, "DECODE_PADDING", padding)
        expected = recomputed(kernel_model("packed") if packed else decoder, ids, mask, num_steps=max(own))
        states = refine(decoder, ids, mask, num_steps=own, prompt_tokens=prompt_tokens)
    for row, steps in enumerate(own):
        assert relative_error(states[row, : steps + 1], expected[row, : steps + 1]) <= 1e-4
        assert not states[row, steps + 1 :].any()


@pytest.mark.parametrize("family", ["llama", "own-heads", "qwen3", *PACKED])
def test_bfloat16_is_no_farther_from_float32_than_without(family: str, compiled: str, taken: dict[str, int]) -> None:
    ids, mask = instructed_batch(LENGTHS, 6, side="left")
    exact = recomputed(kernel_model(family), ids, mask, num_steps=5)
    with torch.no_grad():
        decoder = (packed_model if family in PACKED else kernel_model)(family, torch.bfloat16)
        states = refine(decoder, ids, mask, num_steps=5, prompt_tokens=60)
        assert taken["steps"] == 5
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_kernels, "serves", lambda *_: False)
            without = refine(kernel_model(family, torch.bfloat16), ids, mask, num_steps=5, prompt_tokens=60)
    assert states.dtype == torch.bfloat16
    assert relative_error(states, exact) <= 1.5 * relative_error(without, exact)


@pytest.mark.parametrize("packed", [False, True])
def test_room_without_numbers_is_never_read(packed: bool, compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = packed_model("packed") if packed else kernel_model()
    ids, mask = instructed_batch(LENGTHS, 5, side="left")
    with torch.no_grad():
        expected = refine(decoder, ids, mask, num_steps=3, prompt_tokens=60)
        new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
        nan = float("nan")
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: new_empty(*args, **kw).fill_(nan))
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *args, **kw: empty(*args, **kw).fill_(nan))
        monkeypatch.setattr(torch, "empty_like", lambda *args, **kw: empty_like(*args, **kw).fill_(nan))
        assert torch.equal(refine(decoder, ids, mask, num_steps=3, prompt_tokens=60), expected)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every step that was one call."""
    rows: list[int] = []
    step = WholeStep.next_states
    monkeypatch.setattr(WholeStep, "next_states", lambda self, x, turn: rows.append(len(x)) or step(self, x, turn))
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("shared", [0, 7])
def test_a_step_in_one_call(
    family: str, shared: int, dtype: torch.dtype, compiled: str, whole: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = packed_model(family, dtype)
    monkeypatch.setattr(refiner, "DECODE_PADDING", 0)  # several groups
    monkeypatch.setattr(step_kernels, "most_product_rows", lambda *_, **__: 64)
    ids, mask = instructed_batch(LENGTHS, shared, side="left")
    own = [3, 0, 5, 5, 1, 4, 2, 5, 3, 3]
    with torch.no_grad():
        states = refine(decoder, ids, mask, num_steps=own, prompt_tokens=40)
        assert whole == [9, 8, 7, 4, 3]
        monkeypatch.setattr(kernel_steps, "takes_whole_steps", lambda *_: False)
        by_layers = refine(decoder, ids, mask, num_steps=own, prompt_tokens=40)
        assert len(whole) == 5
    if family != "packed-qwen3":  # whose norms of queries and keys are PyTorch's there
        assert torch.equal(by_layers, states)
    if dtype == torch.float32:
        expected = recomputed(kernel_model(family), ids, mask, num_steps=5)
        for row, steps in enumerate(own):
            assert relative_error(states[row, : steps + 1], expected[row, : steps + 1]) <= 1e-4
    assert all(not states[row, steps + 1 :].any() for row, steps in enumerate(own))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("kind", [Int8Linear, WidenedInt8Linear])
def test_weights_of_8_bits_in_one_call(
    kind: type[Int8Linear],
    family: str,
    dtype: torch.dtype,
    compiled: str,
    whole: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder, batch = int8_model(kind, family, dtype), instructed_batch(LENGTHS, 7, side="left")
    own = [3, 0, 5, 5, 1, 4, 2, 5, 3, 3]
    with torch.no_grad():
        states = refine(decoder, *batch, num_steps=own, prompt_tokens=40)
        assert whole == [9, 8, 7, 4, 3]
        monkeypatch.setattr(kernel_steps, "takes_whole_steps", lambda *_: False)
        by_layers = refine(decoder, *batch, num_steps=own, prompt_tokens=40)
        all_rows = refine(decoder, *batch, num_steps=5, prompt_tokens=40)
    exact = recomputed(int8_model(kind, family), *batch, num_steps=5)
    if dtype == torch.bfloat16:
        assert relative_error(all_rows, exact) <= 1.5 * relative_error(recomputed(decoder, *batch, num_steps=5), exact)
        return
    for row, steps in enumerate(own):  # another last bit of an input is another step of 16 bits
        assert relative_error(states[row, : steps + 1], exact[row, : steps + 1]) <= 2e-3
        assert relative_error(by_layers[row], states[row]) <= 2e-3


def test_a_step_is_one_call_where_all_of_it_is_packed(compiled: str, whole: list[int]) -> None:
    decoder, batch = packed_model("packed"), random_batch(LENGTHS)
    layers: Any = decoder.transformer.get_submodule("layers")
    most = step_kernels.most_product_rows(torch.float32, 128)
    with torch.no_grad():
        assert takes_whole_steps(decoder, most)
        assert not takes_whole_steps(decoder, most + 1)
        refine(decoder, *batch, num_steps=2)
        assert len(whole) == 2
        hook = layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
        assert not takes_whole_steps(decoder, 1)
        hook.remove()
        own = layers[1].mlp.up_proj
        layers[1].mlp.up_proj = torch.nn.Linear(128, 192)
        assert not takes_whole_steps(decoder, 1)
        layers[1].mlp.up_proj = Int8Linear(torch.randn(192, 128))
        assert not takes_whole_steps(decoder, 1), "some are of 8 bits"
        layers[1].mlp.up_proj = own
        assert takes_whole_steps(decoder, 1)
        qwen = packed_model("packed-qwen3")
        assert takes_whole_steps(qwen, 1)
        qwen.transformer.get_submodule("layers.0.self_attn").q_norm = torch.nn.LayerNorm(32)
        assert not takes_whole_steps(qwen, 1)
    assert len(whole) == 2


@pytest.mark.parametrize("kind", ["copy", "packed", "int8", "widened"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shipped_model_takes_whole_steps(dtype: torch.dtype, kind: str, compiled: str, whole: list[int]) -> None:
    """What it is made of could change with transformers, and no result would tell."""
    of_8_bits = kind in ("int8", "widened")
    if (not of_8_bits and not packs_in_place(dtype)) or (kind == "int8" and step_kernels.int8_library() is None):
        pytest.skip("no such weights on this processor")
    model = GIRCSE(dtype=dtype)
    if kind == "packed":
        model.pack_weights()
    elif of_8_bits:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(int8, "multiplies_int8", lambda: kind == "int8")
            model.quantize_weights()
    texts = ["how do plants eat?"]
    vector = torch.tensor(model.encode(texts, num_steps=2))
    assert whole == [1, 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_steps, "takes_whole_steps", lambda *_: False)
        assert torch.equal(torch.tensor(model.encode(texts, num_steps=2)), vector)
    if of_8_bits:
        together = model.encode([*texts, "a longer text", "and others"], num_steps=2)
        assert 1 - torch.cosine_similarity(vector[0], torch.tensor(together[0]), dim=0) < 2e-4


def leave_what_they_do_not_know(decoder: Decoder) -> None:
    """Another activation, norm or dtype."""
    assert takes_kernels(decoder)
    layer: Any = decoder.transformer.get_submodule("layers.1")
    activation, layer.mlp.act_fn = layer.mlp.act_fn, torch.nn.GELU()
    assert not takes_kernels(decoder)
    layer.mlp.act_fn = activation
    own, layer.input_layernorm = layer.input_layernorm, torch.nn.LayerNorm(64)
    assert not takes_kernels(decoder)
    layer.input_layernorm = own
    assert not takes_kernels(kernel_model(dtype=torch.float16))


def test_what_kernels_do_not_compute_is_left_to_pytorch(compiled: str, taken: dict[str, int]) -> None:
    batch = random_batch(LENGTHS)
    decoder = kernel_model()
    assert not takes_kernels(decoder), "gradients are on"
    with torch.no_grad():
        leave_what_they_do_not_know(decoder)
    layer: Any = decoder.transformer.get_submodule("layers.1")
    calls: list[int] = []
    hook = layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        refine(decoder, *batch, num_steps=2)
    assert len(calls) == 3
    hook.remove()
    with_gradients = refine(decoder, *batch, num_steps=2)
    decoder.transformer.train()
    with torch.no_grad():  # as gradient caching begins
        assert torch.equal(refine(decoder, *batch, num_steps=2), with_gradients)
        assert torch.equal(refine(decoder, *batch, num_steps=0)[:, 0], with_gradients[:, 0])
    assert taken["prompts"] == taken["steps"] == 0


@pytest.mark.parametrize("packed", [False, True])
def test_several_threads_at_once(packed: bool, compiled: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    decoder = packed_model("packed", torch.bfloat16) if packed else kernel_model()
    batches = [random_batch([5 + i, 9, 3], seed=i) for i in range(8)]

    def states(batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            return refine(decoder, *batch, num_steps=4)

    expected = [states(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for one, other in zip(pool.map(states, batches), expected, strict=True):
                assert torch.equal(one, other)
