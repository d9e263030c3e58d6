"""What soft tokens are made of: the heaviest vocabulary entries of each, how far it moved the vector, and their mean.

Knows a model and its decoder; knows nothing of files or how it is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from gircse.pooling import pool_steps
from gircse.refiner import refine

if TYPE_CHECKING:
    from gircse.model import GIRCSE


@dataclass(frozen=True)
class SoftTokenContent:
    """What one soft token is made of.

    Attributes:
        step: 1 for the soft token that follows the prompt.
        tokens: The heaviest vocabulary entries as text, heaviest first.
        weights: Their weights in the softmax, in the same order.
        entropy: Of the whole distribution, in nats; 0 is a single token, log V no preference at all.
        movement: 1 − cos(z_{k−1}, z_k): how far this step moved the embedding; None for the first.
    """

    step: int
    tokens: list[str]
    weights: list[float]
    entropy: float
    movement: float | None


@torch.inference_mode()
def soft_token_contents(
    model: GIRCSE, text: str, prompt: str | None, num_steps: int, top: int, max_length: int | None = None
) -> list[SoftTokenContent]:
    """One entry for each of K soft tokens about a text; arguments as in `GIRCSE.explain`."""
    model.eval()
    encoder = model.encoder
    decoder = encoder.settled_decoder()
    features = encoder.pad(model.tokenize_texts([text], prompt, max_length).ids)
    features = {name: value.to(model.device) for name, value in features.items()}
    temperature = encoder.refinement.temperature
    ids, mask = features["input_ids"], features["attention_mask"]
    reading = encoder.refinement.reading
    states = refine(decoder, ids, mask, num_steps=num_steps, temperature=temperature, reading=reading)[0]  # (K + 1, d)
    probabilities = decoder.vocabulary.probabilities(states[:-1], temperature)  # (K, V)
    weights, heaviest = probabilities.topk(min(top, probabilities.shape[-1]), dim=-1)
    entropies = torch.special.entr(probabilities).sum(dim=-1)
    pooled = F.normalize(pool_steps(states[None], encoder.refinement.pooling)[0], dim=-1)
    moved = [None, *(1 - (pooled[:-1] * pooled[1:]).sum(dim=-1)).tolist()]
    return [
        SoftTokenContent(
            step=step + 1,
            tokens=[str(encoder.tokenizer.decode([token])) for token in heaviest[step].tolist()],
            weights=weights[step].tolist(),
            entropy=float(entropies[step]),
            movement=moved[step],
        )
        for step in range(num_steps)
    ]


@torch.inference_mode()
def mean_soft_token(model: GIRCSE, texts: Sequence[str], prompt: str | None, batch_size: int = 32) -> np.ndarray:
    """The mean of the first soft tokens of several texts: how heavy every vocabulary entry is, (V,) float32, of sum 1.

    Args:
        model: That writes them.
        texts: One or more.
        prompt: Before every text.
        batch_size: Texts at a time.
    """
    model.eval()
    encoder = model.encoder
    decoder = encoder.settled_decoder()
    temperature, reading = encoder.refinement.temperature, encoder.refinement.reading
    total = torch.zeros(())
    for start in range(0, len(texts), batch_size):
        features = encoder.pad(model.tokenize_texts(texts[start : start + batch_size], prompt).ids)
        ids, mask = features["input_ids"].to(model.device), features["attention_mask"].to(model.device)
        states = refine(decoder, ids, mask, num_steps=0, temperature=temperature, reading=reading)[:, 0]  # h_0, (B, d)
        total = total + decoder.vocabulary.probabilities(states, temperature).float().sum(dim=0).cpu()  # (V,)
    return (total / len(texts)).numpy()
