"""LoRA folded into the weights, taken out again, switched off: the vectors must not notice."""

from __future__ import annotations

import copy
import dataclasses
import json
import runpy
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from gircse import GIRCSE
from gircse import encoder as encoder_module
from gircse.adapter import adapter_off, lora_layers
from gircse.checksum import vectors_checksum
from gircse.errors import UsageError
from gircse.losses import CachedICRLoss, ICRLoss
from gircse.train.fused_lora import fused_lora

pytestmark = pytest.mark.usefixtures("without_copy")

TEXTS = ["a cat", "a much longer text about dogs and cats", "x"]


@pytest.fixture
def adapted(backbone: Path, tmp_path: Path) -> GIRCSE:
    """A saved LoRA model with random layers, loaded for inference."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    GIRCSE.from_backbone(str(backbone), num_steps=3, lora=lora, device="cpu").save_pretrained(str(tmp_path))
    return GIRCSE(str(tmp_path), device="cpu")


def base_weights(model: GIRCSE) -> list[torch.Tensor]:
    return [cast(torch.Tensor, layer.get_base_layer().weight) for layer in lora_layers(model.encoder.backbone)]


def weights(model: GIRCSE) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in base_weights(model)]


def test_folded_vectors_equal_separate_ones(adapted: GIRCSE) -> None:
    adapted.encoder.fold_adapter = False
    separate, original = adapted.encode_steps(TEXTS), weights(adapted)
    adapted.encoder.fold_adapter = True
    folded = adapted.encode_steps(TEXTS)
    assert all(layer.merged for layer in lora_layers(adapted.encoder.backbone))
    assert not torch.equal(weights(adapted)[0], original[0])
    torch.testing.assert_close(torch.tensor(folded), torch.tensor(separate), rtol=1e-4, atol=1e-5)
    adapted.encoder.fold_adapter = False
    adapted.encode(TEXTS)
    for now, before in zip(weights(adapted), original, strict=True):
        torch.testing.assert_close(now, before, rtol=1e-5, atol=1e-6)


def test_training_takes_the_adapter_out(adapted: GIRCSE) -> None:
    adapted.encode(TEXTS)
    layers = lora_layers(adapted.encoder.backbone)
    assert all(layer.merged for layer in layers)
    parameter = cast(torch.nn.Parameter, layers[0].lora_A["default"].weight)
    parameter.requires_grad_(True)
    features = adapted.encoder.preprocess(TEXTS)
    adapted(features)["sentence_embedding"].sum().backward()
    assert not any(layer.merged for layer in layers)
    assert parameter.grad is not None
    assert bool(cast(torch.Tensor, parameter.grad).abs().sum() > 0)


def test_a_state_dict_of_a_folded_model_is_that_of_an_unfolded_one(adapted: GIRCSE) -> None:
    other, expected = copy.deepcopy(adapted), {key: value.clone() for key, value in adapted.state_dict().items()}
    vectors = torch.tensor(adapted.encode(TEXTS))
    found, folded = adapted.state_dict(), weights(adapted)
    assert list(found) == list(expected)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6, msg=key)
    for now, before in zip(weights(adapted), folded, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0, msg="asking for it changes no weight")
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    other.load_state_dict(found)
    torch.testing.assert_close(torch.tensor(other.encode(TEXTS)), vectors, rtol=1e-4, atol=1e-5)


def test_weights_loaded_into_a_folded_model_count(adapted: GIRCSE) -> None:
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    vectors = torch.tensor(adapted.encode(TEXTS))
    adapted.load_state_dict(before)
    torch.testing.assert_close(torch.tensor(adapted.encode(TEXTS)), vectors, rtol=1e-4, atol=1e-5)
    # Another adapter by peft's own function, before the first text and after it.
    fresh = copy.deepcopy(adapted)
    fresh.load_state_dict(before)
    adapter = {key: value * 0.5 for key, value in get_peft_model_state_dict(adapted.encoder.backbone).items()}
    for model in (adapted, fresh):
        set_peft_model_state_dict(model.encoder.backbone, adapter)
    found = torch.tensor(adapted.encode(TEXTS))
    torch.testing.assert_close(found, torch.tensor(fresh.encode(TEXTS)), rtol=1e-4, atol=1e-5)
    assert (found - vectors).abs().max() > 0.01


def test_a_copy_of_the_hooks_knows_its_own_model(adapted: GIRCSE) -> None:
    adapted.encode(TEXTS)
    other = copy.deepcopy(adapted)
    other.load_state_dict(adapted.state_dict())
    assert all(layer.merged for layer in lora_layers(adapted.encoder.backbone))
    assert not any(layer.merged for layer in lora_layers(other.encoder.backbone))


def test_saving_an_adapter_asks_no_network(
    adapted: GIRCSE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *args, **_: asked.append(args))
    adapted.encoder.reference = dataclasses.replace(adapted.encoder.reference, name="somebody/something")
    adapted.save_pretrained(str(tmp_path / "saved"))
    assert not asked
    assert not [warning for warning in recwarn if "config file" in str(warning.message)]
    facts = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert facts["base_model_name_or_path"] == "somebody/something"


@pytest.fixture
def half(adapted: GIRCSE, tmp_path: Path) -> GIRCSE:
    """The same model read in bfloat16."""
    adapted.save_pretrained(str(tmp_path / "saved"))
    return GIRCSE(str(tmp_path / "saved"), dtype=torch.bfloat16, device="cpu")


def test_bfloat16_weights_are_folded_and_come_back_bit_by_bit(adapted: GIRCSE, half: GIRCSE) -> None:
    exact, original = torch.tensor(adapted.encode(TEXTS)), weights(half)
    half.encoder.fold_adapter = False
    separate = torch.tensor(half.encode(TEXTS))
    half.encoder.fold_adapter = True
    folded = torch.tensor(half.encode(TEXTS))
    assert all(layer.merged for layer in lora_layers(half.encoder.backbone))
    assert {weight.dtype for weight in base_weights(half)} == {torch.bfloat16}
    similar = torch.nn.functional.cosine_similarity
    assert (1 - similar(folded, exact)).max() < 2 * (1 - similar(separate, exact)).max() + 1e-3
    for other in (copy.deepcopy(half), half):
        other.encoder.fold_adapter = False
        torch.testing.assert_close(torch.tensor(other.encode(TEXTS)), separate, rtol=0, atol=0)
        assert all(torch.equal(now, before) for now, before in zip(weights(other), original, strict=True))


def test_bfloat16_weights_stay_where_memory_is_short(half: GIRCSE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "free_memory", lambda device: 1000)
    half.encode(TEXTS)
    monkeypatch.undo()
    half.encode(TEXTS)
    layers = lora_layers(half.encoder.backbone)
    assert not any(layer.merged for layer in layers), "decided once"
    adapters = [parameter for name, parameter in half.named_parameters() if "lora_" in name]
    assert {parameter.dtype for parameter in adapters} == {torch.bfloat16}
    for parameter in adapters:
        parameter.requires_grad_(True)  # and they can still be trained
    half.train()(half.encoder.preprocess(TEXTS))["sentence_embedding"].sum().backward()
    assert all(parameter.grad is not None for parameter in adapters)


def test_an_adapter_is_read_and_trained_in_float32(adapted: GIRCSE, half: GIRCSE, backbone: Path) -> None:
    exact = dict(adapted.named_parameters())
    for name, parameter in half.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, exact[name])
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = GIRCSE.from_backbone(str(backbone), lora=lora, device="cpu", dtype=torch.bfloat16).train()
    model(model.encoder.preprocess(TEXTS))["sentence_embedding"].sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("fold", [True, False])
def test_switched_off_it_is_the_plain_backbone(adapted: GIRCSE, backbone: Path, fold: bool) -> None:
    plain = GIRCSE.from_backbone(str(backbone), num_steps=3, device="cpu").encode(TEXTS, convert_to_tensor=True)
    adapted.encoder.fold_adapter = fold
    before = adapted.encode(TEXTS, convert_to_tensor=True)
    places = [weight.data_ptr() for weight in base_weights(adapted)]
    with adapter_off(adapted.encoder.backbone):
        off = adapted.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(off, plain, rtol=0 if not fold else 1e-4, atol=0 if not fold else 1e-5)
    assert not torch.allclose(before, plain, atol=1e-3)
    torch.testing.assert_close(adapted.encode(TEXTS, convert_to_tensor=True), before, rtol=1e-4, atol=1e-5)
    assert places == [weight.data_ptr() for weight in base_weights(adapted)]
    assert not any(parameter.requires_grad for parameter in adapted.parameters())


@pytest.mark.parametrize(
    ("options", "fused"),
    [({}, True), ({"use_dora": True}, False), ({"lora_dropout": 0.1}, False), ({"lora_bias": True}, False)],
)
def test_fused_layers_have_the_same_values_and_gradients(
    backbone: Path, options: dict[str, Any], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "check_lora", lambda *_: None)  # whoever calls peft himself is not asked
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **options)
    model = GIRCSE.from_backbone(str(backbone), num_steps=3, lora=lora, device="cpu").train()
    features = model.encoder.preprocess(TEXTS)

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        torch.manual_seed(1)
        out = model(dict(features))["step_embeddings"]
        (out * torch.arange(out.shape[-1])).sum().backward()
        return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, gradients = run()
    with fused_lora(model) as layers:
        assert (layers > 0) == fused
        found, others = run()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert float((others[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-7, name
    assert not any("forward" in vars(layer) for layer in lora_layers(model.encoder.backbone)), "nothing is left behind"


def test_a_float32_adapter_is_fused_over_bfloat16_weights(backbone: Path) -> None:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = GIRCSE.from_backbone(str(backbone), num_steps=3, lora=lora, device="cpu", dtype=torch.bfloat16).train()
    features, gradients = model.encoder.preprocess(TEXTS), []
    for fused in (False, True):
        model.zero_grad()
        with fused_lora(model) if fused else nullcontext(0) as layers:
            assert (layers > 0) == fused
            model(dict(features))["step_embeddings"].sin().sum().backward()
        trained = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert {gradient.dtype for gradient in trained} == {torch.float32}
        gradients.append(torch.cat([gradient.flatten() for gradient in trained]))
    assert float(torch.nn.functional.cosine_similarity(*gradients, dim=0)) > 0.97  # AMX rounds otherwise


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}])
def test_a_fused_adapter_follows_its_optimiser(backbone: Path, options: Any) -> None:
    """Adapters are rounded for the weights under them, and fused optimisers do not count a weight's versions up."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = GIRCSE.from_backbone(str(backbone), num_steps=2, lora=lora, device="cpu", dtype=torch.bfloat16).train()
    optimiser = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n], lr=0.1, **options)
    features, seen = model.encoder.preprocess(TEXTS), []
    with fused_lora(model):
        for _ in range(2):
            out = model(dict(features))["sentence_embedding"]
            seen.append(out.detach())
            optimiser.zero_grad()
            out.sin().sum().backward()
            optimiser.step()
        seen.append(model(dict(features))["sentence_embedding"].detach())
    plain = model(dict(features))["sentence_embedding"].detach()
    similar = torch.nn.functional.cosine_similarity
    assert float(similar(seen[2], plain).min()) > 0.98
    assert float(similar(seen[0], seen[2]).min()) < 0.95, "two steps of this size are seen"


