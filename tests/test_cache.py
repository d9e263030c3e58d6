"""The cache of the refinement loop: what steps write into one buffer has the gradients of concatenation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from gircse.cache import JoinedPrompts, cache_tensors, expand_cache, join_caches, new_cache, select_rows


def filled(rows: int, positions: int, *, grad: bool) -> tuple[DynamicCache, list[Tensor]]:
    cache, states = new_cache(), [torch.randn(rows, 2, positions, 4, requires_grad=grad) for _ in range(2)]
    cache.update(states[0], states[1], 0)
    return cache, states


def run(caches: list[Any], steps: list[tuple[Tensor, Tensor]], *, plain: bool) -> list[Tensor]:
    """A number for every step that depends on all positions so far."""
    if plain:
        groups = zip(*((cache.layers[0].keys, cache.layers[0].values) for cache in caches), strict=True)
        keys, values = (torch.cat([F.pad(part, (0, 0, 5 - part.shape[2], 0)) for part in group]) for group in groups)
    else:
        joined = join_caches(caches, 5, len(steps), torch.float32)
    results = []
    for number, (key, value) in enumerate(steps):
        if plain:
            keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        else:
            keys, values = joined.update(key, value, 0)
        weights = (keys * (number + 1)).softmax(dim=2)  # keeps the keys for its backward pass
        results.append((weights * values).sin().sum())
    return results


def test_gradients_are_those_of_concatenation() -> None:
    torch.manual_seed(0)
    parts = [filled(3, 5, grad=True), filled(2, 3, grad=True)]
    leaves = [state for _, states in parts for state in states]
    steps = [tuple(torch.randn(5, 2, 1, 4, requires_grad=True) for _ in range(2)) for _ in range(4)]
    leaves += [state for pair in steps for state in pair]
    found = []
    for plain in (True, False):
        results = run([cache for cache, _ in parts], steps, plain=plain)  # type: ignore[arg-type]
        found.append(torch.autograd.grad(sum(results), leaves))  # type: ignore[arg-type]
        parts = [(new_cache(), states) for _, states in parts]
        for cache, states in parts:
            cache.update(states[0], states[1], 0)
    for expected, gradient in zip(*found, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_every_step_can_be_differentiated_by_itself() -> None:
    """With the graph kept: one pass leaves nothing behind for the next."""
    torch.manual_seed(0)
    steps = [tuple(torch.randn(3, 2, 1, 4, requires_grad=True) for _ in range(2)) for _ in range(3)]
    cache, leaves = filled(3, 5, grad=True)
    inputs = [*leaves, *(state for pair in steps for state in pair)]
    results = run([cache], steps, plain=False)  # type: ignore[arg-type]
    whole = torch.autograd.grad(sum(results), inputs, retain_graph=True)  # type: ignore[arg-type]
    parts = [torch.autograd.grad(result, inputs, retain_graph=True, allow_unused=True) for result in results]
    for index, expected in enumerate(whole):
        total = sum(part[index] for part in parts if part[index] is not None)
        torch.testing.assert_close(total, expected)


def test_steps_share_one_buffer_and_keep_what_they_saw() -> None:
    cache, _ = filled(3, 5, grad=True)
    joined = join_caches([cache], 5, 2, torch.float32)
    first, _ = joined.update(torch.ones(3, 2, 1, 4), torch.ones(3, 2, 1, 4), 0)
    before = first.detach().clone()
    second, _ = joined.update(torch.zeros(3, 2, 1, 4), torch.zeros(3, 2, 1, 4), 0)
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(first, before)
    assert second.shape[2] == 7


def test_rows_leave_with_their_gradients() -> None:
    cache, (keys, _) = filled(3, 5, grad=True)
    joined = join_caches([cache], 5, 2, torch.float32)
    joined.update(torch.ones(3, 2, 1, 4), torch.ones(3, 2, 1, 4), 0)
    select_rows(joined, torch.tensor([2, 0]))
    shown, _ = joined.update(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4), 0)
    (gradient,) = torch.autograd.grad(shown[0].sum(), [keys])
    assert gradient[2].eq(1).all()
    assert gradient[:2].eq(0).all()


@torch.no_grad()
def test_prompts_write_what_joining_would_copy() -> None:
    """Two layers, a prefix of two tokens; groups of two, one and two rows, the last without the prefix."""
    torch.manual_seed(0)
    prefix = new_cache()
    for layer in range(2):
        prefix.update(torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 4), layer)
    joined, caches = JoinedPrompts(5, 7, 3, torch.bfloat16, layers=2), []
    for rows, positions, begun in ((2, 5, prefix), (1, 3, prefix), (2, 6, None)):
        own = joined.next_group(rows, begun)
        copied = new_cache() if begun is None else expand_cache(begun, rows)
        for layer in range(2):
            keys, values = torch.randn(2, rows, 2, positions, 4)
            assert own.get_seq_length(layer) == copied.get_seq_length(layer)
            for seen, expected in zip(own.update(keys, values, layer), copied.update(keys, values, layer), strict=True):
                assert torch.equal(seen, expected.bfloat16())
        caches.append(copied)
    expected = join_caches(caches, 7, 3, torch.bfloat16)
    found = joined.cache()
    for step in range(3):
        for pair in zip(cache_tensors(found), cache_tensors(expected), strict=True):
            for mine, copied in zip(*pair, strict=True):
                assert torch.equal(mine, copied)
        for layer in range(2):
            states = torch.randn(2, 5, 2, 1, 4)
            for cache in (found, expected):
                assert cache.update(states[0], states[1], layer)[0].shape[2] == 8 + step


@torch.no_grad()
def test_prompts_hold_nothing_but_the_joined_cache() -> None:
    """In one block; a layer that the first two leave no room for has its own."""
    joined, seen = JoinedPrompts(3, 5, 1, torch.float32, layers=2), list[Tensor]()
    for rows in (2, 1):
        group = joined.next_group(rows)
        for layer in range(3):
            seen += group.update(torch.randn(rows, 2, 5, 4), torch.randn(rows, 2, 5, 4), layer)
    kept = [states.untyped_storage().data_ptr() for pair in cache_tensors(joined.cache()) for states in pair]
    assert {states.untyped_storage().data_ptr() for states in seen} == set(kept)
    assert len(set(kept[:4])) == 1
    assert len(set(kept)) == 3
    assert seen[0].untyped_storage().nbytes() == 4 * 4 * (3 * 2 * 6 * 4)


def test_a_pass_whose_last_state_is_all_that_is_wanted_keeps_nothing() -> None:
    prefix, _ = filled(1, 2, grad=False)
    kept, forgotten = expand_cache(prefix, 3), expand_cache(prefix, 3, keep=False)
    keys, values = torch.randn(2, 3, 2, 4, 4)
    for seen, expected in zip(forgotten.update(keys, values, 0), kept.update(keys, values, 0), strict=True):
        assert torch.equal(seen, expected)
    assert (kept.get_seq_length(), forgotten.get_seq_length()) == (6, 2)
