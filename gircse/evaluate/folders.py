"""Task folders: which files a kind of task has, and reading them with the line named where one is wrong.

Knows files and rows; knows nothing of mteb or models. docs/evaluate.md describes the layout for people.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gircse.errors import InputDataError, UsageError

Check = Callable[[Any], bool]
Row = dict[str, Any]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_filled(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_id(value: Any) -> bool:
    return _is_filled(value) or (isinstance(value, int) and not isinstance(value, bool))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _is_number(value: Any) -> bool:
    # Python's JSON reads NaN and Infinity, of which a comparison is false: one of them makes a correlation NaN.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


_CHECKS: dict[str, tuple[Check, str]] = {
    "text": (_is_text, "a text"),
    "filled": (_is_filled, "a text that is not empty"),
    "id": (_is_id, "a text that is not empty, or a whole number"),
    "ids": (lambda value: isinstance(value, list) and bool(value) and all(map(_is_id, value)), "a list of ids"),
    "number": (_is_number, "a number, and a finite one"),
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
        "corpus.jsonl": {"id": "id", "text": "text"},
        "queries.jsonl": {"id": "id", "text": "filled"},
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


class _Placed(NamedTuple):
    """A row and where it stands."""

    path: Path
    line: int
    row: Row


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
    text = "".join(line for _, line in _lines(path))
    try:
        values = yaml.safe_load(text) or {}
        lines = _key_lines(text)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        problem = getattr(error, "problem", None) or "cannot be read"
        raise InputDataError(str(path), line or None, f"no valid YAML: {problem}") from error
    return parse_description(values, str(path), lines)


def parse_description(values: Any, source: str, lines: Mapping[str, int] | None = None) -> TaskDescription:
    """A `TaskDescription` from what YAML holds.

    Args:
        values: What YAML holds.
        source: The file, for errors.
        lines: On which line of it each key stands.

    Raises:
        InputDataError: Unknown keys, an unknown kind, or a value of the wrong type.
    """
    lines, allowed = lines or {}, set(TaskDescription.__dataclass_fields__)
    unknown = sorted(str(key) for key in set(values) - allowed) if isinstance(values, dict) else [repr(values)]
    if unknown:
        problem = f"unknown: {', '.join(unknown)}; allowed are {', '.join(sorted(allowed))}"
        raise InputDataError(source, lines.get(unknown[0]), problem)

    def check(key: str, passes: Check, wanted: str) -> None:
        if values.get(key) is not None and not passes(values[key]):
            raise InputDataError(source, lines.get(key), f"{key} is {values[key]!r}; {wanted}")

    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise InputDataError(source, lines.get("kind"), f"kind is {kind!r}; use one of {', '.join(LAYOUTS)}")
    for key in ("instruction", "folder", "main_score"):
        check(key, _is_filled, "it must be a text")
    check("files", _is_texts, "it must be a list of file names, such as [test.jsonl]")
    check("language", _is_language, "write a code such as deu-Latn, or one for each subset: {de: deu-Latn}")
    given = {key: value for key, value in values.items() if value is not None}
    return TaskDescription(**{**given, "files": tuple(given.get("files", ("test.jsonl",)))})


def _is_language(value: Any) -> bool:
    codes = value.values() if isinstance(value, dict) and value else [value]
    return all(_is_filled(code) for code in codes)


def key_line(path: Path, key: str) -> int | None:
    """The line of a YAML file on which one of its keys stands; None where it has no such file or key."""
    if not path.is_file():
        return None
    return _key_lines(path.read_text(encoding="utf-8")).get(key)


def _key_lines(text: str) -> dict[str, int]:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return {}
    return {key.value: key.start_mark.line + 1 for key, _ in root.value if isinstance(key, yaml.ScalarNode)}


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
    data = FolderData({"test": [row for _, _, row in rows]})
    if kind == "Classification":
        data.splits["train"] = [row for _, _, row in _read_rows(folder / "train.jsonl", fields["train.jsonl"])]
        _check_labels(rows, data.splits["train"])
    if kind == "Facets":
        data.facets = _read_facets(folder, rows)
    return data


def _read_rows(path: Path, fields: Mapping[str, str]) -> list[_Placed]:
    rows: list[_Placed] = []
    for line, row in _json_lines(path):
        for name, check in fields.items():
            passes, wanted = _CHECKS[check]
            if name not in row:
                raise InputDataError(str(path), line, f"no {name!r}; add it, it must be {wanted}")
            if not passes(row[name]):
                raise InputDataError(str(path), line, f"{name!r} is {str(row[name])[:60]!r}; it must be {wanted}")
            if check in ("id", "ids"):  # 7 and "7" are the same id, as they are in qrels.tsv, which knows only texts
                row[name] = str(row[name]) if check == "id" else [str(value) for value in row[name]]
        rows.append(_Placed(path, line, row))
    if not rows:
        raise InputDataError(str(path), None, "holds no rows; write one JSON object a line")
    return rows


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    for line, text in _lines(path):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputDataError(str(path), line, f"no valid JSON ({error.msg}); write one object a line") from error
        if not isinstance(row, dict):
            raise InputDataError(str(path), line, "no JSON object; write one object a line")
        yield line, row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, blank ones too."""
    try:
        with path.open("rb") as file:  # decoded line by line, so that the wrong one can be named
            for line, raw in enumerate(file, 1):
                try:
                    yield line, raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise InputDataError(str(path), line, f"not UTF-8 ({error.reason}); convert the file") from error
    except FileNotFoundError:
        raise InputDataError(str(path), None, "missing; docs/evaluate.md lists the files of each kind") from None


