"""RMS norms in fewer operations equal those of the families, values and gradients, and take no other norm for one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from gircse.fast import norms as norms_module
from gircse.fast.norms import frugal_norm, fused_norm, use_fused_norms
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_a_frugal_norm_equals_the_familys_own(family: str, dtype: torch.dtype) -> None:
    """Rounded once where theirs rounds twice: as near to the norm in float64 as theirs, or nearer."""
    model: Any = tiny_model(family)
    model.to(dtype).eval()
    use_fused_norms(model)
    for module in norms(model):
        with torch.no_grad():
            module.weight.copy_(torch.linspace(-2, 3, module.weight.numel()))
            x = 30 * torch.randn(3, 5, module.weight.numel(), generator=torch.Generator().manual_seed(1)).to(dtype)
            x[0, 0] = 0
            before, own, found = x.clone(), type(module).forward(module, x), module(x)
            assert torch.equal(x, before), "the input is the residual stream"
            wide = x.double()
            scale = (wide.square().mean(dim=-1, keepdim=True) + module.variance_epsilon).rsqrt()
            exact = wide * scale * module.weight.double()
        assert found.dtype == dtype
        errors = [(out.double() - exact).abs().max() for out in (found, own)]
        assert errors[0] <= errors[1] + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frugal_norm_has_the_gradients_of_the_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start, out_gradient = 3 * torch.randn(2, 4, 3, 16), torch.randn(2, 4, 3, 16)
    start[0, 0] = 0
    gradients = []
    for compute, kind in ((fused_norm, torch.float64), (frugal_norm, dtype), (frugal_norm, dtype)):
        x = start.to(dtype).to(kind).clone().requires_grad_()
        weight = torch.linspace(-2, 3, 16, dtype=kind).requires_grad_(len(gradients) < 2)
        out = compute(x, weight, 0.1)
        out.backward(out_gradient.to(dtype).to(kind))
        assert x.grad is not None
        gradients.append((x.grad, weight.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for exact, found in zip(*gradients[:2], strict=True):
        assert exact is not None
        assert found is not None
        assert found.dtype == dtype
        assert float((found - exact).norm() / exact.norm()) < tolerance
    assert torch.equal(gradients[2][0], gradients[1][0])
    assert gradients[2][1] is None, "frozen"


def test_on_a_cpu_norms_are_frugal_in_training_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = norms_module.frugal_norm
    monkeypatch.setattr(norms_module, "frugal_norm", lambda *args: calls.append(1) or plain(*args))
    model, ids = tiny_model("llama"), torch.arange(6)[None]
    expected = model(input_ids=ids).logits
    use_fused_norms(model)
    model.train()
    with_gradients = model(input_ids=ids).logits
    assert len(calls) == len(norms(model))
    torch.testing.assert_close(with_gradients, expected, rtol=1e-3, atol=1e-5)
    with torch.no_grad():  # gradient caching takes both passes
        assert torch.equal(model(input_ids=ids).logits, with_gradients)


def test_gemmas_norms_stay() -> None:
    for family in ("gemma", "gemma3-scaled"):
        assert use_fused_norms(tiny_model(family)) == 0


def test_a_model_with_fused_norms_can_be_copied_and_pickled() -> None:
    model = tiny_model("llama")
    ids = torch.arange(6)[None]
    use_fused_norms(model)
    expected = model(input_ids=ids).logits
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(input_ids=ids).logits, expected, rtol=0, atol=0)
    other = copy.deepcopy(model)
    assert all(module.forward.args[0] is module for module in norms(other)), "a copy computes with its own weights"
