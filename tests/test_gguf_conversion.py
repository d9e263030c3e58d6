"""A converted GGUF computes what its model did, and tokenises as its vocabulary says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from gguf import GGUFWriter
from safetensors.numpy import load_file

from gircse.backbones.gguf import _compact, convert_gguf
from gircse.backbones.resolve import resolve_backbone, weights_checksum
from gircse.errors import GircseError
from tests import tiny_gguf

Family = tuple[Callable[[], tf.PreTrainedModel], Callable[[Path], Path]]
FAMILIES: list[Family] = [
    (tiny_gguf.llama, tiny_gguf.write_llama),
    (tiny_gguf.gemma3, tiny_gguf.write_gemma3),
]


def load_completely(folder: Path) -> Any:
    """The folder's model, in which every weight is from the file and every weight of the file is used."""
    model, info = tf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)  # pyright: ignore
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    return model


@pytest.mark.parametrize(("model", "write"), FAMILIES)
def test_conversion_keeps_what_the_model_computes(model: Any, write: Any, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    convert_gguf(write(tmp_path / "tiny.gguf"), tmp_path, lambda *step: steps.append(step))
    ids = torch.arange(3, 23).unsqueeze(0)  # longer than Gemma's sliding window
    with torch.no_grad():
        logits, expected = load_completely(tmp_path)(ids).logits, model()(ids).logits
    assert (logits - expected).norm() / expected.norm() < 2e-3  # 8-bit embeddings are rounded to half precision
    weights = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {np.dtype(np.float16)}
    assert set(weights) == {name for name, _ in model().named_parameters()}, "tied embeddings are stored once"
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize(("model", "write"), FAMILIES)
def test_conversion_agrees_with_the_reader_of_transformers(model: Any, write: Any, tmp_path: Path) -> None:
    gguf = write(tmp_path / "tiny.gguf")
    convert_gguf(gguf, tmp_path)
    (tmp_path / "theirs").mkdir()
    gguf = gguf.rename(tmp_path / "theirs" / gguf.name)
    theirs = tf.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    expected = theirs.state_dict()
    for name, weight in load_completely(tmp_path).state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=0)


def test_conversion_gives_the_same_bytes(tmp_path: Path) -> None:
    gguf = tiny_gguf.write_llama(tmp_path / "tiny.gguf")
    for name in "ab":
        (tmp_path / name).mkdir()
        convert_gguf(gguf, tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_weights_that_half_precision_cannot_hold_stay_float32() -> None:
    assert _compact(np.array([[1.0, -0.1], [3e-4, 0.0]], dtype=np.float32)).dtype == np.float16
    for bad in (1e-7, 1e6):  # too small for it, too large for it
        weight = np.array([1.0, bad], dtype=np.float32)
        np.testing.assert_array_equal(_compact(weight), weight)
        assert _compact(weight).dtype == np.float32


def test_smollm_tokenizer_splits_digits_before_anything_merges(tmp_path: Path) -> None:
    convert_gguf(tiny_gguf.write_llama(tmp_path / "tiny.gguf"), tmp_path)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("a  456 th") == ["a", "ĠĠ", "4", "5", "6", "Ġth"]
    assert tokenizer("<|im_start|>x<|im_end|>").input_ids == [1, tiny_gguf.SMOLLM_TOKENS.index("x"), 2]
    text = "Ünïcode 日本\n\t x  4"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (64, "right")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_gemma_tokenizer_merges_by_rank_and_falls_back_to_bytes(tmp_path: Path) -> None:
    convert_gguf(tiny_gguf.write_gemma3(tmp_path / "tiny.gguf"), tmp_path)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("the the") == ["t", "he", "▁the"]  # `he` comes before `th` in the vocabulary
    assert tokenizer("ab").input_ids[0] == tokenizer.bos_token_id == 2
    assert tokenizer.tokenize("a  b\n\né") == ["a", "▁▁", "b", "\n\n", "<0xC3>", "<0xA9>"]
    text = "the  é\n\n日"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    with pytest.raises(GircseError, match="mamba"):
        convert_gguf(tiny_gguf.finish(writer, tmp_path / "x.gguf"), tmp_path)


# The real 135M backbone, in the user's own cache.


@pytest.mark.real_model
def test_smollm_weights_are_the_recorded_ones() -> None:
    """Checkpoints name this checksum: where it changes, `CONVERSION_VERSION` must rise."""
    found = resolve_backbone("smollm2-135m")
    assert weights_checksum(found.path) == "d8d8571b3af99053c8ad455ce009d8479eec5da515f80a417c075d0a7f317904"
    assert (found.sha256, found.licence) == (weights_checksum(found.path), "apache-2.0")


@pytest.mark.real_model
def test_smollm_tokenizes_and_knows_the_capital_of_france() -> None:
    folder = resolve_backbone("smollm2-135m").path
    tokenizer, model = tf.AutoTokenizer.from_pretrained(folder), load_completely(folder)
    assert tokenizer.tokenize("abc123  456") == ["abc", "1", "2", "3", "ĠĠ", "4", "5", "6"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert "<|im_start|>assistant" in str(tokenizer.chat_template)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 100_000.0}
    assert model.config.rms_norm_eps == 1e-5
    batch = tokenizer("The capital of France is", return_tensors="pt")
    assert batch["input_ids"].tolist() == [[504, 3575, 282, 4649, 314]]
    with torch.no_grad():
        logits = model(**batch).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"
    # What transformers' own reader of the GGUF gives for this prompt, without the rounding to half precision.
    assert logits.max().item() == pytest.approx(17.371, abs=0.02)
