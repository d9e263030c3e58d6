"""How the hidden states of a run become one vector after every step. Knows tensors alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Pooling = Literal["mean", "last", "mean_with_prompt", "prompt_mean"]
"""How hidden states become z_k: the mean of h_1..h_k (the paper), h_k alone, or the mean of h_0..h_k. Without
refinement steps all are h_0, the state of the prompt's last token; with ``prompt_mean``, otherwise like
``mean_with_prompt``, h_0 is the mean of the states of all prompt tokens, and writes the first soft token."""

POOLINGS: tuple[str, ...] = get_args(Pooling)


def pool_steps(states: Tensor, pooling: str) -> Tensor:
    """The embeddings after every step: z_1..z_K, which are prefix means (GIRCSE, section 3.2).

    Args:
        states: (B, K + 1, d) as `refine` returns them; with K = 0 the prompt's state is the embedding.
        pooling: One of `POOLINGS`.

    Returns:
        (B, max(K, 1), d) float32, not normalised.
    """
    states = states.float()
    if states.shape[1] == 1:
        return states
    if pooling == "last":
        return states[:, 1:]
    first = 1 if pooling == "mean" else 0
    sums = states[:, first:].cumsum(dim=1)
    counts = torch.arange(1, sums.shape[1] + 1, device=states.device).view(1, -1, 1)
    return (sums / counts)[:, 1 - first :]


def keep_finished(step_embeddings: Tensor, states: Tensor, num_steps: Sequence[int]) -> Tensor:
    """Let rows that took fewer steps than others keep their last embedding.

    Args:
        step_embeddings: (B, K, d) of the largest K, as `pool_steps` returns them.
        states: (B, K + 1, d), as `refine` returns them.
        num_steps: Each row's own K; with 0 its embedding is h_0.

    Returns:
        (B, K, d), where z_k of a row with k above its own K is its last.
    """
    own = torch.tensor(num_steps, device=states.device).unsqueeze(1)  # (B, 1)
    steps = torch.arange(1, step_embeddings.shape[1] + 1, device=states.device)
    last = torch.minimum(steps, own.clamp_min(1)) - 1  # (B, K)
    kept = step_embeddings.gather(1, last.unsqueeze(-1).expand_as(step_embeddings))
    return torch.where((own == 0).unsqueeze(-1), states[:, :1].to(kept.dtype), kept)
