"""The packed copy that a model embeds with: the vectors are the backbone's, and a changed one is copied anew."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from gircse import GIRCSE
from gircse.adapter import lora_layers
from gircse.fast import inference_copy
from gircse.fast.packed_linear import PackedLinear, packs_in_place
from tests.tiny import FAMILIES, tiny_backbone

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if packs_in_place(dtype)]
pytestmark = pytest.mark.skipif(not DTYPES, reason="packed products are not the fastest on this processor")

TEXTS = ["a cat", "a much longer text about dogs", "x"]


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)


@pytest.fixture
def adapted(backbone: Path, tmp_path: Path) -> GIRCSE:
    """A saved LoRA model with random layers, loaded for inference."""
    torch.manual_seed(0)
    GIRCSE.from_backbone(str(backbone), num_steps=3, lora=lora(), device="cpu").save_pretrained(str(tmp_path))
    return GIRCSE(str(tmp_path), device="cpu")


def is_served(model: GIRCSE) -> bool:
    """Whether the model embeds with a copy."""
    with torch.inference_mode():
        return model.eval().encoder.settled_decoder().transformer is not model.encoder.decoder.transformer


def plain(model: GIRCSE) -> np.ndarray:
    """What the backbone itself computes, in a copy of the model that packs nothing."""
    other = copy.deepcopy(model)
    other.encoder.packed_weights.enabled = False
    assert not is_served(other)
    return other.encode_steps(TEXTS)


def check(model: GIRCSE, *, tolerance: float = 1e-5) -> np.ndarray:
    """The vectors are the backbone's."""
    found = model.encode_steps(TEXTS)
    expected = plain(model)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_adapter", [False, True])
