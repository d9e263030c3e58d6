"""Tiny randomly initialised decoders of every family that the parity matrix covers, and a tiny tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB = 97
HIDDEN = 32

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,  # a padding row would get no gradient from the embedding module, but does from the soft token
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _config(make: type, **changes: Any) -> Callable[[], Any]:
    return lambda: make(**{**_BASE, **changes})


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _config(tf.LlamaConfig),
    "llama-scaled-positions": _config(
        tf.LlamaConfig,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama-tied": _config(tf.LlamaConfig, tie_word_embeddings=True),
    "qwen2": _config(tf.Qwen2Config),
    "qwen3": _config(tf.Qwen3Config, head_dim=8),
    # The window is shorter than the prompts, so that keys leave it during the soft tokens as well.
    "mistral-sliding": _config(tf.MistralConfig, sliding_window=5),
    "mistral": _config(tf.MistralConfig, sliding_window=None),
    "mistral-wide": _config(tf.MistralConfig, sliding_window=40),
    "smollm3": _config(tf.SmolLM3Config, no_rope_layer_interval=2),
    "gemma": _config(tf.GemmaConfig, head_dim=8),
    "gemma2-softcap": _config(
        tf.Gemma2Config, head_dim=8, sliding_window=5, final_logit_softcapping=3.0, attn_logit_softcapping=5.0
    ),
    "gemma3-scaled": _config(
        tf.Gemma3TextConfig, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "granite-multipliers": _config(
        tf.GraniteConfig,
        embedding_multiplier=3.0,
        logits_scaling=2.5,
        residual_multiplier=0.7,
        attention_multiplier=0.3,
    ),
    "cohere-scaled-logits": _config(tf.CohereConfig, logit_scale=0.25),
    "olmo2": _config(tf.Olmo2Config),
    "phi": _config(tf.PhiConfig, num_key_value_heads=4),
    "phi3": _config(tf.Phi3Config, sliding_window=None),
    "gpt-neox": _config(tf.GPTNeoXConfig, use_parallel_residual=True),
    "gpt2-learned-positions": lambda: tf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def tiny_model(family: str = "llama", seed: int = 0) -> tf.PreTrainedModel:
    """A float32 causal LM with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return tf.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()


def tiny_tokenizer() -> tf.PreTrainedTokenizerFast:
    """Characters as tokens: enough for any text, and every length is easy to see."""
    alphabet = [chr(code) for code in range(32, 32 + VOCAB - 4)]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def tiny_backbone(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """A backbone's folder as the hub would give it."""
    tiny_model(family, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_batch(lengths: list[int], *, side: str = "left", seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids (B, N) and their mask, padded on either side."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        tokens = torch.randint(4, VOCAB, (length,), generator=generator)
        place = slice(longest - length, longest) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = tokens, 1
    return ids, mask


def instructed_batch(lengths: list[int], shared: int, *, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """As `random_batch`, every row behind the same `shared` tokens, as behind an instruction."""
    ids, mask = random_batch([length + shared for length in lengths], side=side)
    for row, length in enumerate(lengths):
        start = ids.shape[1] - length - shared if side == "left" else 0
        ids[row, start : start + shared] = torch.arange(shared) + 5
    return ids, mask


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of `a` against `b`, by their norms."""
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))
