"""Attention as this project's models compute it: transformers' ``sdpa`` with a few changes.

Knows transformers' attention functions; knows nothing of models or texts. On a CPU keys and values that several heads
share are not copied for each of them: PyTorch's attention needs no copies there. And PyTorch computes attention of
bfloat16 by small products that only AMX makes fast: without it, forward takes twice and backward five times as long as
in float32, so it is computed in float32 there. But for soft tokens: of a single query, the heads that share keys are
taken for so many queries of one head, which reads the keys once and needs half the cache. On a GPU padding sees
something: of rows that see nothing cuDNN's backward pass makes gradients that are no numbers where a prompt has 64
tokens (pytorch/pytorch#196678).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_torch_greater_or_equal

ATTENTION = "sdpa_float32_on_cpu"


def use_fastest_attention(backbone: PreTrainedModel) -> None:
    """Let a backbone that uses PyTorch's attention compute it in float32 where that is faster; others stay."""
    if backbone.config._attn_implementation == "sdpa":
        backbone.set_attn_implementation(ATTENTION)


def attention_dtype(transformer: nn.Module, states: Tensor) -> torch.dtype:
    """The dtype that keys and values are best kept in for the steps to come.

    Args:
        transformer: Whose attention reads them.
        states: Hidden states, with the dtype and the device of the keys.
    """
    implementation = getattr(transformer.config, "_attn_implementation", None)
    wide = implementation == ATTENTION and _is_faster_in_float32(states, transformer)
    config: Any = transformer.config
    heads = config.get_text_config().num_attention_heads
    shared = heads != (getattr(config.get_text_config(), "num_key_value_heads", None) or heads)
    return torch.float32 if wide and not (shared and _takes_heads_for_queries(states, transformer)) else states.dtype


