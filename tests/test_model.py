"""GIRCSE as its users meet it: encoding, prompts, invariance, saving and loading, explanation. Tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from sentence_transformers import SentenceTransformer

from gircse.cache import expand_cache
from gircse.checksum import vectors_checksum
from gircse.errors import GircseError, UsageError
from gircse.model import GIRCSE
from tests.tiny import tiny_backbone

TEXTS = ["a", "the cat sat", "a much longer text, so that rows are padded", "", "the cat sat", "zz top"]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def lora() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.mark.parametrize("num_steps", [0, 1, 4])
@pytest.mark.parametrize("prompt", ["", "Instruct: find alike\nQuery:"])
def test_same_text_same_vector(model: GIRCSE, num_steps: int, prompt: str) -> None:
    """A batch of 1 = a batch of 64, any order, mixed lengths."""
    texts = [text * (1 + index % 3) for index in range(11) for text in TEXTS][:64]
    alone = np.stack([model.encode(text, prompt=prompt, num_steps=num_steps) for text in texts])
    together = model.encode(texts, prompt=prompt, num_steps=num_steps)
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = model.encode([texts[i] for i in order], prompt=prompt, num_steps=num_steps, batch_tokens=100)
    assert cosines(alone, together).min() >= 0.99999
    assert cosines(together[order], shuffled).min() >= 0.99999
    assert np.abs(cosines(alone[:-1], alone[1:])).min() < 0.99, "different texts have different vectors"


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_module_takes_either_padding_side(model: GIRCSE, side: str) -> None:
    ids = model.tokenize_texts(TEXTS).ids
    longest = max(map(len, ids))
    pad = [[0] * (longest - len(row)) for row in ids]
    rows = [p + row if side == "left" else row + p for p, row in zip(pad, ids, strict=True)]
    mask = [
        [0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p)
        for p, r in zip(pad, ids, strict=True)
    ]
    with torch.no_grad():
        out = model({"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)})["sentence_embedding"]
    assert cosines(out.numpy(), model.encode(TEXTS)).min() >= 0.99999


def test_num_steps_is_chosen_per_call_and_prefix_means_agree(model: GIRCSE) -> None:
    steps = model.encode_steps(TEXTS, num_steps=6)
    assert steps.shape == (len(TEXTS), 6, 32)
    for k in (1, 3, 6):
        assert cosines(model.encode(TEXTS, num_steps=k), steps[:, k - 1]).min() >= 0.99999
    assert cosines(model.encode(TEXTS), steps[:, 2]).min() >= 0.99999, "the checkpoint's K is 3"
    assert cosines(steps[:, 0], steps[:, 5]).max() < 0.9999


def test_zero_steps_is_the_last_token_of_a_plain_encoder(model: GIRCSE) -> None:
    encoder = model.encoder
    for text in TEXTS:
        ids = torch.tensor(model.tokenize_texts([text]).ids)
        with torch.no_grad():
            hidden = encoder.backbone(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        assert cosines(model.encode(text, num_steps=0), hidden.numpy()) >= 0.99999


@pytest.mark.parametrize(("pooling", "first"), [("mean", 1), ("mean_with_prompt", 0), ("last", None)])
def test_pooling_is_what_its_name_says(model: GIRCSE, pooling: str, first: int | None) -> None:
    states = model.encode_states(TEXTS, num_steps=4)
    model.encoder.configure(pooling=pooling)
    expected = states[:, 4] if first is None else states[:, first:].mean(dim=1)
    assert cosines(model.encode(TEXTS, num_steps=4), expected.numpy()).min() >= 0.99999


def test_temperature_changes_the_vectors(model: GIRCSE) -> None:
    before = model.encode(TEXTS)
    model.encoder.configure(temperature=0.05)
    assert cosines(before, model.encode(TEXTS)).max() < 0.9999


def test_instructions_are_formatted_and_documents_are_plain(model: GIRCSE) -> None:
    by_hand = model.encode("Instruct: sentiment\nQuery:the cat sat", prompt="")
    assert cosines(model.encode_query("the cat sat", instruction="sentiment"), by_hand) >= 0.99999
    assert cosines(model.encode_document("the cat sat"), model.encode("the cat sat", prompt="")) >= 0.99999
    assert cosines(model.encode_document("the cat sat", instruction="sentiment"), by_hand) >= 0.99999
    steps = model.encode_steps("the cat sat", instruction="sentiment")
    assert cosines(steps[-1], by_hand) >= 0.99999
    with pytest.raises(UsageError, match="not both"):
        model.encode_query("x", instruction="a", prompt="b")


def test_everything_a_sentence_transformer_does(model: GIRCSE) -> None:
    vectors = model.encode(TEXTS, normalize_embeddings=True)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert model.similarity(vectors, vectors).shape == (6, 6)
    assert model.encode(TEXTS, truncate_dim=8).shape == (6, 8)
    assert model.encode(TEXTS, precision="binary").shape == (6, 4)
    assert model.encode("one").shape == (32,)
    assert isinstance(model.encode(TEXTS, convert_to_tensor=True), torch.Tensor)
    assert len(model.encode([])) == 0
    assert model.encode_steps([], num_steps=2).shape == (0, 2, 32)
    assert model.get_embedding_dimension() == 32
    assert len(model.encode(TEXTS, output_value=None)) == 6
    with pytest.raises(ValueError, match="num_stepz"):
        model.encode(TEXTS, num_stepz=3)


def test_only_the_text_is_cut(model: GIRCSE) -> None:
    prompt = "Instruct: find alike\nQuery:"
    tokenized = model.tokenize_texts(["x" * 100, "short"], prompt)
    assert tokenized.truncated == [True, False]
    assert len(tokenized.ids[0]) == 48
    assert model.tokenizer.decode(tokenized.ids[0]).replace(" ", "").startswith("Instruct:findalike")
    with pytest.raises(UsageError, match="the instruction alone takes 27 of 20 tokens"):
        model.tokenize_texts(["x"], prompt, max_length=20)


def test_wrong_arguments_get_a_sentence(model: GIRCSE) -> None:
    for call, message in (
        (lambda: model.encode("x", num_steps=-1), "num_steps must be 0 or more"),
        (lambda: model.encode_steps("x", num_steps=0), "1 or more"),
        (lambda: model.encode("x", batch_tokens=0), "batch_tokens"),
        (lambda: model.encode("x" * 40, num_steps=30), "exceed the backbone's 64 positions"),
        (lambda: model.encoder.configure(pooling="median"), "pooling must be one of"),
        (lambda: model.explain("x", num_steps=0), "explain needs"),
        (lambda: model.explain("x", instruction="find", prompt="query: "), "either an instruction or a prompt"),
        (lambda: model.encode_steps("x", instruction="find", prompt_name="query"), "either an instruction or a prompt"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


@pytest.mark.parametrize("kind", ["backbone", "adapter", "full"])
def test_a_checkpoint_remembers_everything(backbone: Path, tmp_path: Path, kind: str) -> None:
    model = GIRCSE.from_backbone(
        str(backbone), num_steps=4, pooling="mean_with_prompt", temperature=0.5, max_seq_length=40,
        lora=lora() if kind == "adapter" else None, full_finetune=kind == "full", device="cpu",
    )  # fmt: skip
    model.prompts["query"] = "Q: "
    if kind == "full":
        with torch.no_grad():
            next(model.encoder.backbone.parameters()).add_(0.05)
    expected = model.encode_query(TEXTS)
    model.save_pretrained(str(tmp_path / "saved"))
    saved = {path.name for path in (tmp_path / "saved").iterdir()}
    assert ("adapter_model.safetensors" in saved) == (kind == "adapter")
    assert ("model.safetensors" in saved) == (kind == "full")

    ours = GIRCSE(str(tmp_path / "saved"), device="cpu")
    theirs = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    assert ours.encoder.refinement == model.encoder.refinement
    assert cosines(ours.encode_query(TEXTS), expected).min() >= 0.99999
    assert cosines(theirs.encode_query(TEXTS), expected).min() >= 0.99999
    assert (
        cosines(theirs.encode(TEXTS, prompt="Q: ", num_steps=1), ours.encode_query(TEXTS, num_steps=1)).min() >= 0.99999
    )
    if kind == "adapter":
        ours.encoder.backbone.disable_adapters()
        assert cosines(ours.encode_query(TEXTS), expected).min() < 0.999, "the adapter was in use"


def test_loading_never_guesses(backbone: Path, tmp_path: Path) -> None:
    other = tiny_backbone(tmp_path / "other", seed=5)
    GIRCSE.from_backbone(str(backbone), lora=lora(), device="cpu").save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(GircseError, match="are not those this model was trained on"):
        GIRCSE(str(tmp_path / "saved"), backbone=str(other))
    config = tmp_path / "saved" / "gircse_config.json"
    values = json.loads(config.read_text())
    del values["refinement"]["pooling"]
    config.write_text(json.dumps(values))
    with pytest.raises(GircseError, match=r"incomplete.*pooling"):
        GIRCSE(str(tmp_path / "saved"))
    with pytest.raises(GircseError, match="from_backbone"):
        GIRCSE(str(backbone))


def test_a_place_without_a_model_is_named_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(GircseError, match=r"nowhere is no saved GIRCSE model: no such folder") as error:
        GIRCSE(str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)
    with pytest.raises(GircseError, match=r"nowhere is no saved GIRCSE model: no such folder$"):
        GIRCSE._load_default_modules(cast(Any, None), str(tmp_path / "nowhere"))
    with pytest.raises(GircseError, match=r"is no saved GIRCSE model: no such folder, nor to be had from the hub$"):
        GIRCSE._load_default_modules(cast(Any, None), "runs/nowhere")


def test_a_backbones_name_is_no_model_and_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sentence_transformers.SentenceTransformer.__init__", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(GircseError, match=r"is a backbone.*leave the name out.*from_backbone"):
        GIRCSE("smollm2-135m")


def test_loading_runs_no_code_of_the_folder(backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Module: pass\n")
    (tmp_path / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "modeling.Module"}]')
    with pytest.raises(GircseError, match="brings code of its own"):
        GIRCSE(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_explain_adds_up(model: GIRCSE) -> None:
    steps = model.explain("the cat sat", instruction="find alike", num_steps=4, top=97)
    assert [step.step for step in steps] == [1, 2, 3, 4]
    for step in steps:
        assert sum(step.weights) == pytest.approx(1, abs=1e-4)
        assert step.weights == sorted(step.weights, reverse=True)
        entropy = -sum(w * np.log(w) for w in step.weights if w > 0)
        assert step.entropy == pytest.approx(entropy, abs=1e-3)
    assert steps[0].movement is None
    zs = model.encode_steps("the cat sat", instruction="find alike", num_steps=4)
    for k in (1, 2, 3):
        assert steps[k].movement == pytest.approx(1 - cosines(zs[k - 1], zs[k]), abs=1e-5)
    # The first soft token's heaviest entry is what the backbone itself would say next.
    ids = torch.tensor(model.tokenize_texts(["the cat sat"], model.format_instruction("find alike")).ids)
    with torch.no_grad():
        top = int(model.encoder.backbone(input_ids=ids).logits[0, -1].argmax())
    assert steps[0].tokens[0] == model.tokenizer.decode([top])


def test_explain_reads_the_prompt_that_encode_reads(model: GIRCSE, monkeypatch: pytest.MonkeyPatch) -> None:
    prompted = model.explain("the cat sat", instruction="find alike")
    assert model.explain("the cat sat")[0].weights != prompted[0].weights
    monkeypatch.setitem(model.prompts, "own", model.format_instruction("find alike"))
    monkeypatch.setattr(model, "default_prompt_name", "own")
    assert model.explain("the cat sat")[0].weights == prompted[0].weights


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_several_processes_give_the_same_vectors(backbone: Path, adapted: bool) -> None:
    torch.manual_seed(0)
    model = GIRCSE.from_backbone(str(backbone), num_steps=3, lora=lora() if adapted else None, device="cpu")
    model.encoder.backbone.requires_grad_(False)
    texts = [f"{text} {index}" for index in range(4) for text in TEXTS]
    model.encoder.fold_adapter = False
    expected = model.encode(texts, num_steps=2)
    model.encoder.fold_adapter = True
    spread = model.encode(texts, device=["cpu", "cpu"], chunk_size=6, num_steps=2)
    assert cosines(spread, expected).min() >= 0.99999
    assert cosines(model.encode(texts, num_steps=2), expected).min() >= 0.99999, "the workers shared its weights"


def test_the_number_of_steps_may_be_numpys(model: GIRCSE) -> None:
    for steps in np.arange(3):
        assert (model.encode(TEXTS, num_steps=steps) == model.encode(TEXTS, num_steps=int(steps))).all()


@given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=8),
    prompt=st.sampled_from(["", "Instruct: x\nQuery:", "Instruct: something long\nQuery:"]),
    num_steps=st.integers(0, 3),
    budget=st.integers(1, 300),
    most=st.sampled_from([1, 3, 32]),
    prompt_pass=st.sampled_from([16, 64, 1024]),
    switches=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    pooling=st.sampled_from(["mean", "last", "mean_with_prompt"]),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_batching_gives_the_same_vectors(
    texts: list[str],
    prompt: str,
    num_steps: int,
    budget: int,
    most: int,
    prompt_pass: int,
    switches: tuple[bool, bool, bool],
    pooling: str,
    data: st.DataObject,
) -> None:
    """Whatever is folded, packed, replayed, grouped or batched together."""
    model = _shared_model()
    encoder = model.encoder
    encoder.configure(pooling=pooling)
    order = data.draw(st.permutations(range(len(texts))))
    encoder.fold_adapter = encoder.packed_weights.enabled = encoder.step_graphs.anywhere = False
    expected = np.stack([model.encode(text, prompt=prompt, num_steps=num_steps) for text in texts])
    encoder.fold_adapter, encoder.packed_weights.enabled, encoder.step_graphs.anywhere = switches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gircse.encoder.prompt_pass_tokens", lambda device: prompt_pass)
        got = model.encode(
            [texts[i] for i in order], prompt=prompt, num_steps=num_steps, batch_tokens=budget, batch_size=most
        )
    assert cosines(expected[list(order)], got).min() >= 0.99999


_MODELS: list[GIRCSE] = []


def _shared_model() -> GIRCSE:
    """One tiny model for all of hypothesis' examples (fixtures are made anew for each test, not for each example)."""
    if not _MODELS:
        from tempfile import mkdtemp

        torch.manual_seed(0)
        backbone = str(tiny_backbone(Path(mkdtemp())))
        _MODELS.append(GIRCSE.from_backbone(backbone, num_steps=3, max_seq_length=48, lora=lora(), device="cpu"))
        _MODELS[0].encoder.backbone.requires_grad_(False)  # so that the adapter can be folded into the weights
    return _MODELS[0]


