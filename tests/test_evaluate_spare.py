"""The spared work changes no score, and mteb's tasks with several labels or numbers are scored too."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from mteb.abstasks import AbsTaskClassification, AbsTaskMultilabelClassification, AbsTaskRegression
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from gircse.evaluate.encoder import PlainSource, StepStore
from gircse.evaluate.items import items_of
from gircse.evaluate.results import read_results
from gircse.evaluate.run import EvaluationSettings, Event, evaluate_model
from gircse.evaluate.spare import ListColumns, classification_scores, one_thread
from gircse.evaluate.suites import TaskRequest
from gircse.evaluate.tasks import sample_task
from tests.tiny import tiny_tokenizer

LABELS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=100, deadline=None)
@given(pairs=LABELS, words=st.booleans())
def test_scores_are_those_of_mteb(pairs: list[tuple[int, int]], words: bool) -> None:
    """Labels that are never predicted or never true, two labels, words for labels."""
    true, predicted = (list(column) for column in zip(*pairs, strict=True))
    if words and len(set(true)) != 2:  # mteb's average precision knows numbers only
        true, predicted = [f"label {i}" for i in true], [f"label {i}" for i in predicted]
    if len(set(true)) == 2:
        names = sorted(set(true))  # and 0 and 1 only
        true, predicted = [names.index(i) for i in true], [int(i == names[1]) for i in predicted]
    expected = AbsTaskClassification._calculate_scores(cast(Any, None), cast(Any, true), np.asarray(predicted))
    found = classification_scores(true, np.asarray(predicted))
    assert set(found) == set(expected)
    for name, value in cast(dict[str, Any], expected).items():
        assert found[name] == (None if value is None else pytest.approx(float(value), abs=1e-12)), name


def test_columns_are_lists_and_selections_keep_that() -> None:
    columns = {"text": [f"text {i}" for i in range(6)], "label": [0, 1, 2, 0, 1, 2]}
    plain, rows = Dataset.from_dict(columns), ListColumns.of(Dataset.from_dict(columns))
    assert rows["text"] == plain["text"][:]
    rows["text"].clear()
    assert rows["text"] == plain["text"][:], "a caller's changes are his own"
    chosen = rows.select([4, 1, 1]).select(range(1, 3))
    assert isinstance(chosen["label"], list)
    assert chosen["label"] == plain.select([4, 1, 1]).select(range(1, 3))["label"][:] == [1, 1]
    assert chosen.select_columns(["text"])["text"] == ["text 1", "text 1"]
    assert (chosen[0], chosen[:], list(chosen)) == ({"text": "text 1", "label": 1}, chosen.to_dict(), [chosen[0]] * 2)


def test_torch_has_its_threads_back_where_texts_are_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def embed(texts: Any, prompt: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
        seen.append(torch.get_num_threads())
        return np.zeros((len(texts), 1, 2), dtype=np.float32), np.zeros(1), [1] * len(texts)

    source = cast(Any, SimpleNamespace(embed=embed, steps=(None,), size=None))
    try:
        torch.set_num_threads(3)
        with closing(StepStore(source)) as store, one_thread() as store.threads:
            assert torch.get_num_threads() == 1
            store.get(["a text"], [""], None)
            assert torch.get_num_threads() == 1
        assert seen == [torch.get_num_threads()] == [3]
    finally:
        torch.set_num_threads(before)


def _metadata(name: str, kind: str, main_score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        description="made up",
        dataset={"path": f"local/{name}", "revision": "1"},
        type=cast(Any, kind),
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )


def _load(task: Any, values: list[Any]) -> None:
    """Forty texts, the same to learn from and to test."""
    if not task.data_loaded:
        texts = [f"{'abc'[i % 3] * 4} {'xy'[i % 2] * 3} number {i}" for i in range(40)]
        split = Dataset.from_dict({"text": texts, task.label_column_name: values})
        task.dataset = {"default": DatasetDict({"train": split, "test": split})}
        task.data_loaded = True


class Topics(AbsTaskClassification):
    """As the hub's tasks in one language: without a level of subsets."""

    metadata = _metadata("Topics", "Classification", "accuracy")

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        _load(self, [i % 3 for i in range(40)])
        dataset: Any = self.dataset
        self.dataset = dataset.get("default", dataset)


class Labels(AbsTaskMultilabelClassification):
    """Texts with one label or two."""

    metadata = _metadata("Labels", "MultilabelClassification", "accuracy")

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        _load(self, [[i % 3] if i % 2 else [i % 3, 3] for i in range(40)])


class Numbers(AbsTaskRegression):
    """Texts with a number, few of them different."""

    metadata = _metadata("Numbers", "Regression", "kendalltau")

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        _load(self, [i % 3 / 2 for i in range(40)])


def _own(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("gircse")]


@pytest.mark.parametrize("limit", [None, 12])
@pytest.mark.parametrize("kind", [Labels, Numbers])
def test_several_labels_and_numbers_are_scored_without_an_interval(
    kind: type[Labels] | type[Numbers], limit: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = SentenceTransformer(modules=[StaticEmbedding(tiny_tokenizer(), embedding_dim=8)], device="cpu")
    events: list[Event] = []
    request = TaskRequest(kind.metadata.name, limit=limit, task=kind())
    with caplog.at_level(logging.WARNING, "gircse"):
        failed = evaluate_model(
            PlainSource(plain, "test/static", "0"), [request], tmp_path, EvaluationSettings(), events.append
        )
    assert failed == 0, events[-1].message
    assert not _own(caplog), "no interval is what such a task is expected to have"
    (result,) = read_results(tmp_path).all
    assert result.interval is None
    said = {Labels: "12 of 40 rows; learning from 8 a label, drawn from 16; seed 42", Numbers: "12 of 40 rows; seed 42"}
    assert result.facts["sample"] == ("all" if limit is None else said[kind])


@pytest.mark.parametrize("limit", [None, 12])
def test_a_task_of_the_hub_in_one_language_can_be_sampled(limit: int | None, tmp_path: Path) -> None:
    plain = SentenceTransformer(modules=[StaticEmbedding(tiny_tokenizer(), embedding_dim=8)], device="cpu")
    events: list[Event] = []
    request = TaskRequest("Topics", limit=limit, task=Topics())
    source = PlainSource(plain, "test/static", "0")
    assert evaluate_model(source, [request], tmp_path, EvaluationSettings(), events.append) == 0, events[-1].message
    (result,) = read_results(tmp_path).all
    assert result.facts["sample"].split(";")[0] == ("all" if limit is None else "12 of 40 rows")
    assert result.interval is not None


def test_a_sample_of_several_labels_has_examples_of_each() -> None:
    task = Labels()
    task.load_data()
    task.samples_per_label = 2
    sample_task(task, limit=5, seed=1)
    labels = cast(Any, task.dataset)["default"]["train"]["label"]
    counts = [sum(label in given for given in labels) for label in range(4)]
    assert min(counts) >= 4
    assert len(labels) <= 4 * 4


def test_predictions_that_cannot_be_read_give_no_interval_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    # lists of labels of several lengths are what an array cannot hold
    attributes = {"metadata": Labels.metadata, "load_data": Labels.load_data}
    task: Any = type("Unlike", (AbsTaskClassification,), attributes)()
    task.load_data()
    with caplog.at_level(logging.WARNING, "gircse"):
        assert items_of(task, "default", "test", {"main_score": 0.5}, [[0] * 40], None) is None
    (said,) = _own(caplog)
    assert "Labels default: no interval" in said
    assert "ValueError" in said
