"""Compiled kernels: each against PyTorch's operations, and whole models against the recompute loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from torch import Tensor
from torch.nn import functional as F

import gircse
from gircse import kernel_steps, refiner, soft_tokens, step_kernels
from gircse.decoders import Decoder
from gircse.frozen_linear import freeze_linear_layers
from gircse.kernel_steps import KernelSteps, takes_kernels
from gircse.norms import frugal_norm, use_fused_norms
from gircse.packed_linear import PackedLinear, packs_in_place
from gircse.packed_weights import ROWS_PACKED_FOR
from gircse.refiner import PromptReading, recompute_states, refine
from gircse.whole_steps import WholeStep, takes_whole_steps
from tests.tiny import instructed_batch, random_batch, relative_error

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = [14, 9, 20, 12, 8, 17, 4, 1, 20, 3]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # of larger weights rounding grows tenfold with every step
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


def config(make: type, **changes: Any) -> Any:
    """Of a tiny decoder whose sizes the kernels take."""
    return make(**{**SIZES, **changes})


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: config(tf.LlamaConfig),
    "biases": lambda: config(tf.LlamaConfig, attention_bias=True, mlp_bias=True),
    "own-heads": lambda: config(tf.LlamaConfig, num_key_value_heads=4, tie_word_embeddings=False),
    "many-queries": lambda: config(tf.LlamaConfig, hidden_size=96, num_attention_heads=6, num_key_value_heads=1),
    "mistral": lambda: config(tf.MistralConfig, sliding_window=None),
    "qwen2": lambda: config(tf.Qwen2Config),
    "qwen3": lambda: config(tf.Qwen3Config, head_dim=32),
}
PACKED: dict[str, Callable[[], Any]] = {  # in whole panels of 64
    "packed": lambda: config(
        tf.LlamaConfig, hidden_size=128, intermediate_size=192, num_attention_heads=8, num_key_value_heads=4
    ),
    "packed-biases": lambda: config(
        tf.LlamaConfig, num_key_value_heads=4, intermediate_size=128, attention_bias=True, mlp_bias=True
    ),
    "packed-qwen3": lambda: config(tf.Qwen3Config, head_dim=32, intermediate_size=64),
}


def forget() -> None:
    """Which library there is, and its functions."""
    cached: list[Any] = [
        step_kernels.library,
        step_kernels.matrix_library,
        step_kernels._function,
        step_kernels.panel_width,
    ]
    cached += [
        step_kernels._matrix_function,
        step_kernels.multiply_address,
        step_kernels.most_product_rows,
        step_kernels.most_soft_tokens,
    ]
    for function in cached:
        function.cache_clear()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test with each library that was compiled and that this processor runs."""
    if "compiled" in metafunc.fixturenames:
        metafunc.parametrize("compiled", ["AMX", "AVX512", "AVX2"], indirect=True)


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    own, wanted = torch.backends.cpu.get_cpu_capability(), "AVX2" if request.param == "AVX2" else "AVX512"
    matrices = request.param == "AMX"
    if own not in ("AVX512", "AVX2") or (wanted == "AVX512" and own == "AVX2"):
        pytest.skip(f"this processor has {own}")
    if matrices and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has no AMX")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: wanted)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrices)
    forget()
    if (step_kernels.matrix_library() if matrices else step_kernels.library()) is None:
        pytest.skip("nothing was compiled at installation")
    yield request.param
    monkeypatch.undo()
    forget()


def kernel_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder of random weights whose sizes the kernels take."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config({**FAMILIES, **PACKED}[family](), dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        if "norm" in name or "bias" in name:  # all ones and zeros at first
            weight.data.uniform_(0.5, 1.5)
    use_fused_norms(model)
    return Decoder.from_model(model.to(dtype))


