"""What is scored of a model, and what is written down of it: its steps, its revision, its facts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from mteb.cache import ResultCache
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from gircse.evaluate import encoder
from gircse.evaluate.encoder import GenerativeSource, PlainSource, load_source, model_meta
from gircse.evaluate.results import read_results
from gircse.evaluate.run import EvaluationSettings, evaluate_model
from gircse.evaluate.suites import TaskRequest
from gircse.model import GIRCSE
from tests.task_folders import write_rows
from tests.tiny import tiny_tokenizer


def test_results_know_the_models_own_steps(model: GIRCSE, tmp_path: Path) -> None:
    rows = [{"sentence1": f"a{i}", "sentence2": f"b{i * i}", "score": i % 5} for i in range(8)]
    write_rows(tmp_path / "data" / "Mine" / "test.jsonl", rows)
    (tmp_path / "data" / "Mine" / "task.yaml").write_text("kind: STS\ninstruction: Go\n")
    settings = EvaluationSettings(data=tmp_path / "data")
    for source in (GenerativeSource(model, [1, 3, 4], "test/tiny", "0"), PlainSource(model, "test/plain", "0")):
        assert evaluate_model(source, [TaskRequest("Mine")], tmp_path, settings, lambda event: None) == 0
    results = read_results(tmp_path)
    assert [results.own_step(name) for name in ("tiny", "plain")] == [3, None]
    assert results.compared() == [("tiny K=3", "tiny K=1"), ("tiny K=3", "plain")]


@pytest.mark.parametrize("changes", [{"attention": "bidirectional"}, {"pooling": "prompt_mean"}, {}])
def test_an_encoder_only_model_is_scored_without_steps(
    model: GIRCSE, changes: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model.encoder.configure(num_steps=0, **changes)
    model.save_pretrained(str(tmp_path / "saved"))
    with caplog.at_level(logging.WARNING, logger="gircse"):
        source = load_source(str(tmp_path / "saved"), [0, 1, 5], device="cpu")
    assert source.steps == (0,)
    (said,) = [record.message for record in caplog.records if record.name == "gircse.evaluate.encoder"]
    assert said == "local/saved is an encoder-only model: scored at K=0, whatever other steps were asked for"
    vectors, seconds, _ = source.embed(["one", "and two"], "")
    assert vectors.shape == (2, 1, 32)
    assert seconds.shape == (1,)
    caplog.clear()
    for steps in (None, [0]):
        assert load_source(str(tmp_path / "saved"), steps, device="cpu").steps == (0,)
    assert not [record for record in caplog.records if record.name == "gircse.evaluate.encoder"]


def test_a_model_with_steps_is_scored_at_those_asked_for(model: GIRCSE, tmp_path: Path) -> None:
    model.save_pretrained(str(tmp_path))
    assert load_source(str(tmp_path), [0, 4], device="cpu").steps == (0, 4)
    assert load_source(str(tmp_path), None, device="cpu").steps == (3,)


def test_what_mteb_is_told_of_a_model(model: GIRCSE, backbone: Path, tmp_path: Path) -> None:
    source = GenerativeSource(model, [2], "test/tiny", "0")
    meta = model_meta(source, 2, {"limit": 5})
    assert (meta.embed_dim, meta.max_tokens, meta.adapted_from) == (32, 48, backbone.name)
    assert Path(model.encoder.reference.name).is_absolute()
    assert meta.experiment_kwargs == {"dtype": "float32", "num_steps": 2, "limit": 5}
    path = ResultCache(tmp_path).get_task_result_path("Mine", meta)
    bare = meta.model_copy(update={"embed_dim": None, "max_tokens": None, "adapted_from": None})
    assert path == ResultCache(tmp_path).get_task_result_path("Mine", bare), "what was scored before is found"
    static = SentenceTransformer(modules=[StaticEmbedding(tiny_tokenizer(), embedding_dim=8)], device="cpu")
    meta = model_meta(PlainSource(static, "test/static", "0"), None, {})
    assert (meta.embed_dim, meta.max_tokens, meta.adapted_from) == (8, None, None)
    assert "Infinity" not in json.dumps(meta.to_dict(), default=str)


def test_the_revision_of_a_hub_model_is_the_commit_in_the_cache(
    model: GIRCSE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path))
    assert encoder._identity("owner/model", model) == ("owner/model", "main")
    repository = tmp_path / "models--owner--model"
    for path, text in ((f"snapshots/{commit}/modules.json", "[]"), ("refs/main", commit)):
        (repository / path).parent.mkdir(parents=True)
        (repository / path).write_text(text)
    assert encoder._identity("owner/model", model) == ("owner/model", commit)
