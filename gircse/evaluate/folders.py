"""Task folders: which files a kind of task has, and reading them with the line named where one is wrong.

Knows files and rows; knows nothing of mteb or models. docs/evaluate.md describes the layout for people.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from gircse.errors import GircseError, InputDataError, UsageError

Check = Callable[[Any], bool]
Row = dict[str, Any]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_filled(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


_CHECKS: dict[str, tuple[Check, str]] = {
    "text": (_is_text, "a text"),
    "filled": (_is_filled, "a text that is not empty"),
    "number": (lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number"),
    "label": (lambda value: isinstance(value, str | int) and not isinstance(value, bool), "a text or a whole number"),
    "binary": (lambda value: value in (0, 1), "0 or 1"),
    "texts": (_is_texts, "a list of at least one text"),
    "labels": (lambda value: isinstance(value, dict) and bool(value), 'an object such as {"topic": "sport"}'),
}

LAYOUTS: dict[str, dict[str, dict[str, str]]] = {
    "STS": {"test.jsonl": {"sentence1": "text", "sentence2": "text", "score": "number"}},
    "PairClassification": {"test.jsonl": {"sentence1": "text", "sentence2": "text", "label": "binary"}},
    "Classification": {
        "train.jsonl": {"text": "text", "label": "label"},
        "test.jsonl": {"text": "text", "label": "label"},
    },
    "Clustering": {"test.jsonl": {"text": "text", "label": "label"}},
    "Retrieval": {
        "corpus.jsonl": {"id": "filled", "text": "text"},
        "queries.jsonl": {"id": "filled", "text": "filled"},
        "qrels.tsv": {},
    },
    "Reranking": {"test.jsonl": {"query": "filled", "positive": "texts", "negative": "texts"}},
    "BitextMining": {"test.jsonl": {"sentence1": "text", "sentence2": "text"}},
    "Facets": {"test.jsonl": {"text": "text", "labels": "labels"}, "instructions.json": {}},
    "Triplets": {"test.jsonl": {"instruction": "filled", "text": "filled", "positive": "filled", "negative": "filled"}},
}
"""Files of each kind of task, and the fields of their rows. Further fields are ignored."""


@dataclass(frozen=True)
class TaskDescription:
    """What a task.yaml, or the table of known tasks, says of a folder.

    Attributes:
        kind: A key of `LAYOUTS`.
        instruction: What the embeddings should be about; None for the kind's own.
        language: ISO 639-3 and script, e.g. ``eng-Latn``: of the task, or of each subset.
        folder: Where the files are, if not in a folder of the task's name.
        files: Which files are the test data, if not ``test.jsonl``.
        main_score: mteb's name of the score that counts; None for the kind's own.
    """

    kind: str
    instruction: str | None = None
    language: str | Mapping[str, str] = "eng-Latn"
    folder: str | None = None
    files: tuple[str, ...] = ("test.jsonl",)
    main_score: str | None = None


@dataclass
class RetrievalData:
    """Queries, documents and which belong together.

    Attributes:
        corpus: ``id``, ``title``, ``text``.
        queries: ``id``, ``text``.
        relevant: Query id to document id to grade.
        candidates: Query id to the only documents that are ranked for it; None to rank the whole corpus.
    """

    corpus: list[Row]
    queries: list[Row]
    relevant: dict[str, dict[str, int]]
    candidates: dict[str, list[str]] | None = None


@dataclass
class FolderData:
    """The rows of a folder without subfolders.

    Attributes:
        splits: ``test``, and ``train`` for classification.
        retrieval: Instead of splits, for retrieval and reranking.
        facets: Facet to its instruction, for facet tasks.
    """

    splits: dict[str, list[Row]] = field(default_factory=dict)
    retrieval: RetrievalData | None = None
    facets: dict[str, str] = field(default_factory=dict)


def describe(folder: Path, known: Mapping[str, TaskDescription]) -> TaskDescription:
    """What a folder is: its task.yaml, else the table of known tasks.

    Raises:
        InputDataError: Nothing says what kind of task it is, or task.yaml is wrong.
    """
    path = folder / "task.yaml"
    if not path.is_file():
        if folder.name in known:
            return known[folder.name]
        kinds = ", ".join(LAYOUTS)
        raise InputDataError(str(path), None, f"missing; write one with a line such as 'kind: STS' (one of {kinds})")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        problem = getattr(error, "problem", None) or "cannot be read"
        raise InputDataError(str(path), line or None, f"no valid YAML: {problem}") from error
    return parse_description(values, str(path))


def parse_description(values: Any, source: str) -> TaskDescription:
    """A `TaskDescription` from what YAML holds.

    Raises:
        InputDataError: Unknown keys, an unknown kind, or a value of the wrong type.
    """
    allowed = set(TaskDescription.__dataclass_fields__)
    if not isinstance(values, dict) or set(values) - allowed:
        unknown = ", ".join(sorted(set(values) - allowed)) if isinstance(values, dict) else repr(values)
        raise InputDataError(source, None, f"unknown: {unknown}; allowed are {', '.join(sorted(allowed))}")
    if values.get("kind") not in LAYOUTS:
        raise InputDataError(source, None, f"kind is {values.get('kind')!r}; use one of {', '.join(LAYOUTS)}")
    for key in ("instruction", "folder", "main_score"):
        if values.get(key) is not None and not _is_filled(values[key]):
            raise InputDataError(source, None, f"{key} must be a text, not {values[key]!r}")
    return TaskDescription(**{**values, "files": tuple(values.get("files", ("test.jsonl",)))})


def subsets(folder: Path) -> list[str]:
    """Names of the subfolders that hold the files of a task; empty where the folder itself does."""
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}")
    if any(path.is_file() and path.suffix in (".jsonl", ".tsv") for path in folder.iterdir()):
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def checksum(folders: list[Path]) -> str:
    """SHA-256 of all files of the folders, 16 digits: tells whether data changed since a score was made."""
    digest = sha256()
    for folder in folders:
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            digest.update(path.name.encode() + sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def read_folder(folder: Path, description: TaskDescription) -> FolderData:
    """All rows of a folder without subfolders.

    Raises:
        InputDataError: A file is missing, or a row is not what its kind asks for.
    """
    kind, fields = description.kind, LAYOUTS[description.kind]
    if kind == "Retrieval" or (kind == "Reranking" and (folder / "corpus.jsonl").exists()):
        return FolderData(retrieval=_read_retrieval(folder))
    rows = [row for name in description.files for row in _read_rows(folder / name, fields["test.jsonl"])]
    data = FolderData({"test": rows})
    if kind == "Classification":
        data.splits["train"] = _read_rows(folder / "train.jsonl", fields["train.jsonl"])
        _check_labels(folder, data.splits)
    if kind == "Facets":
        data.facets = _read_facets(folder, rows)
    return data


def _read_rows(path: Path, fields: Mapping[str, str]) -> list[Row]:
    rows = []
    for line, row in _json_lines(path):
        for name, check in fields.items():
            passes, wanted = _CHECKS[check]
            if name not in row:
                raise InputDataError(str(path), line, f"no {name!r}; add it, it must be {wanted}")
            if not passes(row[name]):
                raise InputDataError(str(path), line, f"{name!r} is {str(row[name])[:60]!r}; it must be {wanted}")
        rows.append(row)
    if not rows:
        raise InputDataError(str(path), None, "holds no rows; write one JSON object a line")
    return rows


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    for line, text in enumerate(_lines(path), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputDataError(str(path), line, f"no valid JSON ({error.msg}); write one object a line") from error
        if not isinstance(row, dict):
            raise InputDataError(str(path), line, "no JSON object; write one object a line")
        yield line, row


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except FileNotFoundError:
        raise InputDataError(str(path), None, "missing; docs/evaluate.md lists the files of each kind") from None
    except UnicodeDecodeError as error:
        raise InputDataError(str(path), None, f"not UTF-8 ({error.reason}); convert it") from error


def _check_labels(folder: Path, splits: Mapping[str, list[Row]]) -> None:
    learnt = {row["label"] for row in splits["train"]}
    for line, row in enumerate(splits["test"], 1):
        if row["label"] not in learnt:
            problem = f"label {row['label']!r} has no example in train.jsonl; add one there"
            raise InputDataError(str(folder / "test.jsonl"), line, problem)


def _read_facets(folder: Path, rows: list[Row]) -> dict[str, str]:
    path = folder / "instructions.json"
    try:
        instructions = json.loads("".join(_lines(path)))
    except json.JSONDecodeError as error:
        raise InputDataError(str(path), error.lineno, f"no valid JSON ({error.msg})") from error
    facets = [facet for facet in rows[0]["labels"] if isinstance(instructions, dict) and facet in instructions]
    if not facets or not all(_is_filled(instructions[facet]) for facet in facets):
        wanted = ", ".join(rows[0]["labels"])
        raise InputDataError(str(path), None, f"gives no instruction for the facets of test.jsonl ({wanted}); add them")
    for line, row in enumerate(rows, 1):
        for facet in facets:
            if facet not in row["labels"]:
                raise InputDataError(str(folder / "test.jsonl"), line, f"no label for the facet {facet!r}; add it")
    return {facet: instructions[facet] for facet in facets}


def _read_retrieval(folder: Path) -> RetrievalData:
    layout = LAYOUTS["Retrieval"]
    corpus = _read_rows(folder / "corpus.jsonl", layout["corpus.jsonl"])
    corpus = [{"id": row["id"], "title": row.get("title") or "", "text": row["text"]} for row in corpus]
    queries = _read_rows(folder / "queries.jsonl", layout["queries.jsonl"])
    queries = [{"id": row["id"], "text": row["text"]} for row in queries]
    documents, asked = {row["id"] for row in corpus}, {row["id"] for row in queries}
    for name, rows, ids in (("corpus.jsonl", corpus, documents), ("queries.jsonl", queries, asked)):
        if len(ids) < len(rows):
            raise InputDataError(str(folder / name), None, f"{len(rows) - len(ids)} ids occur twice; make them unique")
    relevant = _read_judgements(folder / "qrels.tsv", asked, documents)
    candidates = None
    path = folder / "candidates.jsonl"
    if path.exists():
        candidates = {}
        for line, row in enumerate(_read_rows(path, {"query": "filled", "candidates": "texts"}), 1):
            if unknown := [d for d in row["candidates"] if d not in documents]:
                raise InputDataError(str(path), line, f"candidate {unknown[0]!r} is not in corpus.jsonl")
            candidates[row["query"]] = row["candidates"]
    return RetrievalData(corpus, queries, relevant, candidates)


def _read_judgements(path: Path, queries: set[str], documents: set[str]) -> dict[str, dict[str, int]]:
    relevant: dict[str, dict[str, int]] = {}
    for line, text in enumerate(_lines(path), 1):
        parts = text.rstrip("\r\n").split("\t")
        if (line == 1 and parts[0] == "query-id") or not text.strip():
            continue
        if len(parts) != 3 or not parts[2].lstrip("-").isdigit():
            raise InputDataError(str(path), line, "must be query-id, corpus-id and a whole number, separated by tabs")
        if parts[0] not in queries:
            raise InputDataError(str(path), line, f"query {parts[0]!r} is not in queries.jsonl")
        if parts[1] not in documents:
            raise InputDataError(str(path), line, f"document {parts[1]!r} is not in corpus.jsonl")
        relevant.setdefault(parts[0], {})[parts[1]] = int(parts[2])
    if not relevant:
        raise GircseError(f"{path} judges no document; add lines 'query-id<TAB>corpus-id<TAB>1'")
    return relevant
