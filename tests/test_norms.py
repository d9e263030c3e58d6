"""Fused RMS norms equal those of the families, values and gradients, and take no other norm for one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from gircse.norms import fused_norm, use_fused_norms
from tests.tiny import tiny_model


def norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-wide", "granite-multipliers", "phi3", "smollm3"])
def test_a_fused_norm_equals_the_familys_own(family: str) -> None:
    model = tiny_model(family)
    found = norms(model)
    assert use_fused_norms(model) == len(found) > 0
    assert use_fused_norms(model) == 0, "once"
    for module in found:
        width = module.weight.numel()
        results = []
        for compute in (
            type(module).forward.__get__(module),
            lambda x, module=module: fused_norm(x, module.weight, module.variance_epsilon),
        ):
            x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(1), requires_grad=True)
            out = compute(x)
            (out * torch.arange(width)).sum().backward()
            results.append((out.detach(), x.grad))
        for own, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, own, rtol=1e-5, atol=1e-5)


def test_gemmas_norms_stay() -> None:
    for family in ("gemma", "gemma3-scaled"):
        assert use_fused_norms(tiny_model(family)) == 0


def test_a_model_with_fused_norms_can_be_copied_and_pickled() -> None:
    model = tiny_model("llama")
    ids = torch.arange(6)[None]
    expected = model(input_ids=ids).logits
    use_fused_norms(model)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(input_ids=ids).logits, expected, rtol=0, atol=0)
    other = copy.deepcopy(model)
    assert all(module.forward.args[0] is module for module in norms(other)), "a copy computes with its own weights"
