"""Scores: every K from one encode equals K alone, everything is mteb's own, and finished work is not done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import mteb
import numpy as np
import pytest
import torch
from mteb.cache import ResultCache
from mteb.models import ModelMeta
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from gircse.evaluate.encoder import GenerativeSource, PlainSource, folder_revision, model_meta
from gircse.evaluate.results import Result, Results, read_results
from gircse.evaluate.run import EvaluationSettings, Event, evaluate_model
from gircse.evaluate.suites import TaskRequest
from gircse.evaluate.tasks import local_tasks
from gircse.model import GIRCSE
from tests.task_folders import write_all, write_rows
from tests.tiny import tiny_backbone, tiny_tokenizer

STEPS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GIRCSE:
    """Tiny, with room for the instructions of real tasks: a token is a character."""
    folder = tiny_backbone(tmp_path_factory.mktemp("backbone"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    return GIRCSE.from_backbone(str(folder), num_steps=3, max_seq_length=200, device="cpu")


class Counting(GenerativeSource):
    """Counts the texts it embeds."""

    def __init__(self, model: GIRCSE, steps: tuple[int, ...] = STEPS) -> None:
        super().__init__(model, steps, "test/tiny", "0")
        self.texts: list[tuple[str, str]] = []

    def embed(self, texts: Any, prompt: str) -> Any:
        self.texts += [(prompt, text) for text in texts]
        return super().embed(texts, prompt)


class Constant(GenerativeSource):
    """Gives every text the same vector."""

    def embed(self, texts: Any, prompt: str) -> Any:
        vectors, seconds, tokens = super().embed(texts, prompt)
        return np.ones_like(vectors), seconds, tokens


def score(source: Any, data: Path, output: Path, *names: str, **settings: Any) -> tuple[list[Event], Results]:
    events: list[Event] = []
    requests = [TaskRequest(name) for name in names]
    evaluate_model(source, requests, output, EvaluationSettings(data=data, **settings), events.append)
    return events, read_results(output)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_all(folder)
    return folder


@pytest.fixture(scope="module")
def scored(model: GIRCSE, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Counting, Path]:
    """Every kind of task at every step, from one encode."""
    source, output = Counting(model), tmp_path_factory.mktemp("results")
    names = sorted(path.name for path in data.iterdir())
    events, results = score(source, data, output, *names)
    assert [event for event in events if event.stage == "failed"] == []
    return results, source, output


def by_step(results: Results, task: str) -> dict[int | None, Result]:
    return {r.num_steps: r for r in results.all if r.task == task}


@pytest.mark.slow
def test_all_steps_from_one_encode_equal_each_step_alone(
    model: GIRCSE, data: Path, scored: tuple[Results, Counting, Path], tmp_path: Path
) -> None:
    results, source, _ = scored
    assert len(source.texts) >= 100
    for step in (0, 2):
        names = ("STSBenchmark", "SciFact", "MyClassification", "MyClustering", "MyFacets")
        _, alone = score(GenerativeSource(model, [step], "test/tiny", "0"), data, tmp_path / str(step), *names)
        for task in names:
            assert by_step(alone, task)[step].score == pytest.approx(by_step(results, task)[step].score, abs=1e-3), task
    assert len({round(r.score, 3) for r in by_step(results, "STSBenchmark").values()}) > 1, "steps make a difference"


def test_no_text_is_embedded_twice_in_a_task(model: GIRCSE, data: Path, tmp_path: Path) -> None:
    source = Counting(model)
    score(source, data, tmp_path, "MyFacets")
    assert len(source.texts) == len(set(source.texts)) == 2 * 24  # once under each instruction, control included


@pytest.mark.slow
def test_items_make_up_the_score_of_every_kind(scored: tuple[Results, Counting, Path]) -> None:
    results, _, _ = scored
    assert len(results.all) == len(STEPS) * 10  # nine folders and the control of the facets
    for result in results.all:
        assert result.interval is not None, result.task
        low, high = result.interval
        assert low <= result.score <= high or result.items[0].statistic == "spearman", result.task  # type: ignore[index]
        assert result.facts["cost"]["flops_per_text"] > 0
    costs = [by_step(results, "STSBenchmark")[step].facts["cost"] for step in STEPS]
    for key in ("tokens_per_text", "seconds_per_text", "flops_per_text"):
        assert np.all(np.diff([cost[key] for cost in costs]) > 0), key


def test_scores_and_files_are_mtebs(model: GIRCSE, scored: tuple[Results, Counting, Path], data: Path) -> None:
    results, _, output = scored
    (planned,) = local_tasks(data, "STSBenchmark")
    assert planned.task.metadata.dataset["path"] == "mteb/stsbenchmark-sts"  # mteb's own metadata
    planned.load(seed=42)
    prompt = model.format_instruction(planned.instructions["default"])
    rows = planned.task.dataset["default"]["test"]  # type: ignore[index]
    vectors = [model.encode(rows[side], prompt=prompt) for side in planned.task.column_names]  # type: ignore[attr-defined]
    plain = mteb.evaluate(
        cast(Any, _Given(*vectors)), planned.task, cache=None, show_progress_bar=False, co2_tracker=False
    )
    assert 100 * plain.task_results[0].get_score() == pytest.approx(by_step(results, "STSBenchmark")[3].score, abs=1e-3)
    loaded = ResultCache(output).load_results(load_experiments="match_name", validate_and_filter=False)
    names = {task.task_name for found in loaded.model_results for task in found.task_results}
    assert {"STSBenchmark", "MyFacets", "MyFacets.other-instruction"} <= names
    folder = next(
        path for path in output.rglob("STSBenchmark.json") if "results" in path.parts and "num_steps_3" in str(path)
    )
    meta = json.loads((folder.parent / "model_meta.json").read_text())
    assert meta["experiment_kwargs"] == {"dtype": "float32", "num_steps": 3}
    assert meta["revision"] == "0"
    lines = [json.loads(line) for line in (folder.parent / "run_settings.jsonl").read_text().splitlines()]
    asked = next(line["encode_kwargs"]["prompts"] for line in lines if line["task"] == "STSBenchmark")
    assert asked == {"default": prompt}


class _Given:
    """An mteb encoder that knows its two answers."""

    def __init__(self, *vectors: Any) -> None:
        self.vectors = list(vectors)
        self.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": "test/given", "revision": "0"})

    def encode(self, inputs: Any, **kwargs: Any) -> Any:
        return self.vectors.pop(0)

    def similarity(self, a: Any, b: Any) -> Any:
        return mteb.similarity_functions.cos_sim(a, b)  # type: ignore[attr-defined]

    def similarity_pairwise(self, a: Any, b: Any) -> Any:
        return mteb.similarity_functions.pairwise_cos_sim(a, b)  # type: ignore[attr-defined]


def test_queries_carry_the_instruction_and_documents_do_not(
    scored: tuple[Results, Counting, Path], model: GIRCSE
) -> None:
    _, source, _ = scored
    claim = model.format_instruction("Given a scientific claim, retrieve documents that support or refute the claim")
    assert sum(prompt == claim for prompt, _ in source.texts) == 6
    own = model.format_instruction("Say how")  # of triplets: both sides
    assert sum(prompt == own for prompt, _ in source.texts) >= 6 + 6
    topic = model.format_instruction("Name the topic")
    assert sum(prompt == topic for prompt, _ in source.texts) == 24
    assert source.prompt("anything", PromptType.document) == ""


def test_triplets_that_tie_are_missed(model: GIRCSE, data: Path, tmp_path: Path) -> None:
    _, results = score(Constant(model, [1], "test/tiny", "0"), data, tmp_path, "MyTriplets")
    assert [result.score for result in results.all] == [0.0]


def test_finished_tasks_are_skipped_until_something_changes(model: GIRCSE, tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "out"
    rows = [{"sentence1": f"a{i}", "sentence2": f"b{i * i}", "score": i % 5} for i in range(12)]
    write_rows(data / "STSBenchmark" / "test.jsonl", rows)

    def stages(steps: tuple[int, ...] = (1, 2), **settings: Any) -> tuple[list[str], int]:
        source = Counting(model, steps)
        events, _ = score(source, data, output, "STSBenchmark", **settings)
        return [event.stage for event in events if event.stage != "texts"], len(source.texts)

    assert stages() == (["task", "scored"], 24)
    assert stages() == (["skipped"], 0)
    assert stages((1, 2, 3)) == (["task", "scored"], 24)  # one more step
    assert stages(overwrite=True) == (["task", "scored"], 24)
    assert stages(limit=5)[0] == ["task", "scored"]  # a sample is another result
    (data / "STSBenchmark" / "task.yaml").write_text("kind: STS\ninstruction: Find the same\n")
    assert stages()[0] == ["task", "scored"]
    write_rows(data / "STSBenchmark" / "test.jsonl", rows[:-1])
    assert stages() == (["task", "scored"], 22)


def test_a_failed_task_does_not_stop_the_others(model: GIRCSE, data: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "STS12" / "test.jsonl", [{"sentence1": "a"}])
    write_rows(
        tmp_path / "data" / "STS13" / "test.jsonl",
        [json.loads(x) for x in (data / "STSBenchmark" / "test.jsonl").read_text().splitlines()],
    )
    events, results = score(Counting(model, (1,)), tmp_path / "data", tmp_path, "STS12", "STS13")
    (failed,) = [event for event in events if event.stage == "failed"]
    assert failed.task == "STS12"
    assert "test.jsonl:1: no 'sentence2'" in failed.message
    assert [result.task for result in results.all] == ["STS13"]


def test_wordings_and_noise_change_the_score(model: GIRCSE, data: Path, tmp_path: Path) -> None:
    other = {"*": ["Look at the numbers", "Look at the words"]}
    events, results = score(
        Counting(model, (2,)), data, tmp_path, "STSBenchmark", perturbations=("typos", "case"), paraphrases=other
    )
    assert [event.stage for event in events].count("scored") == 5
    assert len({round(result.score, 4) for result in results.all}) == 5
    assert len(results.plain) == 1


@pytest.mark.parametrize("name", ["MyFacets", "MyTriplets"])
def test_other_wordings_are_not_scored_where_every_facet_or_row_has_its_own(
    model: GIRCSE, data: Path, tmp_path: Path, name: str
) -> None:
    wordings = {"*": ["Look at the numbers"]}
    _, results = score(Counting(model, (1,)), data, tmp_path, name, paraphrases=wordings)
    assert {result.task for result in results.all} <= {name, f"{name}.other-instruction"}
    assert [result.facts["paraphrase"] for result in results.all] == [None] * len(results.all)


def test_other_wordings_of_facets(model: GIRCSE, data: Path, tmp_path: Path) -> None:
    wordings = {"MyFacets": [{"parity": "Count it"}, {"parity": "Add it", "topic": "Read it"}], "*": ["Look"]}
    _, results = score(Counting(model, (2,)), data, tmp_path, "MyFacets", paraphrases=wordings)
    own = results.by_cell["MyFacets", results.columns[0]].facts
    found = {r.facts["paraphrase"]: r.facts for r in results.all if r.task == "MyFacets"}
    assert found[1]["instructions"] == {**own["instructions"], "parity": "Count it"}
    assert found[2]["instructions"] == {"parity": "Add it", "topic": "Read it"}
    by_facet = [{e["subset"]: e["score"] for e in facts["subsets"]} for facts in (own, found[1], found[2])]
    assert by_facet[1]["topic"] == by_facet[0]["topic"], "a facet that is left out keeps its own instruction"
    assert by_facet[1]["parity"] != by_facet[0]["parity"]
    assert [r.facts["paraphrase"] for r in results.all if r.task != "MyFacets"] == [None]


def test_a_perturbation_of_another_seed_is_another_result(model: GIRCSE, data: Path, tmp_path: Path) -> None:
    def stages(seed: int) -> list[str]:
        source = Counting(model, (1,))
        events, _ = score(source, data, tmp_path, "STSBenchmark", perturbations=("typos",), seed=seed)
        return [event.stage for event in events if event.stage in ("scored", "skipped")]

    assert stages(1) == ["scored", "scored"]
    assert stages(1) == ["skipped", "skipped"]
    assert stages(2) == ["skipped", "scored"], "clean texts do not depend on it"


def test_a_revision_is_what_is_loaded(model: GIRCSE, tmp_path: Path) -> None:
    model.save_pretrained(str(tmp_path))
    revision = folder_revision(tmp_path)
    for name in ("checkpoints/state.bin", "eval/scores.json", "log.jsonl", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("anything")
    assert folder_revision(tmp_path) == revision
    (tmp_path / "gircse_config.json").write_text("{}")
    assert folder_revision(tmp_path) != revision


def test_static_embeddings_are_scored_too(data: Path, tmp_path: Path) -> None:
    plain = SentenceTransformer(modules=[StaticEmbedding(tiny_tokenizer(), embedding_dim=8)], device="cpu")
    source = PlainSource(plain, "test/static", "0")
    events, _ = score(source, data, tmp_path, "STSBenchmark")
    assert events[-1].stage == "scored"
    assert source.embed(["ab", "abcd"], "")[2] == [2, 4]


def test_samples_repeat_and_keep_what_is_relevant(model: GIRCSE, data: Path) -> None:
    def sampled(name: str, seed: int = 42) -> Any:
        planned = local_tasks(data, name, limit=2)[0]
        planned.load(seed)
        return planned

    planned = sampled("SciFact")
    kept = planned.task.dataset["default"]["test"]
    assert len(kept["queries"]) == 2
    assert len(kept["corpus"]) == 2 + 2 * 5
    assert set(kept["relevant_docs"]) == set(kept["queries"]["id"])
    assert {d for docs in kept["relevant_docs"].values() for d in docs} <= set(kept["corpus"]["id"])
    assert planned.sample == "2 of 6 queries over 12 of 60 documents; seed 42"
    again = sampled("SciFact").task.dataset["default"]["test"]
    assert again["corpus"]["id"] == kept["corpus"]["id"]
    assert sampled("SciFact", 1).task.dataset["default"]["test"]["corpus"]["id"] != kept["corpus"]["id"]
    reranking = sampled("MyReranking").task.dataset["default"]["test"]
    assert len(reranking["corpus"]) == 2 * 4
    facets = list(local_tasks(data, "MyFacets", limit=5))
    for planned in facets:
        planned.load(42)
    own, control = (cast(Any, p.task.dataset) for p in facets)
    assert own["topic"]["test"]["sentences"] == control["topic under parity"]["test"]["sentences"]
    assert own["topic"]["test"]["labels"] == control["topic under parity"]["test"]["labels"]


def test_variants_of_a_sample_are_of_the_same_items(model: GIRCSE, data: Path, tmp_path: Path) -> None:
    others = {"perturbations": ("typos",), "paraphrases": {"*": ["Say it otherwise"]}}
    names = ("STSBenchmark", "MyClassification", "SciFact")
    _, results = score(Counting(model, (2,)), data, tmp_path, *names, limit=5, **others)
    for name in names:
        found = [result for result in results.all if result.task == name]
        assert len(found) == 3
        assert len({result.facts["sample"] for result in found}) == 1
        assert found[0].facts["sample"].startswith("5 of ")
        clean = results.by_cell[name, results.columns[0]]
        assert [test.n for test in (result.against(clean) for result in found) if test] == [5, 5, 5]


def test_fewer_rows_than_mteb_are_said_to_be_fewer(data: Path) -> None:
    (planned,) = local_tasks(data, "STSBenchmark")
    planned.load(42)
    assert planned.sample == "all; 23 rows where MTEB has 1379: not comparable with published scores"


@pytest.mark.parametrize("similarity", ["dot", "euclidean", "cosine"])
def test_other_models_are_scored_by_their_own_similarity(data: Path, tmp_path: Path, similarity: Any) -> None:
    torch.manual_seed(0)
    weights = torch.randn(97, 8) * 5 * torch.rand(97, 1)  # of all lengths
    static = StaticEmbedding(tiny_tokenizer(), embedding_weights=weights.numpy())
    plain = SentenceTransformer(modules=[static], similarity_fn_name=similarity, device="cpu")
    for name in ("SciFact", "MyBitextMining"):
        _, results = score(PlainSource(plain, "test/static", "0"), data, tmp_path, name)
        result = next(result for result in results.all if result.task == name)
        assert result.facts["fingerprint"].get("similarity", "cosine") == similarity
        (planned,) = local_tasks(data, name)
        planned.load(42)
        encoded = _Encoded(plain)
        found = mteb.evaluate(cast(Any, encoded), planned.task, cache=None, show_progress_bar=False, co2_tracker=False)
        assert result.score == pytest.approx(100 * found.task_results[0].get_score(), abs=1e-3)
        events, _ = score(PlainSource(plain, "test/static", "0"), data, tmp_path, name)
        assert [event.stage for event in events] == ["skipped"]


class _Encoded(_Given):
    """A SentenceTransformer as mteb encoder, and nothing else."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def encode(self, inputs: Any, **kwargs: Any) -> Any:
        return self.model.encode([text for batch in inputs for text in batch["text"]])

    def similarity(self, a: Any, b: Any) -> Any:
        return self.model.similarity(a, b)

    def similarity_pairwise(self, a: Any, b: Any) -> Any:
        return self.model.similarity_pairwise(a, b)


