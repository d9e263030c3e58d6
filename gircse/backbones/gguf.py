"""A quantised GGUF file -> a folder that transformers loads as if it came from the hub.

Knows the two formats that the packaged backbones use: architecture `llama` with SmolLM's byte-level BPE, and `gemma3`
with a sentencepiece vocabulary. Knows nothing of packages, caches or checksums: `backbones.py` calls it once a file.

`AutoModel.from_pretrained(gguf_file=...)` would read such files too, but what comes out of it depends on the version of
transformers (blocks left packed or unpacked, Gemma's merges rebuilt one way or another, SmolLM's digit splitting lost),
and a checkpoint that names its backbone's checksum needs the same bytes everywhere. So the file is read with the `gguf`
library and what it does not say about the model is stated here.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gircse.errors import GircseError

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig

# Part of the cache's folder name: raise it whenever the files written for the same GGUF change.
CONVERSION_VERSION = 1

# Largest relative error that storing a weight in half precision may cause. Dequantised weights are a half-precision
# scale times a small integer, so float16 keeps 11 of at most 19 significant bits: a relative error of 2^-11 = 4.9e-4
# at worst (measured 4.88e-4 on both backbones; bfloat16 would cost 3.9e-3), far below what 4-bit quantisation has cost
# already, and the folder is half as large. A tensor that exceeds it is stored in float32.
MAX_RELATIVE_ERROR = 1e-3

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS_AFTER_ATTENTION = {
    "llama": {"ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}


def convert_gguf(gguf: Path, folder: Path, report: Callable[[int, int], None] | None = None) -> None:
    """Write `config.json`, `model.safetensors` and the tokenizer's files for one GGUF file into `folder`.

    The same file gives the same `model.safetensors` bytes on every machine. `config.json` says float32, because that is
    what the weights are to be computed in, whatever they are stored in.

    Args:
        gguf: A single-file GGUF of a known architecture.
        folder: An existing folder.
        report: Called with (bytes read, bytes in all) of the file's tensors.

    Raises:
        GircseError: The architecture or the tokenizer is not one that this file knows.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    architecture = meta["general.architecture"]
    if architecture not in _NORMS_AFTER_ATTENTION:
        raise GircseError(f"{gguf.name}: cannot convert GGUF architecture {architecture!r}, only llama and gemma3")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = (_llama_config if architecture == "llama" else _gemma3_config)(meta, tied)
    _save_tokenizer(meta, config, folder)

    weights: dict[str, np.ndarray] = {}
    total, done = sum(int(tensor.n_bytes) for tensor in reader.tensors), 0
    for tensor in reader.tensors:
        weights[_hf_name(tensor.name, architecture)] = _weight(tensor, architecture, config)
        done += int(tensor.n_bytes)
        if report is not None:
            report(done, total)
    # Tied embeddings are one tensor in the file and stay one: config.json says that the head shares it.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors makes it private to the user


def _hf_name(name: str, architecture: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    match = re.fullmatch(r"(blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<kind>weight|bias)", name)
    module = match and (_TENSORS | _NORMS_AFTER_ATTENTION[architecture]).get(match["module"])
    if not match or not module:
        raise GircseError(f"cannot convert the GGUF tensor {name!r} of architecture {architecture!r}")
    layer = f"model.layers.{match['layer']}." if match["layer"] is not None else ""
    return f"{layer}{module}.{match['kind']}"


def _weight(tensor: Any, architecture: str, config: PreTrainedConfig) -> np.ndarray:
    import numpy as np
    from gguf import dequantize

    weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    if architecture == "llama" and re.search(r"\.attn_[qk]\.", tensor.name):
        # RoPE: llama.cpp rotates neighbours of a head (0,1),(2,3).., transformers rotates halves (0,d/2),(1,d/2+1)..
        heads = config.num_attention_heads if ".attn_q." in tensor.name else config.num_key_value_heads
        pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
        weight = pairs.swapaxes(1, 2).reshape(weight.shape)
    elif architecture == "gemma3" and tensor.name.endswith("norm.weight"):
        weight = weight - 1  # the file holds what the norm multiplies by, transformers multiplies by 1 + weight
    return _compact(weight)


def _compact(weight: np.ndarray) -> np.ndarray:
    """The weight in float16 if that changes no element by more than `MAX_RELATIVE_ERROR` of it, else as it is."""
    import numpy as np

    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(weight, dtype=np.float16)
    blocks = max(1, weight.size >> 22)  # an embedding matrix of 0.7 GB is not to be copied five times at once
    for exact, rounded in zip(np.array_split(weight, blocks), np.array_split(half, blocks), strict=True):
        if not (np.abs(rounded.astype(np.float32) - exact) <= MAX_RELATIVE_ERROR * np.abs(exact)).all():
            return np.ascontiguousarray(weight)
    return half


def _decimal(value: float) -> float:
    """The decimal number that was meant by a float32 (1e-05, not 9.99999974e-06)."""
    import numpy as np

    return float(str(np.float32(value)))


def _common_config(meta: dict[str, Any], architecture: str, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": meta[f"{architecture}.embedding_length"],
        "intermediate_size": meta[f"{architecture}.feed_forward_length"],
        "num_hidden_layers": meta[f"{architecture}.block_count"],
        "num_attention_heads": meta[f"{architecture}.attention.head_count"],
        "num_key_value_heads": meta[f"{architecture}.attention.head_count_kv"],
        "max_position_embeddings": meta[f"{architecture}.context_length"],
        "rms_norm_eps": _decimal(meta[f"{architecture}.attention.layer_norm_rms_epsilon"]),
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "tie_word_embeddings": tied,
        "dtype": "float32",
    }


def _llama_config(meta: dict[str, Any], tied: bool) -> PreTrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        **_common_config(meta, "llama", tied),
        head_dim=meta["llama.rope.dimension_count"],
        rope_parameters={"rope_type": "default", "rope_theta": _decimal(meta["llama.rope.freq_base"])},
        architectures=["LlamaForCausalLM"],
    )


