"""Where gradients go between soft tokens: all the way back through the states that wrote them, bounded, or not at all.

Knows states and their gradients; knows nothing of vocabularies, layers or losses. The states are the same every time.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from gircse.errors import UsageError

SoftTokenGradients = Literal["full", "bounded", "none"]
"""What goes back from a soft token to the state that wrote it: the whole gradient (the paper), one no longer than that
of the state that came of the token, or nothing."""

SOFT_TOKEN_GRADIENTS: tuple[str, ...] = get_args(SoftTokenGradients)


def check_soft_token_gradients(gradients: str) -> None:
    """Raise UsageError for what is none of `SOFT_TOKEN_GRADIENTS`."""
    if gradients not in SOFT_TOKEN_GRADIENTS:
        known = ", ".join(SOFT_TOKEN_GRADIENTS)
        raise UsageError(f"soft_token_gradients must be one of {known}, not {gradients!r}")


class GradientChain:
    """The states of one batch, each of which writes the soft token that the next one comes of.

    In a backbone that has not been trained yet a gradient grows some twentyfold with every soft token on its way back
    (docs/experiments.md), and what reaches the first is noise that drowns what they say themselves. ``bounded`` lets it
    keep its direction and grow no more: row by row, ``‖∂L/∂h_k by way of token k + 1‖ ≤ ‖∂L/∂h_{k+1}‖``. Where it does
    not grow, as in trained models, nothing is changed.

    Args:
        gradients: One of `SOFT_TOKEN_GRADIENTS`.

    Attributes:
        detached: Whether soft tokens are to be computed without gradients.

    Raises:
        UsageError: It is none of them.
    """

    def __init__(self, gradients: str) -> None:
        check_soft_token_gradients(gradients)
        self.detached = gradients == "none"
        self._bounded = gradients == "bounded" and torch.is_grad_enabled()
        self._limit: _Limit | None = None

    def source(self, state: Tensor) -> Tensor:
        """h_k, (B, d), to compute soft token k + 1 from."""
        if not self._bounded or not state.requires_grad:
            return state
        self._limit = _Limit()
        source = state.view_as(state)  # has the gradient of this way alone; the state's own is that of all ways
        source.register_hook(self._limit.apply)
        return source

    def written(self, state: Tensor) -> Tensor:
        """h_{k+1}, (B, d), that came of the token."""
        if self._limit is not None:
            state.register_hook(self._limit.set)
        return state


class _Limit:
    """Of the gradient of a soft token's source: the norms of that of the next state, which is known before."""

    def __init__(self) -> None:
        self._norms: Tensor | None = None

    def set(self, gradient: Tensor) -> None:
        self._norms = _norms(gradient)

    def apply(self, gradient: Tensor) -> Tensor:
        if self._norms is None:  # the next state is in no loss
            return gradient
        shorter = self._norms / _norms(gradient).clamp_min(torch.finfo(torch.float32).tiny)
        return gradient * shorter.clamp_max(1).to(gradient.dtype)


def _norms(gradient: Tensor) -> Tensor:
    """(B, 1) float32."""
    return torch.linalg.vector_norm(gradient, dim=-1, keepdim=True, dtype=torch.float32)