def packed_model(family: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """One whose linear layers are packed, where this processor packs any as kernels read them."""
    decoder = kernel_model(family, dtype)
    if not packs_in_place(dtype) or not step_kernels.panel_width(64, 64, dtype, ROWS_PACKED_FOR):
        pytest.skip("oneDNN packs otherwise on this processor")
    freeze_linear_layers(decoder.transformer, partial(PackedLinear, dtype=dtype))
    return decoder


def recomputed(*args: Any, **options: Any) -> Tensor:
    """States of the recompute loop, by PyTorch's operations alone."""
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_kernels, "serves", lambda *_: False)
        return recompute_states(*args, **options)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a prompt pass, a step and a soft token were computed by kernels."""
    counts = {"prompts": 0, "steps": 0, "soft tokens": 0}
    prompts, step, soft = refiner.prompt_states, KernelSteps.next_states, step_kernels.soft_tokens

    def count(name: str, function: Any) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*args, **options)

        return counted

    monkeypatch.setattr(refiner, "prompt_states", count("prompts", prompts))
    monkeypatch.setattr(KernelSteps, "next_states", count("steps", step))
    monkeypatch.setattr(step_kernels, "soft_tokens", count("soft tokens", soft))
    return counts


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"), reason="another processor")
def test_installation_compiles_where_there_is_a_compiler() -> None:
    """Without this test, one with a mistake in its source would leave all others skipped."""
    import shutil
    import sysconfig

    if shutil.which((sysconfig.get_config_var("CXX") or "c++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    folder = Path(gircse.__file__).parent
    for name in ("_step_kernels_avx512", "_step_kernels_avx2", "_matrix_kernels"):
        assert any((folder / f"{name}{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)
    assert step_kernels.library() is not None


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
    monkeypatch.setattr(step_kernels, "most_product_rows", lambda *_: 64)
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
        layers[1].mlp.up_proj = own
        assert takes_whole_steps(decoder, 1)
        qwen = packed_model("packed-qwen3")
        assert takes_whole_steps(qwen, 1)
        qwen.transformer.get_submodule("layers.0.self_attn").q_norm = torch.nn.LayerNorm(32)
        assert not takes_whole_steps(qwen, 1)
    assert len(whole) == 2


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


def test_a_library_of_another_source_is_not_used(compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setattr(step_kernels, "VERSION", step_kernels.VERSION + 1)
    assert step_kernels.library() is None
    assert not step_kernels.serves(torch.float32, 64)


def test_an_environment_variable_switches_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setenv("GIRCSE_STEP_KERNELS", "0")
    assert step_kernels.library() is None
    with torch.no_grad():
        assert not takes_kernels(kernel_model())
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "shared", "width"), [(9, 3, 64), (5, 1, 128), (4, 4, 96), (6, 1, 256), (2, 1, 16)])
@pytest.mark.parametrize("prefix_length", [0, 5])
def test_attention(heads: int, shared: int, width: int, prefix_length: int, dtype: torch.dtype, compiled: str) -> None:
    torch.manual_seed(0)
    rows, capacity, length = 3, 40, 37
    keys, values = (torch.randn(rows, shared, capacity, width).to(dtype) for _ in range(2))
    query, key, value = (torch.randn(rows, n, width).to(dtype) for n in (heads, shared, shared))
    prefix = torch.randn(shared, prefix_length, width).to(dtype), torch.randn(shared, prefix_length, width).to(dtype)
    starts = torch.tensor([0, 37, 20])
    seen = torch.arange(length + 1) >= starts.unsqueeze(1)  # (rows, length + 1)
    both = [
        torch.cat([first.expand(rows, -1, -1, -1), own[:, :, :length], new.unsqueeze(2)], dim=2).float()
        for first, own, new in zip(prefix, (keys, values), (key, value), strict=True)
    ]
    mask = torch.cat([torch.ones(rows, prefix_length, dtype=torch.bool), seen], dim=1)[:, None, None]
    expected = F.scaled_dot_product_attention(
        query.float().unsqueeze(2), *both, attn_mask=mask, scale=0.2, enable_gqa=True
    ).squeeze(2)
    found = step_kernels.attend(query, key, value, (keys, values), starts, length, 0.2, prefix)
    assert relative_error(found, expected) <= TOLERANCE[dtype]
    assert torch.equal(keys[:, :, length], key)
    assert torch.equal(values[:, :, length], value)
    with pytest.raises(AssertionError, match="more positions"):
        step_kernels.attend(query, key, value, (keys, values), starts, capacity, 0.2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 70])
def test_positions_norms_and_gates(rows: int, dtype: torch.dtype, compiled: str) -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(rows, 9, 64).to(dtype), torch.randn(rows, 64)
    cos, sin = angles.cos(), angles.sin()
    half = torch.cat([-x[..., 32:], x[..., :32]], dim=-1).float()
    expected = x.float() * cos.unsqueeze(1) + half * sin.unsqueeze(1)
    step_kernels.turn(x, cos, sin)
    assert relative_error(x, expected) <= TOLERANCE[dtype]

    states, new = torch.randn(rows, 576).to(dtype), torch.randn(rows, 576).to(dtype)
    weight, total = torch.rand(576).to(dtype), states + new
    normed = step_kernels.add_and_norm(states, new, weight, 1e-5)
    assert torch.equal(states, total), "added in place"
    assert relative_error(normed, frugal_norm(total.float(), weight.float(), 1e-5)) <= TOLERANCE[dtype]
    assert torch.equal(step_kernels.add_and_norm(states, None, weight, 1e-5), normed)
    assert torch.equal(states, total)

    gate, up = 30 * torch.randn(rows, 1536).to(dtype), torch.randn(rows, 1536).to(dtype)
    gate[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -87.0])
    assert relative_error(step_kernels.gate(gate, up), F.silu(gate.float()) * up.float()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 16, 33, 50])
@pytest.mark.parametrize(("vocabulary", "width"), [(1000, 576), (97, 64), (512, 96), (3, 16)])
def test_soft_tokens(rows: int, vocabulary: int, width: int, dtype: torch.dtype, compiled: str) -> None:
    torch.manual_seed(0)
    hidden, table = torch.randn(rows, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    hidden[-1] *= 30  # one word has all the weight
    expected = (0.5 * hidden.float() @ table.float().T).softmax(dim=-1) @ table.float()
    assert relative_error(step_kernels.soft_tokens(hidden, table, 0.5), expected) <= 3 * TOLERANCE[dtype]
    hidden[0, 0] = float("nan")
    assert step_kernels.soft_tokens(hidden, table, 0.5)[0].isnan().all()


def test_a_soft_token_is_read_once_where_head_and_table_are_one(compiled: str, taken: dict[str, int]) -> None:
    torch.manual_seed(0)
    vocabulary = kernel_model().vocabulary
    few = step_kernels.MOST_SOFT_TOKENS[torch.float32]
    hidden = torch.randn(few, 64)
    with torch.no_grad():
        expected = vocabulary.by_products(hidden, 0.6)
        assert torch.equal(vocabulary.soft_token(hidden, 0.6), expected)
        assert taken["soft tokens"] == 0
        assert relative_error(vocabulary.soft_token(hidden, 0.6, compiled=True), expected) <= 1e-6
        assert taken["soft tokens"] == 1
        vocabulary.soft_token(torch.randn(few + 1, 64), compiled=True)
        kernel_model("own-heads").vocabulary.soft_token(hidden, compiled=True)
        capped = soft_tokens.Vocabulary(vocabulary.head, vocabulary.embedding, logit_cap=3.0)
        capped.soft_token(hidden, compiled=True)
    assert taken["soft tokens"] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 16, 33, 64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [64, 576, 80])
def test_products_with_packed_weights(
    width: int, bias: bool, rows: int, dtype: torch.dtype, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = 192, 64, 80  # in panels of 64, 32 and 16
    if not packs_in_place(dtype):
        pytest.skip("no packed weights on this processor")
    torch.manual_seed(0)
    weights, offsets = [torch.randn(out, width) for out in outputs], [torch.randn(out) for out in outputs]
    pairs = list(zip(weights, offsets if bias else [None] * 3, strict=True))
    layers, x = [PackedLinear(*pair, dtype=dtype) for pair in pairs], torch.randn(rows, width).to(dtype)
    layers = [layer for layer in layers if layer.joins()]
    if not layers:
        pytest.skip("oneDNN packs otherwise on this processor")
    calls: list[int] = []
    multiply = step_kernels.multiply
    monkeypatch.setattr(step_kernels, "multiply", lambda x, *args: calls.append(len(x)) or multiply(x, *args))
    most = step_kernels.most_product_rows(dtype, width)
    together = PackedLinear.products(x, layers)
    assert len(calls) == (1 if rows <= most else 0)
    for layer, found in zip(layers, together, strict=True):
        offset = None if layer.bias is None else layer.bias.float()
        exact = F.linear(x.float(), layer.matrix().float(), offset)
        assert relative_error(found, exact) <= TOLERANCE[dtype]
        assert torch.equal(layer(x), found)
        assert torch.equal(layer(x.unsqueeze(1)).squeeze(1), found)
    before = len(calls)
    layers[0](torch.randn(most + 1, width).to(dtype))
    assert len(calls) == before, "too many rows"
    hooked: list[int] = []
    layers[0].register_forward_hook(lambda *_: hooked.append(1))
    PackedLinear.products(x, layers)
    assert hooked == [1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("panel", step_kernels.PANELS)
def test_every_width_of_panels(panel: int, dtype: torch.dtype, compiled: str) -> None:
    """Whatever this processor's oneDNN packs."""
    torch.manual_seed(0)
    pair = 2 if dtype == torch.bfloat16 else 1
    weights, x = [torch.randn(n * panel, 96).to(dtype) for n in (3, 1)], torch.randn(35, 96).to(dtype)
    packed = [weight.view(-1, panel, 96 // pair, pair).transpose(1, 2).contiguous() for weight in weights]
    places = [
        step_kernels.PackedMatrix(one.data_ptr(), panel, n * panel) for one, n in zip(packed, (3, 1), strict=True)
    ]
    bias = torch.randn(panel).to(dtype)
    first, second = step_kernels.multiply(x, places, [None, bias])
    assert relative_error(first, x.float() @ weights[0].float().T) <= TOLERANCE[dtype]
    assert relative_error(second, F.linear(x.float(), weights[1].float(), bias.float())) <= TOLERANCE[dtype]


def test_weights_that_are_packed_otherwise_are_left_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What oneDNN makes of a matrix is looked at, not assumed."""
    if not packs_in_place(torch.float32):
        pytest.skip("no packed weights on this processor")
    assert step_kernels.panel_width(33, 48, torch.float32, ROWS_PACKED_FOR) is None, "no whole panels"
    step_kernels.panel_width.cache_clear()
    monkeypatch.setattr(
        step_kernels, "PANELS", (16,) if step_kernels.panel_width(64, 64, torch.float32, 1) != 16 else ()
    )
    assert step_kernels.panel_width(64, 80, torch.float32, ROWS_PACKED_FOR) is None
    layer = PackedLinear(torch.randn(64, 80), dtype=torch.float32)
    x = torch.randn(2, 80)
    assert relative_error(layer(x), x @ layer.matrix().T) <= 1e-5
    step_kernels.panel_width.cache_clear()


def test_tiles_take_any_number_of_rows_of_bfloat16() -> None:
    if step_kernels.matrix_library() is None:
        pytest.skip("no AMX, or nothing was compiled for it")
    assert step_kernels.most_product_rows(torch.bfloat16, 576) > step_kernels.MOST_PRODUCT_ROWS[torch.bfloat16]
    assert step_kernels.most_product_rows(torch.bfloat16, 48) == step_kernels.MOST_PRODUCT_ROWS[torch.bfloat16]
    assert step_kernels.most_product_rows(torch.float32, 576) == step_kernels.MOST_PRODUCT_ROWS[torch.float32]
    hidden, table = torch.randn(300, 64).bfloat16(), torch.randn(700, 64).bfloat16()
    expected = (hidden.float() @ table.float().T).softmax(dim=-1) @ table.float()
    assert relative_error(step_kernels.soft_tokens(hidden, table, 1.0), expected) <= 6e-3
    alone = torch.cat([step_kernels.soft_tokens(row, table, 1.0) for row in hidden[:40].split(1)])
    assert torch.equal(step_kernels.soft_tokens(hidden, table, 1.0)[:40], alone), "a row depends on itself alone"


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
