"""Task folders: what is read, and what is said of a folder that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gircse.errors import InputDataError, UsageError
from gircse.evaluate.folders import TaskDescription, describe, read_folder, subsets
from gircse.evaluate.suites import expand, parse_tasks, plan, read_suite, suite_names
from gircse.evaluate.tasks import known_tasks, local_tasks
from tests.task_folders import write_retrieval, write_rows

PAIR = {"sentence1": "a", "sentence2": "b", "score": 1.5}


@pytest.mark.parametrize(
    ("kind", "rows", "line", "said"),
    [
        ("STS", [PAIR, {**PAIR, "score": "high"}], 2, "must be a number"),
        ("STS", [PAIR, PAIR, {**PAIR, "score": float("nan")}], 3, "'score' is 'nan'; it must be a number"),
        ("STS", [{**PAIR, "score": float("-inf")}], 1, "'score' is '-inf'; it must be a number"),
        ("STS", [{**PAIR, "score": True}], 1, "must be a number"),
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


TEXT = {"text": "t", "label": "old"}
FACET = {"text": "t", "labels": {"topic": "a"}}
NAMED = {"text": "t", "labels": {"topic": None}}
FIRST, SECOND = {"id": "1", "text": "t"}, {"id": "2", "text": "u"}
RETRIEVAL: dict[str, list[Any]] = {"corpus.jsonl": [FIRST, SECOND], "queries.jsonl": [FIRST], "qrels.tsv": ["1\t1\t1"]}
ASKED = {"query": "1", "candidates": ["1"]}


@pytest.mark.parametrize(
    ("kind", "files", "said"),
    [
        (
            "Classification",
            {"train.jsonl": [TEXT], "test.jsonl": [TEXT, "", " ", {**TEXT, "label": "new"}]},
            "test.jsonl:4: label 'new' has no example in train.jsonl; add one there",
        ),
        ("Facets", {"test.jsonl": [FACET, "", {**FACET, "labels": {"style": "b"}}]}, "test.jsonl:3: no label for"),
        (
            "Facets",
            {"test.jsonl": ["", FACET, NAMED]},
            "test.jsonl:3: the label for the facet 'topic' is None",
        ),
        ("Retrieval", {"corpus.jsonl": [FIRST, "", FIRST]}, "corpus.jsonl:3: id '1' stands on line 1 already; give"),
        ("Retrieval", {"corpus.jsonl": ["", {**FIRST, "title": 5}]}, "corpus.jsonl:2: 'title' is 5; it must be a text"),
        ("Retrieval", {"queries.jsonl": ["", FIRST, FIRST]}, "queries.jsonl:3: id '1' stands on line 2 already; give"),
        ("Retrieval", {"qrels.tsv": ["1\t1\t²"]}, "qrels.tsv:1: must be query-id, corpus-id and a whole number"),
        ("Retrieval", {"qrels.tsv": ["1\t1\t1", "", "7\t1\t1"]}, "qrels.tsv:3: query '7' is not in queries.jsonl; add"),
        (
            "Retrieval",
            {"candidates.jsonl": [ASKED, "", {"query": "1", "candidates": ["2"]}]},
            "candidates.jsonl:3: query '1' stands on line 1 already; put its candidates together on one line",
        ),
        (
            "Reranking",
            {"candidates.jsonl": ["", ASKED, "", {**ASKED, "query": "2"}]},
            "candidates.jsonl:4: query '2' is not in queries.jsonl; add it there, or remove the line",
        ),
        (
            "Reranking",
            {"candidates.jsonl": ["", {**ASKED, "candidates": ["1", "3"]}]},
            "candidates.jsonl:2: candidate '3' is not in corpus.jsonl; add it there, or remove it here",
        ),
    ],
)
def test_wrong_lines_are_named_after_blank_ones(
    tmp_path: Path, kind: str, files: dict[str, list[Any]], said: str
) -> None:
    retrieval = RETRIEVAL if kind in ("Retrieval", "Reranking") else {}
    for name, lines in {**retrieval, **files}.items():
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
    if kind == "Facets":
        (tmp_path / "instructions.json").write_text('{"topic": "Name the topic"}')
    with pytest.raises(InputDataError) as caught:
        read_folder(tmp_path, TaskDescription(kind))
    assert str(caught.value).startswith(f"{tmp_path}/{said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: STS\n\nfiles: test.jsonl\n", "3: files is 'test.jsonl'; it must be a list of file names"),
        ("kind: STS\nfiles: 5\n", "2: files is 5; it must be a list of file names, such as [test.jsonl]"),
        ("kind: STS\nfiles: []\n", "2: files is []; it must be a list"),
        ("# mine\nkind: [STS]\n", "2: kind is ['STS']; use one of STS"),
        ("kind: STS\n5: x\n", "2: unknown: 5; allowed are"),
        ("kind: STS\ninstruction: 7\n", "2: instruction is 7; it must be a text"),
        ("kind: STS\nlanguage: no\n", "2: language is False; write a code such as deu-Latn"),
        ("kind: STS\nlanguage: [deu-Latn]\n", "2: language is ['deu-Latn']; write a code such as deu-Latn"),
        ("kind: STS\nlanguage: de\n", "2: language is 'de'; write deu-Latn"),
        ("kind: STS\nlanguage: ru-RU\n", "2: language is 'ru-RU'; write rus-Cyrl"),
        ("kind: STS\nlanguage: deu\n", "2: language is 'deu'; write deu-Latn"),
        ("kind: STS\nlanguage: xyq-Latn\n", "2: language is 'xyq-Latn'; write a language of ISO 639-3 and its script"),
        ("kind: STS\nlanguage:\n  a: deu-Latn\n  b: fr\n", "2: language is 'fr'; write fra-Latn"),
    ],
)
def test_wrong_descriptions_are_named(tmp_path: Path, text: str, said: str) -> None:
    write_rows(tmp_path / "mine" / "test.jsonl", [PAIR])
    path = tmp_path / "mine" / "task.yaml"
    path.write_text(text)
    with pytest.raises(InputDataError) as caught:
        local_tasks(tmp_path, "mine")
    assert str(caught.value).startswith(f"{path}:{said}")


def test_files_in_another_encoding_are_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_bytes(f"{json.dumps(PAIR)}\n\n".encode() + '{"sentence1": "é"}'.encode("latin-1"))
    with pytest.raises(InputDataError, match=r"test\.jsonl:3: not UTF-8"):
        read_folder(tmp_path, TaskDescription("STS"))
    (tmp_path / "task.yaml").write_bytes("kind: STS\ninstruction: é\n".encode("latin-1"))
    with pytest.raises(InputDataError, match=r"task\.yaml:2: not UTF-8"):
        describe(tmp_path, known_tasks())


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


def test_ids_may_be_whole_numbers(tmp_path: Path) -> None:
    write_rows(tmp_path / "corpus.jsonl", [{"id": 0, "text": "t"}, {"id": "1", "text": "u"}])
    write_rows(tmp_path / "queries.jsonl", [{"id": 7, "text": "q"}])
    (tmp_path / "qrels.tsv").write_text("7\t0\t1\n")
    write_rows(tmp_path / "candidates.jsonl", [{"query": 7, "candidates": [0, 1]}])
    data = read_folder(tmp_path, TaskDescription("Retrieval")).retrieval
    assert data is not None
    assert [row["id"] for row in data.corpus + data.queries] == ["0", "1", "7"]
    assert (data.relevant, data.candidates) == ({"7": {"0": 1}}, {"7": ["0", "1"]})
    for row, said in (({"id": "0", "text": "u"}, "id '0' stands on line 1 already"), ({"id": True, "text": "u"}, "it")):
        write_rows(tmp_path / "corpus.jsonl", [{"id": 0, "text": "t"}, row])
        with pytest.raises(InputDataError, match=rf"corpus\.jsonl:2: .*{said}"):
            read_folder(tmp_path, TaskDescription("Retrieval"))


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
    with pytest.raises(InputDataError, match=r"task\.yaml:1: kind is 'Poetry'; use one of STS"):
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
