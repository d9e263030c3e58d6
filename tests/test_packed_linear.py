"""Weights kept packed alone: the same products and vectors, one copy, and what they cannot do is refused in a line."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import cast

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
from gircse.fast import packed_linear
from gircse.fast.packed_linear import PackedLinear, TableLinear, packs_in_place
from gircse.model import GIRCSE
from gircse.search.answer import BackboneWriter
from tests.task_folders import write_all
from tests.tiny import tiny_backbone

TEXTS = ["one", "a second text", "and a third one that is longer", "four", "five", "", "four"]
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if packs_in_place(dtype)]

pytestmark = pytest.mark.skipif(not DTYPES, reason="packed products are not the fastest on this processor")


def untrained(backbone: Path, *, targets: str | list[str] = "all-linear") -> GIRCSE:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = GIRCSE.from_backbone(str(backbone), num_steps=3, max_seq_length=48, lora=lora, device="cpu")
    return model.requires_grad_(False).eval()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest 1 - cosine."""
    return float((1 - F.cosine_similarity(torch.tensor(a), torch.tensor(b), dim=-1)).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "width", "bias"), [(576, 1536, False), (17, 5, True), (192, 576, True)])
def test_products_are_those_of_the_plain_layer(out: int, width: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(width, out, bias=bias, dtype=dtype)
    made = PackedLinear(layer.weight, layer.bias, dtype=dtype)
    torch.testing.assert_close(made.matrix(), layer.weight.detach(), rtol=0, atol=0)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.no_grad():
        for shape in ((1,), (3,), (64,), (2, 33), (257,), (1100,), (0,)):
            x = torch.randn(*shape, width, dtype=dtype)
            torch.testing.assert_close(made(x), layer(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("on_the_right", [0, 64, 1000])
def test_products_with_a_table_are_those_of_its_packed_copy(
    on_the_right: int, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gircse.fast.packed_linear.MOST_ROWS_ON_THE_RIGHT", on_the_right)
    monkeypatch.setattr("gircse.fast.packed_linear.OUTPUTS_AT_A_TIME", 100)
    torch.manual_seed(0)
    layer = nn.Linear(64, 333, bias=bias, dtype=dtype)
    packed, made = PackedLinear(layer.weight, layer.bias, dtype=dtype), TableLinear(layer.weight, layer.bias)
    assert made.weight is layer.weight
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for shape in ((1,), (3,), (64,), (2, 33), (0,)):
        x = torch.randn(*shape, 64, dtype=dtype)
        with torch.no_grad():
            torch.testing.assert_close(made(x), packed(x), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(made(x), layer(x), rtol=0, atol=0)  # where gradients are on
    x.requires_grad_()
    made(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tied_head_stays_the_embedding_table(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny_backbone(tmp_path, "llama-tied")
    plain = GIRCSE.from_backbone(str(folder), num_steps=3, dtype=dtype, device="cpu").eval()
    vectors = plain.encode(TEXTS)
    made = copy.deepcopy(plain).pack_weights()
    assert distance(made.encode(TEXTS), vectors) < (1e-5 if dtype == torch.float32 else 1e-3)
    assert not len(made.encoder.packed_weights), "no second copy"
    for other in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        vocabulary = other.encoder.decoder.vocabulary
        assert type(vocabulary.head) is TableLinear
        assert vocabulary.head.weight is vocabulary.embedding.weight
        np.testing.assert_array_equal(other.encode(TEXTS), made.encode(TEXTS))


@pytest.mark.usefixtures("without_copy")
@pytest.mark.parametrize("folded", [False, True])
def test_a_model_keeps_vectors_checksum_and_size(backbone: Path, folded: bool) -> None:
    model = untrained(backbone)
    facts = vectors_checksum(model.encoder), model.encoder.num_parameters
    plain = copy.deepcopy(model)
    vectors = plain.encode(TEXTS)
    if folded:
        model.encode(TEXTS)
    assert lora_layers(model.encoder.backbone)[0].merged == folded
    assert model.pack_weights() is model
    assert model.pack_weights().encoder.frozen
    assert distance(model.encode(TEXTS), vectors) < 1e-5
    assert (vectors_checksum(model.encoder), model.encoder.num_parameters) == facts
    assert not [m for m in model.modules() if type(m) is nn.Linear]
    assert not lora_layers(model.encoder.backbone)
    assert not len(model.encoder.packed_weights), "no second copies"
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == len(plain.encoder.packed_weights)
    assert model.encoder.weights_dtype == "float32"


@pytest.mark.usefixtures("without_copy")
@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="this processor packs no bfloat16")
def test_weights_of_bfloat16_are_rounded_once(backbone: Path, tmp_path: Path) -> None:
    """Folded, then rounded, as where the adapter is folded without packing: the same weights to the bit."""
    untrained(backbone).save_pretrained(str(tmp_path))
    plain, packed = (GIRCSE(str(tmp_path), dtype=torch.bfloat16, device="cpu") for _ in range(2))
    vectors = plain.encode(TEXTS, num_steps=0)
    assert distance(packed.pack_weights().encode(TEXTS, num_steps=0), vectors) < 1e-3
    for layer in lora_layers(plain.encoder.backbone):
        assert layer.merged
    kept = {name: weight for name, weight in packed.encoder.backbone.state_dict().items() if name.endswith("weight")}
    found = dict(plain.encoder.backbone.named_parameters(remove_duplicate=False))  # as they are: a state dict unfolds
    compared = 0
    for name, weight in kept.items():
        plain_name = name.replace(".weight", ".base_layer.weight")
        torch.testing.assert_close(weight, found[plain_name if plain_name in found else name].data, rtol=0, atol=0)
        compared += 1
    assert compared > 10


def test_an_adapter_over_a_tied_head_leaves_the_embeddings(backbone: Path) -> None:
    model = untrained(backbone, targets=["lm_head", "q_proj"])
    table = model.encoder.decoder.vocabulary.embedding.weight
    head = next(
        layer for layer in lora_layers(model.encoder.backbone) if layer.get_base_layer().out_features == len(table)
    )
    head.get_base_layer().weight = table
    before, vectors = table.clone(), model.encode(TEXTS)
    model.pack_weights()
    torch.testing.assert_close(model.encoder.decoder.vocabulary.embedding.weight, before, rtol=0, atol=0)
    assert distance(model.encode(TEXTS), vectors) < 1e-5


def test_weights_that_other_processes_share_stay_as_they_are(backbone: Path) -> None:
    model = untrained(backbone)
    model.share_memory()
    shared = [cast(nn.Linear, layer.get_base_layer()).weight.data for layer in lora_layers(model.encoder.backbone)]
    before = [weight.clone() for weight in shared]
    model.pack_weights()
    for weight, kept in zip(shared, before, strict=True):
        torch.testing.assert_close(weight, kept, rtol=0, atol=0)


def test_another_dtype_after_packing_is_refused(backbone: Path) -> None:
    model = untrained(backbone).pack_weights()
    with pytest.raises(UsageError, match="packed weights stay float32 and were given bfloat16; load the model again"):
        model.bfloat16().encode(TEXTS)


@pytest.fixture(scope="module")
def packed(backbone: Path) -> GIRCSE:
    return untrained(backbone).pack_weights()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), num_steps=st.integers(0, 6), budget=st.integers(8, 200))
def test_same_text_same_vector(packed: GIRCSE, seed: int, num_steps: int, budget: int) -> None:
    chosen = random.Random(seed)
    texts = ["".join(chosen.choices("abc dé!", k=chosen.randrange(30))) for _ in range(chosen.randrange(1, 9))]
    together = packed.encode(texts, num_steps=num_steps, batch_tokens=budget)
    alone = np.stack([packed.encode(text, num_steps=num_steps) for text in texts])
    assert distance(together, alone) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_and_pickles_compute_the_same(backbone: Path, dtype: torch.dtype) -> None:
    made = GIRCSE.from_backbone(str(backbone), num_steps=3, dtype=dtype, device="cpu").pack_weights()
    vectors = made.encode(TEXTS)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        np.testing.assert_array_equal(other.encode(TEXTS), vectors)
        assert other.encoder.frozen


@pytest.mark.slow
def test_other_processes_get_the_weights(packed: GIRCSE) -> None:
    pool = packed.start_multi_process_pool(["cpu"])
    try:
        vectors = packed.encode(TEXTS, pool=pool)
    finally:
        packed.stop_multi_process_pool(pool)
    assert distance(vectors, packed.encode(TEXTS)) < 1e-5


def test_what_they_cannot_do_is_said_in_a_line(packed: GIRCSE, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="packed weights are not saved; save the model before pack_weights"):
        packed.save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(UsageError, match="the plain LLM is gone"):
        list(BackboneWriter(packed.encoder).write([{"role": "user", "content": "hello"}]))
    layer = PackedLinear(torch.randn(4, 3), dtype=torch.float32)
    with pytest.raises(UsageError, match="packed weights have no gradients"):
        layer(torch.randn(2, 3, requires_grad=True))
    with pytest.raises(UsageError, match="packed weights compute on the CPU"):
        layer(torch.randn(2, 3, device="meta"))


def test_packed_weights_are_not_quantised(packed: GIRCSE) -> None:
    with pytest.raises(UsageError, match="packed weights are not quantised"):
        packed.quantize_weights()


def test_nothing_changes_where_it_would_not_pay(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = untrained(backbone)
    with monkeypatch.context() as patch:
        patch.setattr(packed_linear.torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        assert not model.pack_weights().encoder.frozen
        patch.setattr(packed_linear.torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert packs_in_place(torch.float32) == torch.backends.mkldnn.is_available()
        assert not packs_in_place(torch.bfloat16), "which such processors do not multiply"
    model.encoder.packed_weights.enabled = False  # GIRCSE_PACKED_WEIGHTS=0
    assert not model.pack_weights().encoder.frozen
    assert not model.half().pack_weights().encoder.frozen
    assert not packs_in_place(torch.float16)


def test_verbs_that_only_embed_keep_one_copy(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lancedb")
    pytest.importorskip("mteb")
    pytest.importorskip("fastapi")
    saved, index, data, corpus = (str(tmp_path / name) for name in ("model", "an.index", "data", "texts.txt"))
    untrained(backbone).save_pretrained(saved)
    Path(corpus).write_text("\n".join(filter(None, TEXTS)), encoding="utf-8")
    chunks = ["--chunk-tokens", "24", "--chunk-overlap", "4"]
    assert CliRunner().invoke(app, ["index", corpus, "-o", index, "--model", saved, *chunks]).exit_code == 0
    write_all(Path(data))

    def refuse(model: GIRCSE) -> GIRCSE:
        raise UsageError("packed")

    monkeypatch.setattr(GIRCSE, "pack_weights", refuse)
    for arguments, packs in (
        (["embed", corpus, "-o", str(tmp_path / "a.npy")], True),
        (["index", corpus, "-o", str(tmp_path / "b.index"), *chunks], True),
        (["search", index, "one"], True),
        (["rerank", "one", corpus], True),
        (["similarity", "one", "two"], True),
        (["serve", "--port", "0"], True),
        (["evaluate", "--tasks", "STSBenchmark", "--data", data, "-o", str(tmp_path / "results")], True),
        (["ask", index, "one", "--max-tokens", "1"], False),  # the plain LLM writes
    ):
        result = CliRunner().invoke(app, [*arguments, "--model", saved])
        assert (str(result.exception) == "packed") == packs, (arguments, result.output, result.exception)
