"""Soft tokens written by groups of rows: the same states as transformers' own pass over one padded cache."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from gircse import refiner
from gircse.attention import attend_single_queries, multiply_single_queries
from gircse.cache import JoinedPrompts
from gircse.decoders import Decoder
from gircse.fast.grouped_steps import GroupedSteps, takes_groups
from gircse.refiner import refine
from tests.tiny import instructed_batch, random_batch, relative_error, tiny_model

KNOWN = ["llama", "llama-tied", "llama-scaled-positions", "mistral", "qwen2", "qwen3"]
LENGTHS = [14, 9, 20, 12, 8, 17, 4, 1, 20, 3]


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every grouped step."""
    rows: list[int] = []
    step = GroupedSteps.next_states
    monkeypatch.setattr(
        GroupedSteps, "next_states", lambda self, tokens: rows.append(len(tokens)) or step(self, tokens)
    )
    return rows


def plain(decoder: Decoder, *args: Any, **options: Any) -> Tensor:
    """By transformers' own pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refiner, "takes_groups", lambda decoder: False)
        return refine(decoder, *args, **options)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How the soft tokens of every group attend: by PyTorch's attention, by products, or by those with a prefix."""
    groups: list[str] = []
    attention, products = refiner.DecodeGroup, refiner.ProductsDecodeGroup

    def attend(*parts: Any) -> Any:
        groups.append("attention")
        return attention(*parts)

    def multiply(cache: Any, mask: Tensor, prefix: Any) -> Any:
        groups.append("prefix" if prefix else "products")
        return products(cache, mask, prefix)

    monkeypatch.setattr(refiner, "DecodeGroup", attend)
    monkeypatch.setattr(refiner, "ProductsDecodeGroup", multiply)
    return groups


def take_few_rows(patch: pytest.MonkeyPatch, few: int) -> None:
    patch.setattr(refiner, "FEW_ROWS", dict.fromkeys([torch.float32, torch.bfloat16], few))


@pytest.mark.parametrize(
    ("shared", "copied", "few", "how"),
    [
        (0, 0, 0, {"products"}),
        (0, 0, 100, {"attention"}),
        (7, 0, 0, {"products", "prefix"}),
        (7, 0, 100, {"attention", "prefix"}),
        (7, refiner.COPIED_PREFIX, 0, {"products"}),
        (7, refiner.COPIED_PREFIX, 100, {"attention"}),
    ],
)
@pytest.mark.parametrize("padding", [0, 512])
@pytest.mark.parametrize("family", KNOWN)
def test_states_equal_transformers_own(
    family: str,
    padding: int,
    shared: int,
    copied: int,
    few: int,
    how: set[str],
    steps_taken: list[int],
    made: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refiner, "DECODE_PADDING", padding)
    monkeypatch.setattr(refiner, "COPIED_PREFIX", copied)
    take_few_rows(monkeypatch, few)
    decoder = Decoder.from_model(tiny_model(family))
    ids, mask = random_batch(LENGTHS, side="right")
    ids[:6, :shared] = ids[0, :shared].clone()  # six rows begin alike: an instruction
    with torch.no_grad():
        expected = plain(decoder, ids, mask, num_steps=5, temperature=0.7, prompt_tokens=40)
        assert not steps_taken
        states = refine(decoder, ids, mask, num_steps=5, temperature=0.7, prompt_tokens=40)
    assert steps_taken == [len(LENGTHS)] * 5
    assert set(made) == how
    assert relative_error(states, expected) <= 1e-4
    assert relative_error(states[:, -1], states[:, 1]) > 1e-2, "steps differ"


