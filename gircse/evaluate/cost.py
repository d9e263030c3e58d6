"""What an embedding costs: floating point operations by formula, seconds by the clock.

Knows the sizes of decoders and encoders, and when a model's modules run; knows nothing of tasks or files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gircse.refiner import told_of_states

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from gircse.model import GIRCSE


@dataclass(frozen=True)
class TransformerSize:
    """What the count of operations depends on.

    Attributes:
        parameters: P, of the layers, without embedding table and LM head.
        layers: L.
        attention_width: a, heads × head dimension.
        vocabulary: V, entries of the LM head; 0 where none is used.
        width: d, of the hidden states.
        causal: Whether a token attends only to earlier ones.
    """

    parameters: int
    layers: int
    attention_width: int
    vocabulary: int
    width: int
    causal: bool

    def flops(self, tokens: np.ndarray | float, num_steps: int = 0) -> np.ndarray | float:
        """Floating point operations of one embedding; a multiplication and an addition count as two.

            prompt pass     2·P·N + 4·L·a·N²  (half of the attention term where it is causal)
            step k          4·V·d             logits (2·V·d) and their mix of the embedding table (2·V·d)
                          + 2·P + 4·L·a·(N + k)   one token through the layers, attending to N + k

        Normalisations, activations, softmax and padding are left out; so is what a shared instruction saves.

        Args:
            tokens: N, tokens of the prompt; an array gives an array.
            num_steps: K.
        """
        attention = 4 * self.layers * self.attention_width
        prompt = 2 * self.parameters * tokens + attention * tokens**2 * (0.5 if self.causal else 1.0)
        one_step = 4 * self.vocabulary * self.width + 2 * self.parameters + attention * tokens
        return prompt + num_steps * one_step + attention * num_steps * (num_steps + 1) / 2


def transformer_size(model: SentenceTransformer) -> TransformerSize | None:
    """Sizes of a model's transformer; None where its parts are not told apart."""
    from gircse.encoder import GenerativeEncoder
    from gircse.fast.frozen_linear import FrozenLinear

    first: Any = model[0]
    generative = isinstance(first, GenerativeEncoder)
    transformer = first.decoder.transformer if generative else getattr(first, "auto_model", None)
    config: Any = getattr(transformer, "config", None)
    if transformer is None or not hasattr(config, "num_attention_heads"):
        return None
    frozen = sum(m.in_features * m.out_features for m in transformer.modules() if isinstance(m, FrozenLinear))
    embeddings = {id(p) for m in transformer.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    heads, width = int(config.num_attention_heads), int(config.hidden_size)
    return TransformerSize(
        parameters=frozen + sum(p.numel() for p in transformer.parameters() if id(p) not in embeddings),
        layers=int(config.num_hidden_layers),
        attention_width=heads * int(getattr(config, "head_dim", None) or width // heads),
        vocabulary=int(first.decoder.vocabulary.embedding.num_embeddings) if generative else 0,
        width=width,
        causal=generative and first.refinement.attention == "causal",
    )


@contextmanager
def step_clock(model: GIRCSE, num_steps: int) -> Iterator[np.ndarray]:
    """Seconds that a run needs to reach each step, read off one run at the largest K.

    Yields:
        (K + 1,) seconds, filled while the model runs: entry k sums, over batches, the time from the start of a batch
        to its k-th state. What comes before and after the module (tokenising, copying) is not in it.
    """
    seconds = np.zeros(num_steps + 1)
    cuda = model.device.type == "cuda"
    started = 0.0

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(*_: Any) -> None:
        nonlocal started
        started = now()

    def reached(step: int) -> None:
        seconds[step] += now() - started

    # A hook of the layers would have them run without what makes them fast; this one is of the module around them.
    hook = model.encoder.register_forward_pre_hook(begin)
    try:
        with told_of_states(reached):
            yield seconds
    finally:
        hook.remove()
