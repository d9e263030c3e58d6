"""Packed weights give the same products and vectors, notice changes, and stay away where memory is short."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F

from gircse.adapter import lora_layers
from gircse.fast import packed_weights
from gircse.fast.packed_weights import PackedWeights, packing_library
from gircse.model import GIRCSE

CPU = torch.device("cpu")
TEXTS = ["one", "a second text", "and a third one that is longer", "four", "five"]

pytestmark = [
    pytest.mark.skipif(packing_library(torch.float32) is None, reason="this processor packs nothing"),
    pytest.mark.usefixtures("without_copy"),
]

PACKS_BFLOAT16 = packing_library(torch.bfloat16) is not None


@pytest.fixture(params=["MKL", "oneDNN", "bfloat16"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """Of the weights, float32 by either library, whichever of them this processor would take."""
    if request.param == "bfloat16":
        if not PACKS_BFLOAT16:
            pytest.skip("this processor packs no bfloat16")
        yield torch.bfloat16
        return
    monkeypatch.setattr(packed_weights, "is_intel", lambda: request.param == "MKL")
    packing_library.cache_clear()
    library = packing_library(torch.float32)
    assert library is not None
    if library.multiply is not {"MKL": packed_weights._by_mkl, "oneDNN": packed_weights._by_onednn}[request.param]:
        pytest.skip(f"{request.param} packs nothing here")
    yield torch.float32
    packing_library.cache_clear()


@pytest.mark.parametrize(("wide", "narrow"), [(576, 1536), (1536, 576), (576, 192), (17, 5)])
def test_products_are_those_of_the_plain_layer(wide: int, narrow: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, weights = nn.Linear(wide, narrow, bias=narrow != 576, dtype=dtype), PackedWeights()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.no_grad():
        for rows in (1, 3, 4, 5, 8, 17, 64, 65, 100, 255, 256, 257, 1100):
            x = torch.randn(rows, wide, dtype=dtype)
            with weights.products(CPU):
                found = layer(x)
            torch.testing.assert_close(found, layer(x), rtol=tolerance, atol=tolerance)
    assert len(weights) == 1


@pytest.mark.parametrize(("out", "width"), [(1536, 576), (576, 1536), (5, 17)])
def test_the_product_for_a_gradient(out: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, weights = nn.Parameter(torch.randn(out, width, dtype=dtype)), PackedWeights()
    rtol, atol = (1e-4, 1e-3) if dtype == torch.float32 else (2e-2, 0.2)
    library = packing_library(dtype)
    assert library is not None
    for rows in (library.fewest, 4, 7, 32, 130, min(library.most, 300)):
        grad = torch.randn(rows, out, dtype=dtype)
        with torch.no_grad():
            found = weights.product(grad, weight, transposed=True)
        assert found is not None
        torch.testing.assert_close(found, grad @ weight.detach(), rtol=rtol, atol=atol)
    for rows in (library.fewest - 1, library.most + 1):
        if 0 < rows < 1000:
            assert weights.product(torch.randn(rows, out, dtype=dtype), weight, transposed=True) is None
    assert len(weights) == 1


def test_rows_of_another_dtype_than_the_weight_stay_plain() -> None:
    weights, weight = PackedWeights(), nn.Parameter(torch.randn(8, 8))
    assert weights.product(torch.randn(9, 8, dtype=torch.bfloat16), weight) is None
    assert not len(weights)


def test_only_rows_without_gradients_are_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only as many as it pays for: here by MKL's bounds."""
    bounds = packed_weights.PackingLibrary(torch.ops.mkl._mkl_reorder_linear_weight, packed_weights._by_mkl, 4, 256)
    monkeypatch.setattr(packed_weights, "packing_library", lambda dtype: bounds)
    layer, asked, weights = nn.Linear(8, 8), [], PackedWeights()
    monkeypatch.setattr(weights, "_copy", lambda weight, transposed: asked.append(transposed))
    with torch.no_grad(), weights.products(CPU):
        for rows, taken in ((3, 0), (4, 1), (256, 1), (257, 0)):
            asked.clear()
            layer(torch.randn(rows, 8))
            assert len(asked) == taken
            assert layer(torch.randn(2, rows // 2, 8)).shape == (2, rows // 2, 8)
    asked.clear()
    with weights.products(CPU):
        layer(torch.randn(9, 8)).sum().backward()
    with torch.no_grad(), weights.products(torch.device("meta")):
        layer(torch.randn(9, 8))
    assert not asked
    assert layer.weight.grad is not None


def test_a_weight_computed_anew_is_never_packed() -> None:
    weights, layer = PackedWeights(), nn.Linear(8, 8)
    with torch.no_grad(), weights.products(CPU):
        for _ in range(5):
            F.linear(torch.randn(9, 8), layer.weight * 2)
    assert not len(weights)


@pytest.mark.parametrize("through_data", [False, True])
def test_a_changed_weight_is_packed_anew(through_data: bool) -> None:
    """Peft merges through `.data`, which leaves the version count as it is."""
    layer, weights, x = nn.Linear(64, 64, bias=False), PackedWeights(), torch.randn(9, 64)
    with torch.no_grad():
        with weights.products(CPU):
            before = layer(x)
        (layer.weight.data if through_data else layer.weight).add_(0.5)
        with weights.products(CPU):
            after = layer(x)
        torch.testing.assert_close(after, layer(x))
        assert not torch.allclose(before, after)


def test_vectors_are_the_same_with_and_without(model: GIRCSE) -> None:
    packed = model.encode(TEXTS, num_steps=4)
    assert len(model.encoder.packed_weights) > 0
    model.encoder.packed_weights.enabled = False
    plain = model.encode(TEXTS, num_steps=4)
    assert not len(model.encoder.packed_weights), "the memory is given back"
    torch.testing.assert_close(torch.tensor(packed), torch.tensor(plain), rtol=1e-4, atol=1e-5)


def test_a_folded_adapter_is_in_the_packed_weights(model: GIRCSE) -> None:
    model.encode(TEXTS)
    torch.manual_seed(0)
    model.encoder.add_lora(LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.encoder.backbone.requires_grad_(False)
    for fold in (True, False, True):
        model.encoder.fold_adapter = fold
        model.encoder.packed_weights.enabled = True
        packed = model.encode(TEXTS)
        model.encoder.packed_weights.enabled = False
        torch.testing.assert_close(torch.tensor(packed), torch.tensor(model.encode(TEXTS)), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not PACKS_BFLOAT16, reason="this processor packs no bfloat16")
def test_folded_bfloat16_weights_are_packed(model: GIRCSE, tmp_path: Path) -> None:
    model.encoder.add_lora(LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path))
    half = GIRCSE(str(tmp_path), dtype=torch.bfloat16, device="cpu")
    packed = torch.tensor(half.encode(TEXTS))
    assert len(half.encoder.packed_weights) == len(lora_layers(half.encoder.backbone)) + 1, "and the LM head"
    half.encoder.packed_weights.enabled = False
    torch.testing.assert_close(packed, torch.tensor(half.encode(TEXTS)), rtol=0.05, atol=0.02)


def test_copies_and_pickles_hold_none(model: GIRCSE) -> None:
    vectors = model.encode(TEXTS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not len(other.encoder.packed_weights)
        torch.testing.assert_close(torch.tensor(other.encode(TEXTS)), torch.tensor(vectors))
    model.encoder.packed_weights.enabled = False
    assert not copy.deepcopy(model).encoder.packed_weights.enabled


def test_nothing_is_packed_where_memory_is_short(model: GIRCSE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "free_memory", lambda: 1000)
    model.encode(TEXTS)
    assert not len(model.encoder.packed_weights)


def test_all_copies_together_keep_within_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often they are used, and whatever other programs free meanwhile."""
    free = 10 * 64 * 64 * 4
    monkeypatch.setattr(packed_weights, "free_memory", lambda: free)
    layers, weights = [nn.Linear(64, 64) for _ in range(6)], PackedWeights()
    for _ in range(4):
        with torch.no_grad(), weights.products(CPU):
            for layer in layers:
                layer(torch.randn(9, 64))
        free *= 10
    assert len(weights) == 2, "a quarter of ten"
    del layers[:]
    weights.refresh()
    assert not len(weights)


def test_no_copies_stay_when_the_model_leaves_the_cpu() -> None:
    layer, weights = nn.Linear(8, 8), PackedWeights()
    with torch.no_grad(), weights.products(CPU):
        layer(torch.randn(9, 8))
    assert len(weights) == 1
    with torch.no_grad(), weights.products(torch.device("meta")):
        assert not len(weights)


def test_autocast_keeps_its_dtype() -> None:
    layer, weights = nn.Linear(8, 8), PackedWeights()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), weights.products(CPU):
        assert layer(torch.randn(9, 8)).dtype == torch.bfloat16


def test_a_weight_that_is_turned_round_is_no_longer_packed() -> None:
    layer, weights, x = nn.Linear(8, 8, bias=False), PackedWeights(), torch.randn(9, 8)
    with torch.no_grad():
        for _ in range(2):
            with weights.products(CPU):
                found = layer(x)
            torch.testing.assert_close(found, layer(x))
            layer.weight.data = layer.weight.data.t()


def test_threads_may_pack_and_look_at_the_same_time() -> None:
    layers, weights, x = [nn.Linear(16, 16) for _ in range(200)], PackedWeights(), torch.randn(9, 16)

    def work(start: int) -> None:
        with torch.no_grad():
            for layer in layers[start:] + layers[:start]:
                with weights.products(CPU):
                    torch.testing.assert_close(layer(x), F.linear(x.clone(), layer.weight, layer.bias))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, (0, 50, 100, 150)))
    assert len(weights) == 200


def test_an_environment_variable_switches_packing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(8, 8)
    for value, packed in (("1", 1), ("0", 0)):
        monkeypatch.setenv("GIRCSE_PACKED_WEIGHTS", value)
        weights = PackedWeights()
        with torch.no_grad(), weights.products(CPU):
            layer(torch.randn(9, 8))
        assert len(weights) == packed