def test_a_text_that_occurs_twice_is_embedded_once(model: GIRCSE, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = type(model.encoder).forward

    def count(self: object, features: dict, **kwargs: object) -> dict:
        seen.append(len(features["input_ids"]))
        return original(self, features, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model.encoder), "forward", count)
    vectors = model.encode(["cat", "dog", "cat", "cat"])
    assert sum(seen) == 2
    assert (vectors[0] == vectors[2]).all()
    assert not (vectors[0] == vectors[1]).all()


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError()]
)
def test_out_of_memory_halves_the_batch(
    model: GIRCSE, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    texts = [f"text number {i}" for i in range(13)]
    expected = model.encode(texts)
    original = type(model.encoder).forward

    def small_machine(self: object, features: dict, **kwargs: object) -> dict:
        if len(features["input_ids"]) > 3:
            raise error
        return original(self, features, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model.encoder), "forward", small_machine)
    np.testing.assert_allclose(model.encode(texts), expected, rtol=1e-4, atol=1e-5)
    assert [record.message for record in caplog.records if "out of memory" in record.message] == [
        "out of memory with 13 texts in a batch: going on with half; a smaller batch_tokens avoids this"
    ]

    failed: list[int] = []

    def counting(self: object, features: dict, **kwargs: object) -> dict:
        if len(features["input_ids"]) > 3:
            failed.append(len(features["input_ids"]))
        return small_machine(self, features, **kwargs)

    monkeypatch.setattr(type(model.encoder), "forward", counting)
    many = [f"text number {i}" for i in range(40)]
    cosine = cosines(model.encode(many, batch_size=10), np.stack([model.encode(text) for text in many]))
    assert cosine.min() >= 0.99999
    assert failed == [10, 5], "the budget stays halved for the batches that follow"

    def broken(self: object, features: dict, **kwargs: object) -> dict:
        raise RuntimeError("something else")

    monkeypatch.setattr(type(model.encoder), "forward", broken)
    with pytest.raises(RuntimeError, match="something else"):
        model.encode(texts)


