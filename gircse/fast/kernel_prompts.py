"""A prompt pass on a CPU that computes what lies between its products by compiled kernels.

Knows layers of Llama and families like it, and `step_kernels`; knows nothing of texts, pooling or losses. For
inference alone. transformers writes gates, norms and positions as some twenty operations a layer, each of which goes
through all states of the prompts in memory: a third of the pass, where products are fast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from gircse.attention import sdpa_float32_on_cpu
from gircse.decoders import Decoder
from gircse.fast import step_kernels
from gircse.fast.grouped_steps import products


def prompt_states(
    decoder: Decoder,
    ids: Tensor,
    mask: Tensor,
    cache: DynamicCache | None,
    *,
    two_sided: bool = False,
    last_alone: bool = False,
) -> Tensor:
    """The last hidden states of prompts, as the decoder's own pass gives them.

    Args:
        decoder: One that `gircse.fast.kernel_steps.takes_kernels`.
        ids: (b, N) token ids, padded on the left.
        mask: (b, P + N): 1 for the P positions that the cache has, and for tokens, 0 for padding.
        cache: Filled; None keeps nothing.
        two_sided: Whether a token sees those after it too.
        last_alone: Whether the last token's states are all that is wanted: the last layer then computes no others.

    Returns:
        (b, N, d), or (b, 1, d).
    """
    transformer: Any = decoder.transformer
    rows, length = ids.shape
    states = transformer.embed_tokens(ids).flatten(0, 1)  # (b · N, d)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -length:]  # counted from each row's first token
    cos, sin = transformer.rotary_emb(states.float().view(rows, length, -1), position_ids=positions)  # (b, N, d_head)
    turn = cos.flatten(0, 1).contiguous(), sin.flatten(0, 1).contiguous()
    hidden = _hidden(mask, length, states.dtype, two_sided=two_sided)
    new = None
    for index, layer in enumerate(transformer.layers):
        alone = last_alone and index + 1 == len(transformer.layers)
        module = layer.self_attn
        normed = _add_and_norm(states, new, layer.input_layernorm)
        projected = products(normed, module.q_proj, module.k_proj, module.v_proj)
        query, key, value = (x.view(rows * length, -1, module.head_dim) for x in projected)
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        step_kernels.turn(query, *turn)
        step_kernels.turn(key, *turn)
        query, key, value = (x.unflatten(0, (rows, length)).transpose(1, 2) for x in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value, index)
        seen = hidden
        if alone:
            query, states = query[:, :, -1:], states.view(rows, length, -1)[:, -1].contiguous()
            seen = None if hidden is None else hidden[:, :, -1:]
        causal = not (two_sided or alone)
        mixed, _ = sdpa_float32_on_cpu(module, query, key, value, seen, scaling=module.scaling, is_causal=causal)
        new = products(mixed.reshape(len(states), -1), module.o_proj)[0]
        normed = _add_and_norm(states, new, layer.post_attention_layernorm)
        gate, up = products(normed, layer.mlp.gate_proj, layer.mlp.up_proj)
        new = products(step_kernels.gate(gate, up), layer.mlp.down_proj)[0]
    return _add_and_norm(states, new, transformer.norm).view(rows, -1, states.shape[-1])


def _add_and_norm(states: Tensor, new: Tensor | None, norm: Any) -> Tensor:
    return step_kernels.add_and_norm(states, new, norm.weight, norm.variance_epsilon)


def _hidden(mask: Tensor, length: int, dtype: torch.dtype, *, two_sided: bool) -> Tensor | None:
    """To be added to scores, (b, 1, N, P + N); None where there is no padding and the rest goes by itself."""
    whole = bool(mask.all())
    if whole and (two_sided or mask.shape[1] == length):
        return None
    seen = mask.bool()[:, None, None, :]  # (b, 1, 1, P + N)
    if not two_sided:
        places = torch.arange(mask.shape[1])
        seen = seen & (places <= places[-length:, None])
    seen = seen.expand(-1, -1, length, -1)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