def test_a_prefix_is_copied_for_as_many_rows_as_that_pays(made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder.from_model(tiny_model("llama"))
    ids, mask = instructed_batch([9] * 8, 7, side="left")
    with torch.no_grad():
        keys = decoder.transformer(input_ids=ids[:1, :7], use_cache=True).past_key_values.layers[0].keys.numel()
        for copied in (8 * keys, 8 * keys - 1):
            monkeypatch.setattr(refiner, "COPIED_PREFIX", copied)
            refine(decoder, ids, mask, num_steps=1, prompt_tokens=1000)
    assert made == ["products", "prefix"]


def test_few_rows_of_bfloat16_are_left_to_attention(made: list[str]) -> None:
    few = refiner.FEW_ROWS[torch.bfloat16]
    for dtype in (torch.bfloat16, torch.float32):
        model: Any = tiny_model("llama")
        decoder = Decoder.from_model(model.to(dtype))
        for rows in (few, few + 1):
            with torch.no_grad():
                refine(decoder, *random_batch([5] * rows), num_steps=1)
    assert made == ["attention", "products", "products", "products"]


@pytest.mark.parametrize("few", [0, 100])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_leave_after_their_own_steps(
    family: str, few: int, steps_taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    take_few_rows(monkeypatch, few)
    own = [2, 0, 4, 1, 4, 3, 0, 2, 1, 0]
    decoder = Decoder.from_model(tiny_model(family))
    ids, mask = random_batch(LENGTHS, side="left")
    with torch.no_grad():
        states = refine(decoder, ids, mask, num_steps=own, prompt_tokens=24)
        assert steps_taken == [sum(steps > step for steps in own) for step in range(4)]
        for row, steps in enumerate(own):
            alone = refine(decoder, ids[[row]], mask[[row]], num_steps=steps)[0]
            assert relative_error(states[row, : steps + 1], alone) <= 1e-4
            assert not states[row, steps + 1 :].any()


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=9),
    shared=st.integers(0, 12),
    num_steps=st.integers(1, 5),
    prompt_tokens=st.none() | st.integers(1, 120),
    side=st.sampled_from(["left", "right"]),
    copied=st.sampled_from([0, refiner.COPIED_PREFIX]),
    few=st.sampled_from([0, 3, 100]),
)
def test_any_layout_gives_the_states_of_the_recompute_loop(
    lengths: list[int], shared: int, num_steps: int, prompt_tokens: int | None, side: str, copied: int, few: int
) -> None:
    decoder = Decoder.from_model(tiny_model("llama"))
    ids, mask = instructed_batch(lengths, shared, side=side)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(refiner, "COPIED_PREFIX", copied)
        take_few_rows(patch, few)
        expected = refiner.recompute_states(decoder, ids, mask, num_steps=num_steps)
        states = refine(decoder, ids, mask, num_steps=num_steps, prompt_tokens=prompt_tokens)
    assert relative_error(states, expected) <= 1e-4