def test_half_of_a_batch_of_unlike_lengths_is_half_of_what_it_holds(
    model: GIRCSE, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, tried = type(model.encoder).forward, []

    def small_machine(self: object, features: dict, **kwargs: object) -> dict:
        tried.append(len(features["input_ids"]))
        assert len(tried) < 20, "the same batch again and again"
        if len(features["input_ids"]) > 8:
            raise torch.OutOfMemoryError
        return original(self, features, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model.encoder), "forward", small_machine)
    assert len(model.encode(["long " * 40, *(f"text {number}" for number in range(12))], num_steps=1)) == 13
    assert tried[0] == 13


def test_rows_are_not_padded_where_soft_tokens_are_written_by_groups(
    model: GIRCSE, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["long " * 30, *(f"text {number}" for number in range(12))]
    sizes: list[int] = []
    pad = type(model.encoder).pad
    monkeypatch.setattr(type(model.encoder), "pad", lambda self, ids: sizes.append(len(ids)) or pad(self, ids))
    assert not model.pads_batches
    expected = model.encode(texts, num_steps=2, batch_tokens=150)
    few, sizes[:] = len(sizes), []
    monkeypatch.setattr("gircse.model.takes_groups", lambda decoder: False)
    assert model.pads_batches
    assert cosines(model.encode(texts, num_steps=2, batch_tokens=150), expected).min() >= 0.99999
    assert few < len(sizes)


def test_weights_that_were_trained_whole_are_saved_when_frozen(backbone: Path, tmp_path: Path) -> None:
    model = GIRCSE.from_backbone(str(backbone), num_steps=2, full_finetune=True, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    vectors, checksum = model.encode(TEXTS), vectors_checksum(model.encoder)
    model.requires_grad_(False)
    assert vectors_checksum(model.encoder) == checksum
    model.save_pretrained(str(tmp_path))
    loaded = GIRCSE(str(tmp_path), device="cpu").requires_grad_(False)
    np.testing.assert_allclose(loaded.encode(TEXTS), vectors, rtol=1e-5, atol=1e-6)
    assert loaded.encoder.weights == "full"
    with pytest.raises(UsageError, match="fine-tuned whole"):
        loaded.encoder.add_lora(lora())
    fresh = GIRCSE.from_backbone(str(backbone), num_steps=2, full_finetune=True, device="cpu")
    fresh.encoder.add_lora(lora())
    assert fresh.encoder.weights == "adapter", "what was never trained is its backbone's"


@pytest.mark.parametrize("training", [True, False])
def test_weights_that_were_unfrozen_for_a_while_are_saved(backbone: Path, tmp_path: Path, training: bool) -> None:
    model = GIRCSE.from_backbone(str(backbone), num_steps=2, device="cpu")
    assert model.encoder.weights == "backbone"
    model.requires_grad_(True).train(training)
    model(model.encoder.preprocess(TEXTS))["sentence_embedding"].sum().backward()
    model.requires_grad_(False)
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "model.safetensors").exists()


def test_a_models_own_truncation_holds_everywhere(model: GIRCSE, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.encode(TEXTS)[:, :8]
    monkeypatch.setattr(model, "truncate_dim", 8)
    np.testing.assert_array_equal(model.encode_steps(TEXTS)[:, -1], expected)
    found = model.encode_tokenized(model.tokenize_texts(TEXTS))
    np.testing.assert_array_equal(found.numpy(), expected)
    assert found.is_contiguous()
    lengths = np.linalg.norm(model.encode_steps(TEXTS, normalize_embeddings=True), axis=-1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


@pytest.mark.parametrize("num_steps", ["auto", 3.0, [1, 2]])
def test_one_whole_number_of_steps_is_wanted(model: GIRCSE, num_steps: Any) -> None:
    with pytest.raises(UsageError, match="num_steps must be one whole number for all texts, not"):
        model.encode(TEXTS, num_steps=num_steps)
    np.testing.assert_array_equal(model.encode(TEXTS, num_steps=np.int64(2)), model.encode(TEXTS, num_steps=2))
    np.testing.assert_array_equal(model.encode(TEXTS, num_steps=torch.tensor(2)), model.encode(TEXTS, num_steps=2))


def test_errors_that_only_num_steps_can_mend_say_no_more(model: GIRCSE) -> None:
    most = model.encoder.decoder.max_positions
    with pytest.raises(UsageError, match=f"exceed the backbone's {most} positions; lower num_steps$"):
        model.encode("a", num_steps=most)
    with pytest.raises(UsageError, match="there are no token embeddings"):
        model.encode("a", output_value="token_embeddings")


def test_the_older_name_of_dtype_counts(model: GIRCSE, tmp_path: Path) -> None:
    model.save_pretrained(str(tmp_path))
    loaded = GIRCSE(str(tmp_path), device="cpu", model_kwargs={"torch_dtype": torch.bfloat16})
    assert loaded.encoder.weights_dtype == "bfloat16"


@pytest.mark.parametrize("num_steps", [0, 2])
def test_keys_and_values_are_held_once(model: GIRCSE, monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    """Without gradients no cache is copied into another, and without soft tokens none is kept."""
    texts = [f"the same instruction before a text number {number}" for number in range(6)]
    expected = model.encode(texts, num_steps=num_steps)
    kept: list[bool] = []

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a cache was copied")

    def expand(cache: Any, rows: int, *, keep: bool) -> Any:
        kept.append(keep)
        return expand_cache(cache, rows, keep=keep)

    monkeypatch.setattr("gircse.refiner.join_caches", refuse)
    monkeypatch.setattr("gircse.refiner.expand_cache", expand)
    assert np.array_equal(model.encode(texts, num_steps=num_steps), expected)
    assert not any(kept)
    assert bool(kept) == (num_steps == 0)
