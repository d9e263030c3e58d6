"""8-bit weights: products near the exact ones, the same vector in any batch, and what they cannot do is refused."""

from __future__ import annotations

import copy
import logging
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from gircse.adapter import lora_layers
from gircse.checksum import vectors_checksum
from gircse.cli import app
from gircse.errors import UsageError
from gircse.fast import int8
from gircse.fast.frozen_linear import freeze_linear_layers
from gircse.fast.int8 import Int8Linear, WidenedInt8Linear, int8_linear
from gircse.fast.packed_linear import TableLinear
from gircse.model import GIRCSE
from gircse.search.answer import BackboneWriter
from tests.task_folders import write_all
from tests.tiny import tiny_backbone

MULTIPLIES_INT8 = int8.multiplies_int8
TEXTS = ["one", "a second text", "and a third one that is longer", "four", "five", "", "four"]


@pytest.fixture(scope="module", params=[True, False], ids=["integers", "widened"], autouse=True)
def multiplied(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether products are of integers, as processors with VNNI compute them, or of float32, as others do."""
    if request.param and not int8.multiplies_int8():
        pytest.skip("this processor does not multiply integers of 8 bits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "multiplies_int8", lambda: request.param)
        yield request.param


def layer_of(linear: nn.Linear) -> Int8Linear:
    made = int8_linear(linear.weight, linear.bias, table=torch.empty(0))
    assert isinstance(made, Int8Linear)
    return made


@pytest.fixture
def adapted(backbone: Path) -> GIRCSE:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = GIRCSE.from_backbone(str(backbone), num_steps=3, max_seq_length=48, lora=lora, device="cpu")
    return model.requires_grad_(False).eval()


def prompt_states(model: GIRCSE) -> np.ndarray:
    """K = 0: over random weights a soft token can turn rounding into another vector."""
    return model.encode(TEXTS, num_steps=0, normalize_embeddings=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "width", "bias"), [(576, 1536, False), (17, 5, True), (192, 576, True)])
def test_products_are_those_of_the_rounded_weights(
    out: int, width: int, bias: bool, dtype: torch.dtype, multiplied: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(width, out, bias=bias)
    made = layer_of(layer)
    assert type(made) is (Int8Linear if multiplied else WidenedInt8Linear)
    weight = made.matrix().double() * made.scale.unsqueeze(1)
    steps = (weight - layer.weight).abs() / made.scale.unsqueeze(1)
    assert steps.max() <= 0.501, "to the nearest integer"
    for rows in (1, 2, 3, 5, 6, 64, 65, 300):  # the sizes are such as kernels take, and such as they leave to oneDNN
        x = (torch.randn(rows, width) * torch.logspace(-3, 3, rows).unsqueeze(1)).to(dtype)
        x[0, 0] = 40 * x[0].abs().max()  # a value that dwarfs its own row and must not touch another
        found, wanted = made(x), F.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())
        assert found.dtype == dtype
        half_step = x.double().abs().amax(dim=1, keepdim=True) / 127 / 254 / 2  # of the input's second part
        if multiplied:
            bound = half_step * weight.abs().sum(dim=1) + 1e-5 * wanted.abs() + 1e-6
        else:  # inputs are not rounded, sums are of float32
            bound = 1e-6 * (x.double().abs() @ weight.abs().T) + 1e-6
        bound += 0 if dtype == torch.float32 else 2**-8 * wanted.abs()
        assert bool(((found.double() - wanted).abs() <= bound).all())
    assert made(torch.zeros(2, 3, width, dtype=dtype)).shape == (2, 3, out)


def test_a_models_layers_are_replaced_and_its_adapter_stays(adapted: GIRCSE) -> None:
    exact = torch.tensor(prompt_states(adapted))
    without = GIRCSE.from_backbone(adapted.encoder.reference.name, num_steps=3, max_seq_length=48, device="cpu")
    other = torch.tensor(prompt_states(without))
    checksum = vectors_checksum(adapted.encoder)
    assert adapted.quantize_weights() is adapted
    assert adapted.quantize_weights().encoder.weights_dtype == "int8"
    found = torch.tensor(prompt_states(adapted))
    near, far = (found * exact).sum(dim=-1), (found * other).sum(dim=-1)
    assert near.min() > 0.99
    assert not torch.equal(found, exact)
    assert near.min() > far.max(), "the adapter counts"
    assert not [m for m in adapted.modules() if type(m) is nn.Linear]
    assert not lora_layers(adapted.encoder.backbone)
    assert vectors_checksum(adapted.encoder) == checksum, "an index of float32 vectors may be searched"


@pytest.mark.usefixtures("without_copy")
def test_layers_under_an_adapter_that_is_not_folded(adapted: GIRCSE) -> None:
    """Quantised before or after the adapter was folded: the same integers."""
    again = copy.deepcopy(adapted)
    again.encode(TEXTS)
    assert lora_layers(again.encoder.backbone)[0].merged
    assert not lora_layers(adapted.encoder.backbone)[0].merged
    for name, tensor in adapted.quantize_weights().state_dict().items():
        torch.testing.assert_close(tensor, again.quantize_weights().state_dict()[name], rtol=1e-6, atol=1e-6)


def test_weights_of_bfloat16(adapted: GIRCSE, tmp_path: Path) -> None:
    adapted.save_pretrained(str(tmp_path / "saved"))
    half = GIRCSE(str(tmp_path / "saved"), dtype=torch.bfloat16, device="cpu").quantize_weights()
    exact = torch.tensor(prompt_states(adapted))
    assert (torch.tensor(prompt_states(half)) * exact).sum(dim=-1).min() > 0.98


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), num_steps=st.integers(0, 6), budget=st.integers(8, 200))
def test_same_text_same_vector(quantized: GIRCSE, seed: int, num_steps: int, budget: int) -> None:
    chosen = random.Random(seed)
    texts = ["".join(chosen.choices("abc dé!", k=chosen.randrange(30))) for _ in range(chosen.randrange(1, 9))]
    together = quantized.encode(texts, num_steps=num_steps, batch_tokens=budget)
    for text, vector in zip(texts, together, strict=True):
        alone = quantized.encode(text, num_steps=num_steps)
        assert 1 - float(quantized.similarity(alone, vector)) < 1e-5


@pytest.fixture(scope="module")
def quantized(backbone: Path) -> GIRCSE:
    return GIRCSE.from_backbone(str(backbone), num_steps=3, max_seq_length=48, device="cpu").quantize_weights()


def test_copies_and_pickles_compute_the_same(quantized: GIRCSE) -> None:
    vectors = quantized.encode(TEXTS)
    for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        np.testing.assert_array_equal(other.encode(TEXTS), vectors)
        assert other.encoder.weights_dtype == "int8"
    layer = next(m for m in quantized.modules() if isinstance(m, Int8Linear))
    assert layer.matrix().dtype == torch.int8
    (*_, state) = (value for name, value in quantized.state_dict().items() if name.endswith("q_proj.weight"))
    assert state.dtype == torch.int8


def test_what_they_cannot_do_is_said_in_a_line(quantized: GIRCSE, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not saved"):
        quantized.save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(UsageError, match="the plain LLM is gone"):
        list(BackboneWriter(quantized.encoder).write([{"role": "user", "content": "hello"}]))
    layer = layer_of(nn.Linear(3, 4, bias=False))
    with pytest.raises(UsageError, match="no gradients"):
        layer(torch.randn(2, 3, requires_grad=True))
    with pytest.raises(UsageError, match="compute on the CPU"):
        layer(torch.randn(2, 3, device="meta"))


def test_processors_that_would_lose_sums_multiply_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "multiplies_int8", MULTIPLIES_INT8)
    for has_vnni, capability in ((True, "AVX512"), (False, "AVX512"), (True, "AVX2"), (False, "DEFAULT")):
        monkeypatch.setattr(int8.torch.cpu, "_is_vnni_supported", lambda has=has_vnni: has)
        monkeypatch.setattr(int8.torch.backends.cpu, "get_cpu_capability", lambda of=capability: of)
        made = int8_linear(torch.randn(4, 3), None, table=torch.empty(0))
        both = has_vnni and capability == "AVX512" and torch.backends.mkldnn.is_available()
        assert type(made) is (Int8Linear if both else WidenedInt8Linear)


def test_only_linear_layers_are_replaced() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), nn.Linear(6, 2))
    assert freeze_linear_layers(module, Int8Linear) == 2
    assert [type(m).__name__ for m in module.modules() if not isinstance(m, nn.Sequential)] == [
        "Embedding", "Int8Linear", "LayerNorm", "Int8Linear",
    ]  # fmt: skip


@pytest.fixture
def saved(adapted: GIRCSE, tmp_path: Path) -> str:
    adapted.save_pretrained(str(tmp_path / "model"))
    return str(tmp_path / "model")


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(filter(None, TEXTS)), encoding="utf-8")
    return str(file)


def test_the_flag_changes_vectors_and_is_remembered(saved: str, corpus: str, tmp_path: Path) -> None:
    asked = ["embed", corpus, "--model", saved, "--dtype", "float32", "--num-steps", "0"]
    vectors = []
    for name, options in (("plain", []), ("small", ["--quantize", "int8"])):
        output = tmp_path / f"{name}.npy"
        result = CliRunner().invoke(app, [*asked, "-o", str(output), *options])
        assert result.exit_code == 0, result.output
        vectors.append(np.load(output))
    cosines = F.cosine_similarity(*map(torch.tensor, vectors), dim=-1)
    assert cosines.min() > 0.99
    assert not np.array_equal(*vectors)
    result = CliRunner().invoke(app, [*asked, "-o", str(tmp_path / "small.npy"), "--resume"])
    assert 'dtype was "int8", is "float32"' in str(result.exception)


def test_every_verb_that_has_the_flag_heeds_it(
    saved: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lancedb")
    pytest.importorskip("mteb")
    pytest.importorskip("fastapi")
    index, data = str(tmp_path / "an.index"), tmp_path / "data"
    chunks = ["--chunk-tokens", "24", "--chunk-overlap", "4"]
    assert CliRunner().invoke(app, ["index", corpus, "-o", index, "--model", saved, *chunks]).exit_code == 0
    write_all(data)

    def refuse(model: GIRCSE) -> GIRCSE:
        raise UsageError("quantized")

    monkeypatch.setattr(GIRCSE, "quantize_weights", refuse)
    for arguments in (
        ["embed", corpus, "-o", str(tmp_path / "a.npy")],
        ["index", corpus, "-o", str(tmp_path / "b.index"), *chunks],
        ["search", index, "one"],
        ["rerank", "one", corpus],
        ["serve", "--port", "0"],
        ["evaluate", "--tasks", "STSBenchmark", "--data", str(data), "-o", str(tmp_path / "results")],
    ):
        result = CliRunner().invoke(app, [*arguments, "--model", saved, "--quantize", "int8"])
        assert str(result.exception) == "quantized", (arguments, result.output, result.exception)


@pytest.mark.slow
def test_other_processes_get_the_weights(quantized: GIRCSE) -> None:
    pool = quantized.start_multi_process_pool(["cpu"])
    try:
        vectors = quantized.encode(TEXTS, pool=pool)
    finally:
        quantized.stop_multi_process_pool(pool)
    assert (1 - torch.diag(quantized.similarity(vectors, quantized.encode(TEXTS)))).max() < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_tied_to_the_table_stays_there(tied: bool, tmp_path: Path) -> None:
    """Few rows read the table itself: more must not read a copy of it that is rounded."""
    folder = tiny_backbone(tmp_path, "llama-tied" if tied else "llama")
    model = GIRCSE.from_backbone(str(folder), num_steps=3, max_seq_length=48, device="cpu").quantize_weights()
    head = model.encoder.decoder.vocabulary.head
    assert isinstance(head, TableLinear if tied else Int8Linear)
    assert not tied or head.weight is model.encoder.decoder.vocabulary.embedding.weight


def test_other_models_keep_their_weights_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mteb")
    from gircse.evaluate import encoder

    def stop(name: str, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(encoder, "load_other_model", stop)
    for quantize, told in ((None, []), ("int8", ["all-minilm-l6-v2 is no GIRCSE model"])):
        caplog.clear()
        with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING, logger="gircse"):
            encoder.load_source("all-minilm-l6-v2", None, quantize=quantize)
        assert [record.message.split(":")[0] for record in caplog.records] == told


def test_another_dtype_of_the_rest_is_taken(backbone: Path) -> None:
    model = GIRCSE.from_backbone(str(backbone), num_steps=3, max_seq_length=48, device="cpu").quantize_weights()
    vectors = torch.tensor(model.encode(["a text", "another"]))
    changed = torch.tensor(model.bfloat16().encode(["a text", "another"]))
    assert torch.nn.functional.cosine_similarity(vectors, changed).min() > 0.99
