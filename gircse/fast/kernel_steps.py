"""The steps of a batch by compiled kernels: what `GroupedSteps` does between its products, in a few calls a layer.

Knows layers of Llama and families like it, and `step_kernels`; knows nothing of texts, pooling or losses. For
inference alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from gircse.decoders import Decoder
from gircse.fast import step_kernels
from gircse.fast.grouped_steps import GroupedSteps
from gircse.fast.norms import is_fused
from gircse.fast.whole_steps import WholeStep, takes_whole_steps


def takes_kernels(decoder: Decoder) -> bool:
    """Whether the kernels compute all that `GroupedSteps` does of a decoder that it takes.

    Never in training: a pass without gradients, as gradient caching begins with, has to round as the one with them.
    """
    transformer: Any = decoder.transformer
    layers = list(transformer.layers)
    width = layers[0].self_attn.head_dim
    sizes = width, transformer.config.hidden_size, transformer.config.intermediate_size
    dtype = decoder.vocabulary.embedding.weight.dtype
    norms = [transformer.norm, *(layer.input_layernorm for layer in layers)]
    norms += [layer.post_attention_layernorm for layer in layers]
    return (
        not (transformer.training or torch.is_grad_enabled())
        and step_kernels.serves(dtype, *sizes)
        and width <= step_kernels.MOST_WIDTH
        and all(isinstance(layer.mlp.act_fn, nn.SiLU | SiLUActivation) for layer in layers)
        and all(is_fused(norm) and norm.weight.dtype == dtype for norm in norms)
    )


class KernelSteps(GroupedSteps):
    """As `GroupedSteps`, of a decoder that `takes_kernels`.

    Args:
        decoder: Likewise.
        groups: At least one. The rows of all of them, in this order, are the batch.
    """

    def __init__(self, decoder: Decoder, groups: Sequence[KernelGroup]) -> None:
        super().__init__(decoder, groups)
        rows = sum(group.rows for group in groups)
        self._whole = WholeStep(decoder, groups) if takes_whole_steps(decoder, rows) else None

    def next_states(self, tokens: Tensor) -> Tensor:
        """As `GroupedSteps.next_states`."""
        if self._whole is not None:
            states = self._whole.next_states(tokens, self._turn(tokens))
            self._positions = self._positions + 1
            return states
        return super().next_states(tokens.clone())  # states are added to in place

    def _turn(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        wide = tokens.unsqueeze(1).float()
        cos, sin = self._transformer.rotary_emb(wide, position_ids=self._positions)  # (B, 1, d_head)
        return cos.contiguous(), sin.contiguous()

    def _turned(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        step_kernels.turn(x, *turn)
        return x

    def _add_and_norm(self, states: Tensor, new: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        return states, step_kernels.add_and_norm(states, new, norm.weight, norm.variance_epsilon)

    def _gated(self, module: Any, gate: Tensor, up: Tensor) -> Tensor:
        return step_kernels.gate(gate, up)


class KernelGroup:
    """A `gircse.fast.grouped_steps.StepGroup` whose keys and values lie in rows, without padding being read.

    Args:
        cache: Of every layer, as `JoinedPrompts.buffers` gives them, with room for all soft tokens.
        mask: (b, N), 1 for the prompt's tokens in the cache and 0 for the padding before them.
        prefix: Of every layer, keys and values of what all prompts begin with and is not in the cache, (key-value
            heads, P, d_head) each; may be empty.

    Attributes:
        rows, starts, length, cache, prefix: As of `gircse.fast.whole_steps.Rows`.
        positions: (rows, 1): that of the first soft token.
    """

    def __init__(
        self, cache: Sequence[tuple[Tensor, Tensor]], mask: Tensor, prefix: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> None:
        self.cache, self.prefix = cache, prefix
        self.rows, self.length = mask.shape
        own = mask.sum(dim=1)  # (b,)
        self.starts = self.length - own
        self.positions = own.unsqueeze(1) + (prefix[0][0].shape[1] if prefix else 0)

    def keep(self, rows: int) -> None:
        """As `StepGroup.keep`."""
        self.cache = [(keys[:rows], values[:rows]) for keys, values in self.cache]
        self.starts, self.rows = self.starts[:rows], rows

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """As `StepGroup.attend`."""
        if index == 0:
            self.length += 1
        if not self.rows:
            return query
        prefix = self.prefix[index] if self.prefix else None
        return step_kernels.attend(query, key, value, self.cache[index], self.starts, self.length - 1, scaling, prefix)