def test_threads_fold_an_adapter_once(adapted: GIRCSE, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted.encoder.fold_adapter = False
    expected = torch.tensor(adapted.encode(TEXTS))
    adapted.encoder.fold_adapter = True
    layer_type: Any = type(lora_layers(adapted.encoder.backbone)[0])
    original = layer_type.get_delta_weight

    def slow(self: Any, name: str) -> torch.Tensor:
        time.sleep(0.01)  # time for the other thread to come in between
        return original(self, name)

    monkeypatch.setattr(layer_type, "get_delta_weight", slow)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: torch.tensor(adapted.encode(TEXTS)), range(2)))
    assert {tuple(layer.merged_adapters) for layer in lora_layers(adapted.encoder.backbone)} == {("default",)}
    for vectors in found:
        torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-4)


def test_weights_in_shared_memory_are_left_to_the_others(adapted: GIRCSE) -> None:
    adapted.share_memory()
    before, places = weights(adapted), base_weights(adapted)
    shared = [weight.detach() for weight in places]  # what another process sees
    adapted.encode(TEXTS)
    assert all(torch.equal(a, b) for a, b in zip(before, shared, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, base_weights(adapted), strict=True))


def test_the_active_adapter_is_the_one_that_is_folded(adapted: GIRCSE) -> None:
    first = torch.tensor(adapted.encode(TEXTS))
    torch.manual_seed(1)
    other = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted.encoder.backbone.add_adapter(other, adapter_name="other")
    adapted.encoder.backbone.requires_grad_(False)
    second = torch.tensor(adapted.encode(TEXTS))
    assert not torch.allclose(first, second, atol=1e-2)
    adapted.encoder.backbone.set_adapter("default")
    adapted.encoder.backbone.requires_grad_(False)
    torch.testing.assert_close(torch.tensor(adapted.encode(TEXTS)), first, rtol=1e-4, atol=1e-4)