def test_vectors_are_the_backbones(tmp_path: Path, family: str, with_adapter: bool) -> None:
    torch.manual_seed(0)
    folder = str(tiny_backbone(tmp_path, family))
    model = GIRCSE.from_backbone(folder, num_steps=3, lora=lora() if with_adapter else None, device="cpu")
    model.requires_grad_(False)
    assert is_served(model) == (family != "gpt2-learned-positions"), "which has no linear layers"
    check(model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backbone_is_left_alone(adapted: GIRCSE, dtype: torch.dtype) -> None:
    adapted.to(dtype)
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    check(adapted, tolerance=1e-5 if dtype == torch.float32 else 3e-2)
    assert is_served(adapted)
    assert not any(layer.merged for layer in lora_layers(adapted.encoder.backbone))
    assert not len(adapted.encoder.packed_weights), "no second copies"
    assert not [module for module in adapted.modules() if isinstance(module, PackedLinear)]
    for name, weight in adapted.state_dict().items():
        assert torch.equal(weight, before[name])


def add_in_place(model: GIRCSE) -> None:
    with torch.no_grad():
        model.encoder.backbone.get_submodule("model.layers.0.mlp.up_proj.base_layer").weight.mul_(-1)  # type: ignore[operator]


def write_through_data(model: GIRCSE) -> None:
    layer: Any = model.encoder.backbone.get_submodule("model.layers.1.self_attn.q_proj")
    layer.lora_A["default"].weight.data.mul_(-3)


def assign_a_state_dict(model: GIRCSE) -> None:
    changed = {name: -weight for name, weight in model.encoder.backbone.state_dict().items()}
    model.encoder.backbone.load_state_dict(changed, assign=True)
    model.requires_grad_(False)


def replace_a_layer(model: GIRCSE) -> None:
    layer: Any = model.encoder.backbone.get_submodule("model.layers.1.mlp")
    torch.manual_seed(1)
    layer.down_proj = torch.nn.Linear(48, 32, bias=False).requires_grad_(False)


def change_a_norm(model: GIRCSE) -> None:
    norm: Any = model.encoder.backbone.get_submodule("model.norm")
    norm.weight = torch.nn.Parameter(torch.linspace(-1, 1, 32), requires_grad=False)


def take_another_adapter(model: GIRCSE) -> None:
    torch.manual_seed(2)
    model.encoder.backbone.add_adapter(lora(), adapter_name="other")
    model.encoder.backbone.set_adapter("other")
    model.requires_grad_(False)


def scale_the_adapter(model: GIRCSE) -> None:
    for layer in lora_layers(model.encoder.backbone):
        layer.scaling["default"] *= 4


@pytest.mark.parametrize(
    "change",
    [
        add_in_place,
        write_through_data,
        assign_a_state_dict,
        replace_a_layer,
        change_a_norm,
        take_another_adapter,
        scale_the_adapter,
    ],
)
def test_a_change_of_the_backbone_is_noticed(adapted: GIRCSE, change: Callable[[GIRCSE], None]) -> None:
    before = check(adapted)
    change(adapted)
    assert np.abs(check(adapted) - before).max() > 1e-3
    assert is_served(adapted)


def test_it_is_made_once(adapted: GIRCSE, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    own = inference_copy._copied
    monkeypatch.setattr(inference_copy, "_copied", lambda module, make: made.append(module) or own(module, make))
    with ThreadPoolExecutor(4) as pool:
        vectors = list(pool.map(lambda _: adapted.encode(TEXTS), range(8)))
    assert made.count(adapted.encoder.backbone) == 1
    for other in vectors:
        np.testing.assert_array_equal(other, vectors[0])


def test_training_has_the_backbone(adapted: GIRCSE) -> None:
    first = adapted.encode(TEXTS)
    adapted.encoder.unfreeze()
    adapted.train()
    loss = adapted(adapted.preprocess(TEXTS))["sentence_embedding"].square().mean()
    loss.backward()
    assert adapted.encoder.inference_copy._made is None, "its memory is given back"
    layer: Any = lora_layers(adapted.encoder.backbone)[0]
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad.sign() * 0.05
    assert not is_served(adapted), "while it is trained"
    trained = check(adapted)[:, -1]
    assert np.abs(trained - first).max() > 1e-3
    assert len(adapted.encoder.packed_weights)
    adapted.requires_grad_(False)
    np.testing.assert_allclose(check(adapted)[:, -1], trained, rtol=1e-4, atol=1e-5)
    assert is_served(adapted)
    assert not len(adapted.encoder.packed_weights)


def test_hooks_see_the_backbone_at_work(adapted: GIRCSE) -> None:
    adapted.encode(TEXTS)
    seen: list[object] = []
    layer = adapted.encoder.backbone.get_submodule("model.layers.0.mlp.up_proj.base_layer")
    hook = layer.register_forward_hook(lambda module, *_: seen.append(module))
    check(adapted)
    assert layer in seen
    assert not is_served(adapted)
    hook.remove()
    assert is_served(adapted)


def test_who_keeps_the_memory_has_no_copy(adapted: GIRCSE, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_served(adapted)
    assert not is_served(copy.deepcopy(adapted).pack_weights()), "it needs none"
    for switch, owner in (("enabled", adapted.encoder.packed_weights), ("fold_adapter", adapted.encoder)):
        setattr(owner, switch, False)
        assert not is_served(adapted)
        assert adapted.encoder.inference_copy._made is None
        setattr(owner, switch, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_served(adapted)
    monkeypatch.setattr(inference_copy, "free_memory", lambda: 1000)
    assert is_served(adapted), "decided once"
    assert not is_served(copy.deepcopy(adapted))


def test_what_cannot_be_watched_is_not_copied(backbone: Path) -> None:
    unwatched = GIRCSE.from_backbone(str(backbone), num_steps=3, device="cpu")
    norm: Any = unwatched.encoder.backbone.get_submodule("model.norm")
    with torch.inference_mode():  # such weights count no changes
        norm.weight = torch.nn.Parameter(torch.ones(32), requires_grad=False)
    config = lora()
    config.target_modules, config.modules_to_save = ["q_proj"], ["lm_head"]
    wrapped = GIRCSE.from_backbone(str(backbone), num_steps=3, lora=config, device="cpu").requires_grad_(False)
    exact = GIRCSE.from_backbone(str(backbone), num_steps=3, device="cpu")
    exact.encoder.backbone.get_submodule("model.norm").to(torch.float64)
    for model in (unwatched, wrapped, exact):
        assert not is_served(model)


def test_copies_and_pickles_make_their_own(adapted: GIRCSE) -> None:
    vectors = adapted.encode(TEXTS)
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert other.encoder.inference_copy._made is None
        np.testing.assert_array_equal(other.encode(TEXTS), vectors)
        assert is_served(other)


def test_what_is_explained_is_what_is_embedded(adapted: GIRCSE) -> None:
    explained = adapted.explain(TEXTS[1], num_steps=2)
    adapted.encoder.packed_weights.enabled = False
    for one, other in zip(explained, adapted.explain(TEXTS[1], num_steps=2), strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.weights, other.weights, rtol=1e-3)
    assert adapted.encoder.inference_copy._made is None
