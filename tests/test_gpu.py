"""On a GPU: the loop, its gradients, folded adapters and fused norms are those of the CPU. Skipped without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from gircse.fast.norms import fused_norm
from gircse.losses import ICRLoss
from gircse.model import GIRCSE
from gircse.train.fused_lora import fused_lora
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

TEXTS = ["one", "two words", "a longer text of several words", "zz"]


def load(backbone: Path, device: str, dtype: torch.dtype = torch.float32) -> GIRCSE:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return GIRCSE.from_backbone(str(backbone), num_steps=3, lora=lora, device=device, dtype=dtype, max_seq_length=48)


def test_vectors_are_those_of_the_cpu(backbone: Path) -> None:
    expected, model = load(backbone, "cpu").encode(TEXTS), load(backbone, "cuda")
    torch.testing.assert_close(model.encode(TEXTS), expected, rtol=1e-3, atol=1e-3)
    for index, text in enumerate(TEXTS):  # whatever the batch
        torch.testing.assert_close(model.encode([text])[0], expected[index], rtol=1e-3, atol=1e-3)


def test_gradients_are_those_of_the_cpu(backbone: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = load(backbone, device).train()
        columns = [model.encoder.preprocess(texts) for texts in (TEXTS, TEXTS[::-1])]
        columns = [{key: value.to(device) for key, value in column.items()} for column in columns]
        with fused_lora(model):
            ICRLoss(model, temperature=0.5)(columns).backward()
        gradients = [p.grad.flatten().cpu() for n, p in model.named_parameters() if "lora_" in n and p.grad is not None]
        found.append(torch.cat(gradients))
    assert float(nn.functional.cosine_similarity(*found, dim=0)) > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_steps_are_those_of_the_plain_loop(backbone: Path, dtype: torch.dtype) -> None:
    """Several sizes and optimiser steps, in training and at inference."""
    models = [load(backbone, "cuda", dtype).train() for _ in range(2)]
    models[1].encoder.step_graphs.enabled = False
    curves: list[list[float]] = [[], []]
    for model, curve in zip(models, curves, strict=True):
        optimiser = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" in n], lr=0.05)
        with fused_lora(model):
            for count in (4, 3, 4, 4, 2, 3):
                columns = [model.encoder.preprocess(texts) for texts in (TEXTS[:count], TEXTS[::-1][:count])]
                columns = [{key: value.to("cuda") for key, value in column.items()} for column in columns]
                loss = ICRLoss(model, temperature=0.5)(columns)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                curve.append(float(loss.detach()))
    assert models[0].encoder.step_graphs._steps
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=tolerance, atol=tolerance)
    replayed = [torch.tensor(models[0].encode(TEXTS[:count], num_steps=6)) for count in (4, 1, 3, 4)]
    models[0].encoder.step_graphs.enabled = False
    for vectors in replayed:
        expected = torch.tensor(models[0].encode(TEXTS[: len(vectors)], num_steps=6))
        assert float(nn.functional.cosine_similarity(vectors, expected).min()) > (0.99999 if tolerance < 0.01 else 0.99)


def test_a_folded_adapter_in_bfloat16_keeps_the_vectors(backbone: Path) -> None:
    exact = torch.tensor(load(backbone, "cpu").encode(TEXTS))
    model = load(backbone, "cuda", torch.bfloat16)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    folded = torch.tensor(model.encode(TEXTS))
    model.encoder.fold_adapter = False
    apart = torch.tensor(model.encode(TEXTS))
    similar = nn.functional.cosine_similarity
    assert float(similar(folded, exact).min()) > float(similar(apart, exact).min()) - 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_norms_are_the_familys_own(dtype: torch.dtype) -> None:
    model: Any = tiny_model("llama")
    model.to("cuda", dtype)
    module = next(module for module in model.modules() if type(module).__name__.endswith("RMSNorm"))
    nn.init.normal_(module.weight)  # type: ignore[arg-type]
    results = []
    for compute in (module, lambda x: fused_norm(x, module.weight, module.variance_epsilon)):  # type: ignore[arg-type]
        x = torch.randn(70, 32, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
        out = compute(x.requires_grad_())
        (out.float() * torch.arange(32, device="cuda")).sum().backward()
        results.append((out.detach(), x.grad))
    for own, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, own, rtol=2e-2, atol=2e-2 * float(own.abs().max()))  # type: ignore[union-attr]