def sdpa_float32_on_cpu(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Transformers' ``sdpa``; on a CPU without copies of shared keys and values, without AMX bfloat16 in float32.

    Args:
        module: The attention layer.
        query: (B, heads, N, d_head).
        key: (B, key-value heads, M, d_head), of the query's dtype or of float32.
        value: As `key`.
        attention_mask: (B, 1, N, M), of booleans or to be added, or None.
        **options: As for ``sdpa``.

    Returns:
        (B, N, heads, d_head) in the dtype of the query, and None for the weights.
    """
    shared = _are_shared_by_heads(query, key, options)
    if shared and _is_single(query, key, attention_mask, options) and _takes_heads_for_queries(query, module):
        mixed = attend_single_queries(query.squeeze(2), key, value, attention_mask, options.get("scaling"))
        return mixed.unsqueeze(1), None
    # transformers copies nothing where there is no mask or a single query.
    without_copies = shared and query.shape[2] > 1 and attention_mask is not None
    compute = _sdpa_of_shared_heads if without_copies else sdpa_attention_forward
    if not _is_faster_in_float32(query, module):
        return compute(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    out, weights = compute(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return out.to(query.dtype), weights


def _are_shared_by_heads(query: Tensor, key: Tensor, options: dict[str, Any]) -> bool:
    """Whether several heads of a CPU's queries share keys, and nothing is asked for that is not PyTorch's own.

    transformers copies keys for each head, as masked attention of shared heads falls back to a slow path on GPUs and in
    older versions of PyTorch: 2.6 takes three times as long.
    """
    return (
        is_torch_greater_or_equal("2.13", accept_dev=True)
        and query.device.type == "cpu"
        and query.shape[1] != key.shape[1]
        and all(options.get(name) is None for name in ("position_bias", "softcap", "cache"))
    )


def _is_single(query: Tensor, key: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether there is one query a head, all in one dtype, and a mask, if any, that is the same for all heads."""
    masked = attention_mask is not None
    one_mask = not masked or (attention_mask.shape[1] == 1 and attention_mask.dtype in (torch.bool, query.dtype))
    return query.shape[2] == 1 and query.dtype == key.dtype and one_mask and options.get("is_causal") is not True


def _takes_heads_for_queries(states: Tensor, module: nn.Module) -> bool:
    """Whether single queries of shared heads are computed in bfloat16, and so: at inference, float32 gains nothing."""
    inference = not (module.training or torch.is_grad_enabled())
    recent = is_torch_greater_or_equal("2.13", accept_dev=True)
    return inference and recent and states.dtype == torch.bfloat16 and states.device.type == "cpu"


def _sdpa_of_shared_heads(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def attend_single_queries(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """PyTorch's attention of one query a head and row; heads that share keys are taken for so many queries of one head.

    Args:
        query: (B, heads, d_head).
        keys: (B, key-value heads, M, d_head).
        values: As `keys`.
        mask: (B, 1, 1, M), of booleans or to be added to scores; None where all is seen.
        scaling: Of scores.

    Returns:
        (B, heads, d_head), in the dtype of the query.
    """
    batch, heads, width = query.shape
    grouped = query.to(keys.dtype).reshape(batch, keys.shape[1], -1, width)  # (B, key-value heads, g, d_head)
    mixed = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    return mixed.reshape(batch, heads, -1).to(query.dtype)


def multiply_single_queries(
    query: Tensor,
    columns: Tensor,
    values: Tensor,
    mask: Tensor,
    scaling: float,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `attend_single_queries`, on a CPU by batched products: heads that share keys share a product.

    With more than a few rows that is faster where keys lie in columns and nothing has to be copied: all of a buffer is
    multiplied, and the mask hides what is not there yet. A prefix that all rows begin with is read once for them all.

    Args:
        query: (B, heads, d_head).
        columns: Keys, (B, key-value heads, d_head, M), contiguous.
        values: (B, key-value heads, M, d_head), contiguous.
        mask: (B · key-value heads, 1, M), to be added to the scores of the row's own keys.
        scaling: Of scores.
        prefix: Keys and values that stand before all rows' own, (key-value heads, d_head, P) and (key-value heads, P,
            d_head).

    Returns:
        (B, heads, d_head), in the dtype of the query.
    """
    batch, heads, width = query.shape
    grouped = query.to(columns.dtype).reshape(batch * columns.shape[1], -1, width)  # (B · key-value heads, g, d_head)
    scores = torch.baddbmm(mask, grouped, columns.flatten(0, 1), alpha=scaling)  # (B · key-value heads, g, M)
    if prefix is None:
        mixed = torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1))
    else:
        together = _rows_together(grouped, batch)  # (key-value heads, B · g, d_head)
        first = torch.baddbmm(together.new_zeros(1), together, prefix[0], beta=0, alpha=scaling)
        both = torch.cat([_rows_apart(first, batch), scores], dim=-1).softmax(dim=-1)
        first, own = both.tensor_split([first.shape[-1]], dim=-1)
        mixed = _rows_apart(torch.bmm(_rows_together(first, batch), prefix[1]), batch)
        mixed.baddbmm_(own, values.flatten(0, 1))
    return mixed.reshape(batch, heads, width).to(query.dtype)


def _rows_together(x: Tensor, batch: int) -> Tensor:
    """(heads, B · g, d) from (B · heads, g, d)."""
    return x.unflatten(0, (batch, -1)).transpose(0, 1).flatten(1, 2)


def _rows_apart(x: Tensor, batch: int) -> Tensor:
    """(B · heads, g, d) from (heads, B · g, d)."""
    return x.unflatten(1, (batch, -1)).transpose(0, 1).flatten(0, 1)


def visible_mask(*args: Any, **options: Any) -> Tensor | None:
    """Transformers' mask for ``sdpa``; on a GPU one in which padding sees all positions, instead of none.

    What padding computes is read by nobody: its keys stay hidden from tokens.

    Args:
        *args: As for ``sdpa_mask``.
        **options: As for ``sdpa_mask``.

    Returns:
        (B, 1, N, M) of booleans, True where a token sees a position; None where a causal mask is all there is.
    """
    mask = sdpa_mask(*args, **options)
    return show_something(mask) if isinstance(mask, Tensor) and mask.is_cuda else mask


def show_something(mask: Tensor) -> Tensor:
    """A mask of booleans, (..., N, M), whose rows without a single True become True throughout."""
    return mask | ~mask.any(dim=-1, keepdim=True)


def _is_faster_in_float32(states: Tensor, module: nn.Module) -> bool:
    # AMX makes the forward pass faster, but not the backward pass of training (docs/experiments.md).
    return states.dtype == torch.bfloat16 and states.device.type == "cpu" and (module.training or not _has_amx())


@cache
def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


AttentionInterface.register(ATTENTION, sdpa_float32_on_cpu)
AttentionMaskInterface.register(ATTENTION, visible_mask)
