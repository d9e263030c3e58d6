"""Tiny decoders whose sizes the compiled kernels take, and the fixture that chooses the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from gircse import refiner
from gircse.decoders import Decoder
from gircse.fast import step_kernels
from gircse.fast.frozen_linear import freeze_linear_layers
from gircse.fast.int8 import Int8Linear
from gircse.fast.kernel_steps import KernelSteps
from gircse.fast.norms import use_fused_norms
from gircse.fast.packed_linear import PackedLinear, packs_in_place
from gircse.fast.packed_weights import ROWS_PACKED_FOR
from gircse.refiner import recompute_states

DTYPES = [torch.float32, torch.bfloat16]
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
        step_kernels.bfloat16_library,
        step_kernels.int8_library,
        step_kernels._function,
        step_kernels._product_function,
        step_kernels.panel_width,
        step_kernels.most_product_rows,
        step_kernels.most_soft_tokens,
    ]
    for function in cached:
        function.cache_clear()


@pytest.fixture(params=["AMX", "AVX512-BF16", "AVX512", "AVX2"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With each library that was compiled and that this processor runs."""
    own, wanted = torch.backends.cpu.get_cpu_capability(), "AVX2" if request.param == "AVX2" else "AVX512"
    matrices = request.param == "AMX"
    if own not in ("AVX512", "AVX2") or (wanted == "AVX512" and own == "AVX2"):
        pytest.skip(f"this processor has {own}")
    if matrices and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has no AMX")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: wanted)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrices)
    forget()
    if request.param == "AVX512":
        load = step_kernels._load
        others = {"_bfloat16_kernels"}
        monkeypatch.setattr(step_kernels, "_load", lambda name, *args: None if name in others else load(name, *args))
    elif request.param == "AVX512-BF16" and step_kernels.bfloat16_library() is None:
        pytest.skip("this processor does not multiply bfloat16, or nothing was compiled for that")
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


def skip_without_int8(kind: type[Int8Linear]) -> None:
    """Skip where there are no kernels for such layers on this processor."""
    if kind is Int8Linear and not step_kernels.panel_width(64, 64, torch.int8, ROWS_PACKED_FOR):
        pytest.skip("no products of 8 bits, or oneDNN packs otherwise on this processor")


def int8_model(kind: type[Int8Linear], family: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """One whose linear layers have weights of 8 bits, where there are kernels for those on this processor."""
    decoder = kernel_model(family, dtype)
    skip_without_int8(kind)
    freeze_linear_layers(decoder.transformer, kind)
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