def test_a_shipped_adapter_is_half_the_size_and_the_same_model(adapted: GIRCSE, backbone: Path, tmp_path: Path) -> None:
    ship = runpy.run_path("recipes/ship_model.py")["ship"]
    adapted.save_pretrained(str(tmp_path / "trained"))
    ship(tmp_path / "trained", tmp_path / "shipped")
    name = "adapter_model.safetensors"
    trained, shipped = (tmp_path / folder / name for folder in ("trained", "shipped"))
    assert shipped.stat().st_size < 0.6 * trained.stat().st_size
    found = torch.tensor(GIRCSE(str(tmp_path / "shipped"), device="cpu").encode(TEXTS))
    torch.testing.assert_close(found, torch.tensor(adapted.encode(TEXTS)), rtol=1e-2, atol=1e-2)
    weights = load_file(trained)
    save_file({key: tensor * 1e9 for key, tensor in weights.items()}, trained)
    with pytest.raises(ValueError, match="not finite in float16"):
        ship(tmp_path / "trained", tmp_path / "again")


def test_a_loaded_model_is_trained_once_it_is_unfrozen(adapted: GIRCSE) -> None:
    adapted.encode(TEXTS)  # folded, as whoever looks at a model before training it has it
    loss, columns = ICRLoss(adapted.train()), [adapted.encoder.preprocess(TEXTS)] * 2
    for each in (loss, CachedICRLoss(adapted, mini_batch_size=2)):
        with pytest.raises(UsageError, match=r"nothing of this model is trainable: call model.encoder.unfreeze\(\)"):
            each(columns)
    adapted.encoder.unfreeze()
    loss(columns).backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    adapted.encoder.checksum_before_freezing = "packed"
    with pytest.raises(UsageError, match="cannot be trained"):
        adapted.encoder.unfreeze()


