"""Task folders: what is read, and what is said of a folder that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gircse.errors import InputDataError, UsageError
from gircse.evaluate.folders import TaskDescription, describe, read_folder, subsets
from gircse.evaluate.suites import expand, parse_tasks, plan, read_suite, suite_names
from gircse.evaluate.tasks import known_tasks
from tests.task_folders import write_retrieval, write_rows

PAIR = {"sentence1": "a", "sentence2": "b", "score": 1.5}


@pytest.mark.parametrize(
    ("kind", "rows", "line", "said"),
    [
        ("STS", [PAIR, {**PAIR, "score": "high"}], 2, "must be a number"),
        ("STS", [{"sentence1": "a", "score": 1}], 1, "no 'sentence2'"),
        ("PairClassification", [{"sentence1": "a", "sentence2": "b", "label": 2}], 1, "0 or 1"),
        ("Reranking", [{"query": "q", "positive": [], "negative": ["n"]}], 1, "at least one text"),
        ("Triplets", [{"instruction": " ", "text": "t", "positive": "p", "negative": "n"}], 1, "not empty"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, kind: str, rows: list[dict[str, Any]], line: int, said: str) -> None:
    write_rows(tmp_path / "test.jsonl", rows)
    with pytest.raises(InputDataError) as caught:
        read_folder(tmp_path, TaskDescription(kind))
    assert caught.value.line == line
    assert said in str(caught.value)
    assert "test.jsonl" in str(caught.value)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputDataError, match=r"test\.jsonl: missing"):
        read_folder(tmp_path, TaskDescription("STS"))
    (tmp_path / "test.jsonl").write_text(json.dumps(PAIR) + "\n{broken\n")
    with pytest.raises(InputDataError, match=r"test\.jsonl:2: no valid JSON"):
        read_folder(tmp_path, TaskDescription("STS"))
    write_rows(tmp_path / "test.jsonl", [{"text": "t", "label": "new"}])
    write_rows(tmp_path / "train.jsonl", [{"text": "t", "label": "old"}])
    with pytest.raises(InputDataError, match=r"test\.jsonl:1: label 'new' has no example"):
        read_folder(tmp_path, TaskDescription("Classification"))


def test_wrong_judgements_are_named(tmp_path: Path) -> None:
    write_retrieval(tmp_path)
    path = tmp_path / "qrels.tsv"
    good = path.read_text()
    path.write_text(good + "q0\tnowhere\t1\n")
    with pytest.raises(InputDataError, match=rf"qrels\.tsv:{len(good.splitlines()) + 1}: document 'nowhere'"):
        read_folder(tmp_path, TaskDescription("Retrieval"))
    path.write_text(good + "q0 d0 1\n")
    with pytest.raises(InputDataError, match="separated by tabs"):
        read_folder(tmp_path, TaskDescription("Retrieval"))


def test_task_yaml_decides_over_names(tmp_path: Path) -> None:
    folder = tmp_path / "STSBenchmark"
    folder.mkdir()
    assert describe(folder, known_tasks()).kind == "STS"
    (folder / "task.yaml").write_text("kind: Clustering\ninstruction: Find the theme\nlanguage: deu-Latn\n")
    assert describe(folder, known_tasks()) == TaskDescription("Clustering", "Find the theme", "deu-Latn")
    (folder / "task.yaml").write_text("kind: Poetry\n")
    with pytest.raises(InputDataError, match=r"task\.yaml: kind is 'Poetry'; use one of STS"):
        describe(folder, known_tasks())
    (folder / "task.yaml").write_text("kind: STS\nlangauge: eng-Latn\n")
    with pytest.raises(InputDataError, match="unknown: langauge"):
        describe(folder, known_tasks())
    (folder / "task.yaml").write_text("kind: STS\n a: [\n")
    with pytest.raises(InputDataError, match=r"task\.yaml:\d+: no valid YAML"):
        describe(folder, known_tasks())
    unknown = tmp_path / "mine"
    unknown.mkdir()
    with pytest.raises(InputDataError, match="kind: STS"):
        describe(unknown, known_tasks())


def test_subsets_are_subfolders(tmp_path: Path) -> None:
    for name in ("de", "fr"):
        write_rows(tmp_path / name / "test.jsonl", [PAIR])
    assert subsets(tmp_path) == ["de", "fr"]
    assert subsets(tmp_path / "de") == []


def test_names_on_the_command_line() -> None:
    requests = parse_tasks("STS12,MTEB(eng, v2),Tatoeba/deu-eng, Tatoeba/fra-eng")
    assert [(r.name, r.subsets) for r in requests] == [
        ("STS12", ()),
        ("MTEB(eng, v2)", ()),
        ("Tatoeba", ("deu-eng", "fra-eng")),
    ]
    with pytest.raises(UsageError, match="empty task"):
        parse_tasks("STS12,,STS13")


@pytest.mark.slow
def test_hub_tasks_and_benchmarks_by_name() -> None:
    found = expand(parse_tasks("MTEB(eng, v2),Tatoeba/deu-eng"), None)
    assert len(found) == 42
    assert all(request.task is not None for request in found)
    (planned,) = plan(found[-1], None, limit=5)
    assert planned.task.hf_subsets == ["deu-eng"]
    assert planned.limit == 5
    assert planned.instructions == {"default": "Retrieve parallel sentences"} or planned.instructions["default"]
    with pytest.raises(UsageError, match="no task or benchmark 'STS1x'"):
        expand(parse_tasks("STS1x"), None)
    with pytest.raises(UsageError, match="no subset"):
        expand(parse_tasks("Tatoeba/xyz-eng"), None)


def test_suites_name_tasks_that_exist(tmp_path: Path) -> None:
    assert {"dev", "quick"} <= set(suite_names())
    for suite in suite_names():
        requests = read_suite(suite)
        assert requests
        assert all(request.name in known_tasks() and request.limit for request in requests)
    path = tmp_path / "mine.yaml"
    path.write_text("limit: 7\ntasks: [A, {task: B, limit: 3, subsets: [x]}]\n")
    assert [(r.name, r.limit, r.subsets) for r in read_suite(str(path))] == [("A", 7, ()), ("B", 3, ("x",))]
    path.write_text("tasks: [{task: B, limits: 3}]\n")
    with pytest.raises(InputDataError, match="unknown key limits"):
        read_suite(str(path))
    (tmp_path / "A").mkdir()
    with pytest.raises(UsageError, match="has no task 'C'; it has A"):
        expand(parse_tasks("C"), tmp_path)
