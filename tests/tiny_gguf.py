"""Tiny GGUF files, written the way llama.cpp's converter writes them, and the models that they hold."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, dequantize, quantize
from tokenizers import pre_tokenizers

MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LLAMA_MODULES = MODULES | {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
GEMMA_MODULES = MODULES | {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}

SMOLLM_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SMOLLM_MERGES = ["Ġ Ġ", "Ġ 4", "4 5", "Ġ t", "Ġt h"]
SMOLLM_TOKENS = [
    *SMOLLM_SPECIAL,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in SMOLLM_MERGES),
]
GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
GEMMA_TOKENS = [
    *GEMMA_SPECIAL,
    *(f"<0x{i:02X}>" for i in range(256)),
    *("\n\n", "  "),  # user-defined: a run of newlines, and of spaces
    *("▁t", "he", "▁the", "th"),  # in the order in which they merge
    *("▁", "\n", *"abcdefghijklmnopqrstuvwxyz"),
]

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-3,
}


@cache
def llama() -> tf.PreTrainedModel:
    """Two layers, grouped-query attention, tied embeddings, a rotary base that is nobody's default."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        **SIZES,
        vocab_size=len(SMOLLM_TOKENS),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
        tie_word_embeddings=True,
    )
    return _storable(tf.LlamaForCausalLM(config))


@cache
def gemma3() -> tf.PreTrainedModel:
    """Seven layers, of which the sixth attends to all and the others to four tokens."""
    torch.manual_seed(0)
    config = tf.Gemma3TextConfig(
        **SIZES,
        vocab_size=len(GEMMA_TOKENS),
        num_hidden_layers=7,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=4,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        layer_types=[*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
    )
    model = tf.Gemma3ForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:  # they start at zero, where a forgotten offset might go unseen
            torch.nn.init.normal_(weight, std=0.5)
    return _storable(model)


def write_llama(path: Path) -> Path:
    """`llama()` with a tokenizer of SmolLM's kind."""
    writer = _writer(path, llama(), "llama")
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(SMOLLM_TOKENS)
    writer.add_token_types([TokenType.CONTROL if t in SMOLLM_SPECIAL else TokenType.NORMAL for t in SMOLLM_TOKENS])
    writer.add_token_merges(SMOLLM_MERGES)
    _add_special_ids(writer, unk=0, bos=1, eos=2, pad=2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, weight in llama().named_parameters():
        array = weight.detach().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # the order of llama.cpp's rotary embedding
            array = array.reshape(-1, 2, 8, 64).swapaxes(1, 2).reshape(array.shape)
        _add_tensor(writer, name, array, LLAMA_MODULES)
    return finish(writer, path)


def write_gemma3(path: Path) -> Path:
    """`gemma3()` with a sentencepiece vocabulary."""
    writer = _writer(path, gemma3(), "gemma3")
    writer.add_key_length(32)
    writer.add_sliding_window(4)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(GEMMA_TOKENS)
    writer.add_token_scores([-float(i) for i in range(len(GEMMA_TOKENS))])
    kinds = dict.fromkeys(GEMMA_SPECIAL, TokenType.CONTROL) | dict.fromkeys(("\n\n", "  "), TokenType.USER_DEFINED)
    writer.add_token_types(
        [TokenType.BYTE if t.startswith("<0x") else kinds.get(t, TokenType.NORMAL) for t in GEMMA_TOKENS]
    )
    _add_special_ids(writer, pad=0, eos=1, bos=2, unk=3)
    writer.add_add_bos_token(True)
    for name, weight in gemma3().named_parameters():
        array = weight.detach().numpy()
        _add_tensor(writer, name, array + 1 if "norm" in name else array, GEMMA_MODULES)
    return finish(writer, path)


def finish(writer: GGUFWriter, path: Path) -> Path:
    """Write what the writer has collected."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _storable(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """The model with weights that float16 holds exactly, and embeddings that were quantised to 8 bits before."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                quantised = quantize(weight.numpy(), GGMLQuantizationType.Q8_0)
                weight.copy_(torch.from_numpy(dequantize(quantised, GGMLQuantizationType.Q8_0)))
            elif "norm" in name:
                weight.copy_((weight * 256).round() / 256)  # so that adding one and taking it away is exact
            else:
                weight.copy_(weight.half().float())
    return model.eval()


def _writer(path: Path, model: tf.PreTrainedModel, architecture: str) -> GGUFWriter:
    config: Any = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    return writer


def _add_special_ids(writer: GGUFWriter, *, bos: int, eos: int, unk: int, pad: int) -> None:
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_unk_token_id(unk)
    writer.add_pad_token_id(pad)


def _add_tensor(writer: GGUFWriter, name: str, array: np.ndarray, modules: dict[str, str]) -> None:
    array = np.ascontiguousarray(array)
    if name == "model.embed_tokens.weight":
        quantised = quantize(array, GGMLQuantizationType.Q8_0)
        writer.add_tensor("token_embd.weight", quantised, raw_dtype=GGMLQuantizationType.Q8_0)
    elif name == "model.norm.weight":
        writer.add_tensor("output_norm.weight", array)
    else:
        _, _, layer, module = name.removesuffix(".weight").split(".", 3)
        writer.add_tensor(f"blk.{layer}.{modules[module]}.weight", array)
