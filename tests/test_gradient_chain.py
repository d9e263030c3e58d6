"""Gradients between soft tokens, over a chain whose gradients are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gircse import GIRCSE, ICRLoss
from gircse.errors import UsageError
from gircse.gradient_chain import GradientChain

ROWS, WIDTH, STEPS = 3, 4, 3


def features_with_some(model: GIRCSE) -> object:
    """A forward pass, told of what there is not."""
    return model(model.preprocess(["a text"]) | {"soft_token_gradients": "some"})


def run(kind: str, growth: float | Tensor, weights: Tensor) -> list[Tensor]:
    """∂L/∂h_0..h_K of ``L = Σ w_k · h_k``, where ``h_{k+1} = growth · h_k``."""
    chain, states = GradientChain(kind), [torch.ones(ROWS, WIDTH, requires_grad=True)]
    for _ in range(STEPS):
        states.append(chain.written(growth * chain.source(states[-1])))
    for state in states:
        state.retain_grad()
    torch.stack([weight * state for weight, state in zip(weights, states, strict=True)]).sum().backward()
    return [state.grad for state in states if state.grad is not None]


def test_bounded_gradients_add_up_and_do_not_multiply() -> None:
    weights = torch.randn(STEPS + 1, ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    full, bounded = run("full", 20.0, weights), run("bounded", 20.0, weights)
    torch.testing.assert_close(full[0], sum(20.0**k * weights[k] for k in range(STEPS + 1)))
    expected = weights[STEPS]
    torch.testing.assert_close(bounded[STEPS], expected)
    for k in reversed(range(STEPS)):
        expected = weights[k] + expected  # 20 times as long, cut to the length that it came with
        torch.testing.assert_close(bounded[k], expected)


def test_gradients_that_do_not_grow_are_left_alone() -> None:
    weights = torch.randn(STEPS + 1, ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    for full, bounded in zip(run("full", 0.5, weights), run("bounded", 0.5, weights), strict=True):
        torch.testing.assert_close(bounded, full)


def test_a_row_is_bounded_by_itself_and_nothing_comes_of_nothing() -> None:
    """As gradient caching, whose batches are parts, needs it."""
    weights, growth = torch.ones(STEPS + 1, ROWS, WIDTH), torch.tensor([[20.0], [20.0], [0.5]])
    weights[:, 0] = 0
    weights[1:, 1] *= 1000
    bounded = run("bounded", growth, weights)[0]
    torch.testing.assert_close(bounded, torch.tensor([[0.0], [3001.0], [1.875]]).expand(ROWS, WIDTH))


def test_without_gradients_states_are_passed_on() -> None:
    chain, state = GradientChain("bounded"), torch.ones(1, 1)
    assert chain.source(state) is state
    with torch.no_grad():
        assert GradientChain("bounded").source(state.requires_grad_()) is state


@pytest.mark.parametrize("takes", [lambda model: ICRLoss(model, soft_token_gradients="some"), features_with_some])
def test_what_is_not_known_is_refused(model: GIRCSE, takes: Callable[[GIRCSE], object]) -> None:
    """By the loss before it begins, and by the model, whose features anyone may write."""
    with pytest.raises(UsageError, match="soft_token_gradients must be one of full, bounded, none, not 'some'"):
        takes(model)