def _gemma3_config(meta: dict[str, Any], tied: bool) -> PreTrainedConfig:
    from transformers import Gemma3TextConfig

    layers, head_dim = meta["gemma3.block_count"], meta["gemma3.attention.key_length"]
    return Gemma3TextConfig(
        **_common_config(meta, "gemma3", tied),
        head_dim=head_dim,
        sliding_window=meta["gemma3.attention.sliding_window"],
        # The file does not carry what follows; every text model of the family has it (270M: scalar = head_dim).
        query_pre_attn_scalar=head_dim,
        hidden_activation="gelu_pytorch_tanh",
        layer_types=["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": _decimal(meta["gemma3.rope.freq_base"])},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        architectures=["Gemma3ForCausalLM"],
    )


def _save_tokenizer(meta: dict[str, Any], config: PreTrainedConfig, folder: Path) -> None:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    style = (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"])
    if style == ("gpt2", "smollm"):
        backend = _smollm_tokenizer(tokens, meta["tokenizer.ggml.merges"])
    elif style == ("llama", "default") and meta["general.architecture"] == "gemma3":
        backend = _gemma_tokenizer(tokens, kinds)
    else:
        raise GircseError(f"cannot convert a GGUF tokenizer of model {style[0]!r} and pre-tokenizer {style[1]!r}")
    for kind in (_CONTROL, _USER_DEFINED):
        added = [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, k in zip(tokens, kinds, strict=True)
            if k == kind and backend.token_to_id(token) is not None
        ]
        (backend.add_special_tokens if kind == _CONTROL else backend.add_tokens)(added)
    if meta.get("tokenizer.ggml.add_bos_token"):
        _prepend_bos(backend, tokens[config.bos_token_id], config.bos_token_id)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[config.bos_token_id],
        eos_token=tokens[config.eos_token_id],
        pad_token=tokens[config.pad_token_id],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        model_max_length=config.max_position_embeddings,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=meta.get("tokenizer.chat_template"),
    )
    tokenizer.save_pretrained(folder)


def _smollm_tokenizer(tokens: list[str], merges: list[str]) -> Tokenizer:
    """Byte-level BPE that splits off every digit first, so that numbers never merge with the spaces before them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gemma_tokenizer(tokens: list[str], kinds: list[int]) -> Tokenizer:
    """BPE over characters with byte fallback and `▁` for the space, as in Gemma's own `tokenizer.json`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    # The file spells runs of spaces as spaces; the text that reaches the vocabulary has `▁` in their place.
    spelled = [token if token.strip(" ") else "▁" * len(token) for token in tokens]
    vocab = {token: i for i, token in enumerate(spelled)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges_by_rank(spelled, kinds, vocab),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _merges_by_rank(tokens: list[str], kinds: list[int], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that a sentencepiece vocabulary implies: a token's rank is the priority of every way to make it.

    A sentencepiece file keeps no list of merges: any two neighbours whose concatenation is in the vocabulary may merge,
    and the one that comes first in the vocabulary merges first.
    """
    merges: list[tuple[str, str]] = []
    for token, kind in zip(tokens, kinds, strict=True):
        if kind not in (_NORMAL, _USER_DEFINED):
            continue
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(left, right) for left, right in splits if left in vocab and right in vocab]
        merges += sorted(known, key=lambda pair: (len(pair[0]), len(pair[1])))
    return merges


def _prepend_bos(tokenizer: Tokenizer, bos: str, bos_id: int) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