@pytest.mark.parametrize("few", [0, 100])
def test_bfloat16_stays_as_near_to_float32_as_transformers_own_pass(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    take_few_rows(monkeypatch, few)
    ids, mask = random_batch(LENGTHS, side="left")
    ids[:, :2] = 3
    with torch.no_grad():
        exact = refine(Decoder.from_model(tiny_model("llama")), ids, mask, num_steps=5)
        decoder = Decoder.from_model(tiny_model("llama").bfloat16())
        states = refine(decoder, ids, mask, num_steps=5, prompt_tokens=40)
        own = plain(decoder, ids, mask, num_steps=5, prompt_tokens=40)
    assert states.dtype == torch.bfloat16
    assert relative_error(states, exact) <= 3 * relative_error(own, exact)


@pytest.mark.parametrize("family", ["gemma2-softcap", "gpt2-learned-positions", "mistral-wide", "smollm3"])
def test_other_families_keep_transformers_own_pass(family: str) -> None:
    with torch.no_grad():
        assert not takes_groups(Decoder.from_model(tiny_model(family)))


def test_what_drops_attention_in_training_keeps_it_there() -> None:
    model = tiny_model("llama")
    model.config.attention_dropout = 0.1
    decoder = Decoder.from_model(model)
    assert takes_groups(decoder)
    model.train()
    assert not takes_groups(decoder), "random numbers"
    model.config.attention_dropout = 0.0
    assert takes_groups(decoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not takes_groups(decoder)


@pytest.mark.parametrize("change", ["hook", "forward"])
@pytest.mark.parametrize("part", ["model", "model.layers.1", "model.layers.0.self_attn"])
def test_what_is_hooked_or_replaced_is_called(part: str, change: str) -> None:
    ids, mask = random_batch(LENGTHS, side="left")
    model = tiny_model("llama")
    module: Any = model.get_submodule(part)
    calls: list[str] = []
    if change == "hook":
        module.register_forward_hook(lambda *args: calls.append(change))
    else:
        forward = module.forward
        module.forward = lambda *args, **options: calls.append(change) or forward(*args, **options)
    with torch.no_grad():
        refine(Decoder.from_model(model), ids, mask, num_steps=3)
    assert calls == [change] * 4, "the prompt and three soft tokens"


def test_what_is_wrapped_is_called() -> None:
    """As by FSDP, whose wrappers gather a layer's weights when they are called, and pass on its attributes."""

    class Wrapped(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.inside = module

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inside, name)

        def forward(self, *args: Any, **options: Any) -> Any:
            calls.append(1)
            return self.inside(*args, **options)

    calls: list[int] = []
    model: Any = tiny_model("llama")
    model.model.layers[1] = Wrapped(model.model.layers[1])
    with torch.no_grad():
        refine(Decoder.from_model(model), *random_batch(LENGTHS), num_steps=3)
    assert len(calls) == 4


@pytest.mark.parametrize("prefix_length", [0, 4])
@pytest.mark.parametrize("products", [False, True])
def test_attention_of_single_queries(prefix_length: int, products: bool) -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    shared = [torch.randn(1, 2, prefix_length, 8) for _ in range(2)]
    seen = torch.ones(3, 9, dtype=torch.bool)
    seen[0, :4] = seen[:, 7:] = False
    expected = torch.nn.functional.scaled_dot_product_attention(
        query,
        *(
            torch.cat([part.expand(3, -1, -1, -1), own], dim=2).repeat_interleave(3, dim=1)
            for part, own in zip(shared, (keys, values), strict=True)
        ),
        attn_mask=torch.cat([torch.ones(3, prefix_length, dtype=torch.bool), seen], dim=1)[:, None, None],
        scale=0.3,
    )
    mask = torch.zeros(3, 9).masked_fill_(~seen, float("-inf"))
    if products:
        prefix = (shared[0][0].mT.contiguous(), shared[1][0]) if prefix_length else None
        columns, each_head = keys.mT.contiguous(), mask.repeat_interleave(2, dim=0).unsqueeze(1)
        found = multiply_single_queries(query.squeeze(2), columns, values, each_head, 0.3, prefix)
    else:
        mask = torch.cat([torch.zeros(3, prefix_length), mask], dim=1)[:, None, None]
        begun = [part.expand(3, -1, -1, -1) for part in shared]
        keys, values = (torch.cat(parts, dim=2) for parts in zip(begun, (keys, values), strict=True))
        found = attend_single_queries(query.squeeze(2), keys, values, mask, 0.3)
    torch.testing.assert_close(found, expected.squeeze(2))


@pytest.mark.parametrize("products", [False, True])
def test_what_no_position_has_written_is_never_read_or_zero(products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products are masked, but what is no number would stay none."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: new_empty(*args, **kw).fill_(float("nan")))
    prompts = JoinedPrompts(3, 5, 2, torch.float32, 1, for_products=products)
    for rows, length in ((2, 5), (1, 3)):
        states = torch.ones(rows, 2, length, 4)
        prompts.next_group(rows).update(states, 2 * states, 0)
    ((keys, values),) = prompts.buffers()
    assert keys.shape == ((3, 2, 4, 7) if products else (3, 2, 7, 4))
    assert values.shape == (3, 2, 7, 4)
    assert keys.is_contiguous()
    assert values.is_contiguous()
    written = torch.tensor([[1.0] * 5] * 2 + [[0, 0, 1, 1, 1]])
    keys = keys.mT if products else keys
    assert torch.equal(keys[:, 0, :5, 0], written)
    assert torch.equal(values[:, :, :5], 2 * keys[:, :, :5])
    for room in (keys[:, :, 5:], values[:, :, 5:]):
        assert room.eq(0).all() if products else room.isnan().all()


def test_room_without_numbers_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder.from_model(tiny_model("llama"))
    ids, mask = instructed_batch(LENGTHS, 5, side="left")
    new_empty = torch.Tensor.new_empty
    for few, copied in ((0, 0), (0, refiner.COPIED_PREFIX), (100, refiner.COPIED_PREFIX)):
        take_few_rows(monkeypatch, few)
        monkeypatch.setattr(refiner, "COPIED_PREFIX", copied)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            expected = refine(decoder, ids, mask, num_steps=3)
            patch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: new_empty(*args, **kw).fill_(float("nan")))
            assert torch.equal(refine(decoder, ids, mask, num_steps=3), expected)
