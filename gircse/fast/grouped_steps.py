"""Soft tokens of several groups of prompts at once: products over all rows, attention of each group over its own cache.

Knows the layers of Llama and of families that are built like it; knows nothing of texts, pooling or losses.
transformers' own pass wants one cache for all rows, padded to the longest prompt. On a CPU a step of few rows waits for
the weights, and one over many padded rows for keys of padding: here a batch holds as many rows as its tokens allow. Of
what transformers computes around its products, much of it once a layer, a step does what a single token needs: a third
of the operations. The results are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gircse.attention import ATTENTION, attend_single_queries, multiply_single_queries
from gircse.decoders import Decoder
from gircse.fast.packed_linear import KernelLinear

LLAMA_LIKE = frozenset({"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"})
"""The transformers classes whose layers `GroupedSteps` computes, all with rotary positions and RMS norms."""


def takes_groups(decoder: Decoder) -> bool:
    """Whether soft tokens of this decoder are written by groups: on a CPU, in a family that is known.

    Layers that someone has hooked or changed stay with transformers' own pass, as do those with a sliding window or, in
    training, dropout of attention.
    """
    transformer: Any = decoder.transformer
    drops = transformer.training and getattr(transformer.config, "attention_dropout", 0.0)
    return (
        not drops
        and not torch.is_autocast_enabled("cpu")
        and decoder.vocabulary.embedding.weight.device.type == "cpu"
        and decoder.window is None
        and type(transformer).__name__ in LLAMA_LIKE
        and transformer.config._attn_implementation in (ATTENTION, "sdpa")
        and not any(_is_changed(module) for module in _computed_here(transformer))
    )


def _computed_here(transformer: Any) -> list[nn.Module]:
    """The modules whose own `forward` is not called any more."""
    layers = list(transformer.layers)
    return [transformer, *layers, *(part for layer in layers for part in (layer.self_attn, layer.mlp))]


def _is_changed(module: nn.Module) -> bool:
    """Hooked, replaced, or wrapped by what shards its weights."""
    known = type(module).__module__.startswith("transformers.models.")
    return not known or bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


class StepGroup(Protocol):
    """Rows whose prompts are of similar length, and what their soft tokens attend to.

    Attributes:
        rows: How many.
        positions: (rows, 1): that of the first soft token.
    """

    rows: int
    positions: Tensor

    def keep(self, rows: int) -> None:
        """Let all but the first rows leave."""
        ...

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """What the queries of new soft tokens find in a layer, once the tokens' own keys and values are there.

        Args:
            index: Of the layer; every step asks the first one first.
            query: (rows, heads, d_head).
            key: (rows, key-value heads, d_head).
            value: As `key`.
            scaling: Of scores.

        Returns:
            (rows, heads, d_head), in the dtype of the query.
        """
        ...


class GroupedSteps:
    """The steps of a batch, one after the other. Differentiable where its groups are.

    Args:
        decoder: One that `takes_groups`.
        groups: At least one. The rows of all of them, in this order, are the batch.
    """

    def __init__(self, decoder: Decoder, groups: Sequence[StepGroup]) -> None:
        self._transformer: Any = decoder.transformer
        self._groups = groups
        self._positions = torch.cat([group.positions for group in groups])  # (B, 1)

    def keep(self, rows: Sequence[int]) -> Tensor:
        """Let the last rows of every group leave.

        Args:
            rows: How many stay, of each group.

        Returns:
            (B',): where those that stay were among all rows.
        """
        places, start = [], 0
        for group, kept in zip(self._groups, rows, strict=True):
            places.append(torch.arange(start, start + kept))
            start += group.rows
            group.keep(kept)
        kept_places = torch.cat(places)
        self._positions = self._positions[kept_places]
        return kept_places

    def next_states(self, tokens: Tensor) -> Tensor:
        """One soft token of every row through all layers.

        Args:
            tokens: (B, d).

        Returns:
            h_k, (B, d).
        """
        turn = self._turn(tokens)
        states, new = tokens, None  # what the last part of a layer adds to the states
        for index, layer in enumerate(self._transformer.layers):
            states, normed = self._add_and_norm(states, new, layer.input_layernorm)
            new = self._attention(layer.self_attn, index, normed, turn)
            states, normed = self._add_and_norm(states, new, layer.post_attention_layernorm)
            gate, up = products(normed, layer.mlp.gate_proj, layer.mlp.up_proj)
            new = products(self._gated(layer.mlp, gate, up), layer.mlp.down_proj)[0]
        self._positions = self._positions + 1
        return self._add_and_norm(states, new, self._transformer.norm)[1]

    def _turn(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the new positions, as `_turned` takes them."""
        cos, sin = self._transformer.rotary_emb(tokens.unsqueeze(1), position_ids=self._positions)  # (B, 1, d_head)
        half = sin.shape[-1] // 2
        return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)

    def _turned(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Rotary positions, (B, heads, d_head); the first half of the sines has its sign changed."""
        cos, signed_sin = turn
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)

    def _add_and_norm(self, states: Tensor, new: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """The sum of both, (B, d), and its norm."""
        states = states if new is None else states + new
        return states, norm(states)

    def _gated(self, module: Any, gate: Tensor, up: Tensor) -> Tensor:
        return module.act_fn(gate) * up

    def _attention(self, module: Any, index: int, states: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """(B, d), of the layer with this index."""
        projected = products(states, module.q_proj, module.k_proj, module.v_proj)
        batch = states.shape[0]
        query, key, value = (x.view(batch, -1, module.head_dim) for x in projected)  # (B, heads, d_head)
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        query, key = self._turned(query, turn), self._turned(key, turn)
        if len(self._groups) == 1:
            mixed = self._groups[0].attend(index, query, key, value, module.scaling)
        else:
            rows = [group.rows for group in self._groups]
            parts = zip(self._groups, query.split(rows), key.split(rows), value.split(rows), strict=True)
            mixed = torch.cat([group.attend(index, q, k, v, module.scaling) for group, q, k, v in parts])
        return products(mixed.view(batch, -1), module.o_proj)[0]


class DecodeGroup:
    """A `StepGroup` at inference: keys and values are written into a cache.

    Args:
        cache: Of every layer, as `JoinedPrompts.buffers` gives them, with room for all soft tokens.
        mask: (b, N), 1 for the prompt's tokens in the cache and 0 for the padding before them.
    """

    def __init__(self, cache: Sequence[tuple[Tensor, Tensor]], mask: Tensor) -> None:
        self._cache = cache
        self.rows, self._length = mask.shape
        self.positions = mask.sum(dim=1, keepdim=True)
        _, values = cache[0]
        hidden = values.new_full((self.rows, 1, 1, values.shape[2]), float("-inf"))
        hidden[..., : self._length].masked_fill_(mask[:, None, None] == 1, 0)
        self._mask = hidden  # (b, 1, 1, N + K)

    def keep(self, rows: int) -> None:
        """As `StepGroup.keep`."""
        self._cache = [(keys[:rows], values[:rows]) for keys, values in self._cache]
        self._mask, self.rows = self._mask[:rows], rows

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """As `StepGroup.attend`."""
        if index == 0:  # the next position is seen from here on
            self._mask[..., self._length] = 0
            self._length += 1
        return self._attend(index, query, key, value, scaling) if self.rows else query

    def _attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = (buffer[:, :, : self._length] for buffer in self._cache[index])
        keys[:, :, -1] = key
        values[:, :, -1] = value
        return attend_single_queries(query, keys, values, self._mask[..., : self._length], scaling)


class ProductsDecodeGroup(DecodeGroup):
    """A `DecodeGroup` by `multiply_single_queries`.

    Args:
        cache: As of `DecodeGroup`, with keys in columns.
        mask: Likewise.
        prefix: Of every layer, as `multiply_single_queries` takes it: what all prompts begin with, where it is not in
            the cache; may be empty.
    """

    def __init__(
        self, cache: Sequence[tuple[Tensor, Tensor]], mask: Tensor, prefix: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> None:
        super().__init__(cache, mask)
        self._prefix = prefix
        self.positions = self.positions + (prefix[0][0].shape[-1] if prefix else 0)
        self._mask = self._mask.repeat_interleave(cache[0][0].shape[1], dim=1)  # (b, key-value heads, 1, N + K)

    def _attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        columns, values = self._cache[index]
        columns[..., self._length - 1] = key
        values[:, :, self._length - 1] = value
        prefix = self._prefix[index] if self._prefix else None
        return multiply_single_queries(query, columns, values, self._mask.flatten(0, 1), scaling, prefix)


def products(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """What linear layers make of the same rows; at once, where they have a way to (`gircse.train.fused_lora`)."""
    together = vars(layers[0]).get("forward_together")
    if together is not None:
        return together(x, layers)
    packed = [layer for layer in layers if isinstance(layer, KernelLinear)]
    return KernelLinear.products(x, packed) if len(packed) == len(layers) else [layer(x) for layer in layers]