def test_vectors_cut_short_are_scored_so(
    model: GIRCSE, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = score(GenerativeSource(model, [2], "test/tiny", "0"), data, tmp_path, "STSBenchmark")
    monkeypatch.setattr(model, "truncate_dim", 8)
    source = GenerativeSource(model, [0, 2], "test/tiny", "0")
    vectors, _, _ = source.embed(["rain", "bread and more"], "")
    expected = model.encode(["rain", "bread and more"], num_steps=2, normalize_embeddings=True)
    assert vectors.shape == (2, 2, model_meta(source, 2, {}).embed_dim)
    assert np.allclose(vectors[:, 1], expected, atol=1e-5)
    _, cut = score(GenerativeSource(model, [2], "test/tiny", "0"), data, tmp_path, "STSBenchmark")
    assert cut.all[0].facts["fingerprint"]["truncate_dim"] == 8
    assert cut.all[0].score != whole.all[0].score, "scores of whole vectors are not taken for theirs"


def test_any_sentence_transformer_is_scored_as_it_encodes(model: GIRCSE, data: Path, tmp_path: Path) -> None:
    source = PlainSource(model, "test/plain", "0")  # the same object as a plain SentenceTransformer
    _, results = score(source, data, tmp_path, "STSBenchmark")
    (result,) = results.all
    assert result.num_steps is None
    assert result.column == "plain"
    assert result.facts["fingerprint"]["prompts"] == {"default": ""}
    vectors, _, tokens = source.embed(["rain", "bread and more"], "")
    assert vectors.shape == (2, 1, 32)
    assert tokens == [4, 14]
    assert np.allclose(vectors[:, 0], model.encode(["rain", "bread and more"]), atol=1e-5)
    with_prompt, _, _ = source.embed(["rain", "bread and more"], "query")
    assert not np.allclose(vectors, with_prompt)  # the model's own query prompt