def _check_labels(rows: Sequence[_Placed], train: Sequence[Row]) -> None:
    learnt = {row["label"] for row in train}
    for path, line, row in rows:
        if row["label"] not in learnt:
            problem = f"label {row['label']!r} has no example in train.jsonl; add one there"
            raise InputDataError(str(path), line, problem)


def _read_facets(folder: Path, rows: Sequence[_Placed]) -> dict[str, str]:
    path, first = folder / "instructions.json", rows[0].row["labels"]
    try:
        instructions = json.loads("".join(text for _, text in _lines(path)))
    except json.JSONDecodeError as error:
        raise InputDataError(str(path), error.lineno, f"no valid JSON ({error.msg})") from error
    facets = [facet for facet in first if isinstance(instructions, dict) and facet in instructions]
    if not facets or not all(_is_filled(instructions[facet]) for facet in facets):
        wanted = ", ".join(first)
        raise InputDataError(str(path), None, f"gives no instruction for the facets of test.jsonl ({wanted}); add them")
    passes, wanted = _CHECKS["label"]
    for place, line, row in rows:
        for facet in facets:
            if facet not in row["labels"]:
                raise InputDataError(str(place), line, f"no label for the facet {facet!r}; add it")
            if not passes(row["labels"][facet]):
                problem = f"the label for the facet {facet!r} is {row['labels'][facet]!r}; it must be {wanted}"
                raise InputDataError(str(place), line, problem)
    return {facet: instructions[facet] for facet in facets}


def _read_retrieval(folder: Path) -> RetrievalData:
    layout = LAYOUTS["Retrieval"]
    placed = _read_rows(folder / "corpus.jsonl", layout["corpus.jsonl"])
    documents = set(_once(placed, "id", "give every document an id of its own"))
    for path, line, row in placed:
        if not isinstance(row.get("title") or "", str):
            raise InputDataError(str(path), line, f"'title' is {row['title']!r}; it must be a text")
    corpus = [{"id": row["id"], "title": row.get("title") or "", "text": row["text"]} for _, _, row in placed]
    asking = _read_rows(folder / "queries.jsonl", layout["queries.jsonl"])
    asked = set(_once(asking, "id", "give every query an id of its own"))
    queries = [{"id": row["id"], "text": row["text"]} for _, _, row in asking]
    relevant = _read_judgements(folder / "qrels.tsv", asked, documents)
    path = folder / "candidates.jsonl"
    candidates = _read_candidates(path, asked, documents) if path.exists() else None
    return RetrievalData(corpus, queries, relevant, candidates)


def _once(rows: Sequence[_Placed], key: str, mend: str) -> dict[str, int]:
    """The lines on which the values of a field stand, each of them on one only."""
    seen: dict[str, int] = {}
    for path, line, row in rows:
        if row[key] in seen:
            raise InputDataError(str(path), line, f"{key} {row[key]!r} stands on line {seen[row[key]]} already; {mend}")
        seen[row[key]] = line
    return seen


def _read_candidates(path: Path, queries: set[str], documents: set[str]) -> dict[str, list[str]]:
    rows = _read_rows(path, {"query": "id", "candidates": "ids"})
    _once(rows, "query", "put its candidates together on one line")
    for _, line, row in rows:
        if row["query"] not in queries:
            problem = f"query {row['query']!r} is not in queries.jsonl; add it there, or remove the line"
            raise InputDataError(str(path), line, problem)
        if unknown := [d for d in row["candidates"] if d not in documents]:
            problem = f"candidate {unknown[0]!r} is not in corpus.jsonl; add it there, or remove it here"
            raise InputDataError(str(path), line, problem)
    return {row["query"]: row["candidates"] for _, _, row in rows}


def _read_judgements(path: Path, queries: set[str], documents: set[str]) -> dict[str, dict[str, int]]:
    relevant: dict[str, dict[str, int]] = {}
    for line, text in _lines(path):
        parts = text.rstrip("\r\n").split("\t")
        if (line == 1 and parts[0] == "query-id") or not text.strip():
            continue
        if len(parts) != 3 or not re.fullmatch("-?[0-9]+", parts[2]):
            raise InputDataError(str(path), line, "must be query-id, corpus-id and a whole number, separated by tabs")
        if parts[0] not in queries:
            problem = f"query {parts[0]!r} is not in queries.jsonl; add it there, or remove the line"
            raise InputDataError(str(path), line, problem)
        if parts[1] not in documents:
            problem = f"document {parts[1]!r} is not in corpus.jsonl; add it there, or remove the line"
            raise InputDataError(str(path), line, problem)
        relevant.setdefault(parts[0], {})[parts[1]] = int(parts[2])
    if not relevant:
        raise InputDataError(str(path), None, "judges no document; add lines 'query-id<TAB>corpus-id<TAB>1'")
    return relevant