@pytest.mark.parametrize("wrong", [{"bias": "lora_only"}, {"bias": "all"}, {"use_dora": True}])
def test_adapters_that_would_be_saved_in_part_are_refused(backbone: Path, wrong: dict[str, Any]) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **wrong)
    with pytest.raises(UsageError, match=f"LoRA's {next(iter(wrong))} is not supported"):
        GIRCSE.from_backbone(str(backbone), lora=lora, device="cpu")


def test_modules_that_are_saved_whole_are_the_adapter_s_too(backbone: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False)
    model = GIRCSE.from_backbone(str(backbone), num_steps=2, lora=lora, device="cpu")
    name, norm = next(own for own in model.encoder.backbone.named_parameters() if ".modules_to_save." in own[0])
    before = vectors_checksum(model.encoder)
    with torch.no_grad():
        norm.mul_(2)
    assert vectors_checksum(model.encoder) != before, "its vectors are others"
    model.save_pretrained(str(tmp_path))
    loaded = GIRCSE(str(tmp_path), device="cpu")
    assert vectors_checksum(loaded.encoder) == vectors_checksum(model.encoder)
    torch.testing.assert_close(
        torch.tensor(loaded.encode(TEXTS)), torch.tensor(model.encode(TEXTS)), rtol=1e-3, atol=1e-4
    )
    assert not any(own.requires_grad for own in loaded.encoder.backbone.parameters())
    loaded.encoder.unfreeze()
    assert loaded.encoder.backbone.get_parameter(name).requires_grad
