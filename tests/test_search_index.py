"""An index is what its corpus is: after every change, after every kill, with nothing embedded twice."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from gircse.errors import GircseError, UsageError
from gircse.search import TEXT_LANGUAGES
from gircse.search.manifest import Manifest
from gircse.search.search import SearchIndex
from gircse.search.table import Chunk, ChunkTable
from tests.search_model import WordModel, make_index, settings

pytest.importorskip("lancedb")
from lancedb.table import LanceTable

LONG = "The first sentence is about ants and nests. The second one is about bees and hives. A third tells of cats."


def write(path: Path, documents: dict[str, Any]) -> Path:
    rows = [
        {"id": name, **(value if isinstance(value, dict) else {"text": value})} for name, value in documents.items()
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def content(folder: Path) -> list[dict[str, Any]]:
    return ChunkTable.open(folder).rows()


def assert_same(a: Path, b: Path) -> None:
    """Equal rows; vectors up to what batches change in them."""
    left, right = content(a), content(b)
    for rows in (left, right):
        vectors = np.array([row.pop("vector") for row in rows])
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        rows.append({"vectors": vectors})
    np.testing.assert_allclose(left.pop()["vectors"], right.pop()["vectors"], atol=1e-5)
    assert left == right


def test_it_follows_the_corpus(tmp_path: Path) -> None:
    corpus, folder, model = tmp_path / "corpus.jsonl", tmp_path / "an.index", WordModel()
    before = {"a": "ants", "b": LONG, "c": {"text": "cats", "year": 1}, "o'd": "dogs", "e": "eels"}
    summary = make_index(write(corpus, before), folder, model)
    assert (summary.added, summary.documents, summary.approximate) == (5, 5, False)
    assert summary.embedded == summary.chunks == len(model.embedded) > 6
    assert [row["chunk_id"] for row in content(folder) if row["document_id"] == "b"] == ["b#0", "b#1", "b#2"]

    model.embedded.clear()
    after = {"b": "now short", "c": {"text": "cats", "year": 2, "lang": "en"}, "o'd": "dogs", "f": LONG}
    summary = make_index(write(corpus, after), folder, model)
    assert (summary.added, summary.changed, summary.unchanged, summary.removed) == (1, 2, 1, 2)
    assert "dogs" not in model.embedded
    fresh = tmp_path / "fresh.index"
    make_index(corpus, fresh)
    assert_same(folder, fresh)
    table = ChunkTable.open(folder)
    assert [row["chunk_id"] for row in table.text_search("short", 9, None, None)] == ["b#0"]
    assert {row["document_id"] for row in table.text_search("ants", 9, None, None)} == {"f"}, "words follow as well"

    model.embedded.clear()
    version = ChunkTable.open(folder)._table.version
    assert make_index(corpus, folder, model).unchanged == 4
    assert model.embedded == []
    assert ChunkTable.open(folder)._table.version == version, "nothing to do, nothing written"


def test_a_bad_row_stops_before_anything_is_written(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "a", "text": "ants"}\n{"id": "a", "text": "bees"}', encoding="utf-8")
    with pytest.raises(GircseError, match=r"corpus\.jsonl:2: the id 'a' occurred before"):
        make_index(corpus, tmp_path / "an.index")
    corpus.write_text("", encoding="utf-8")
    with pytest.raises(GircseError, match="holds no documents"):
        make_index(corpus, tmp_path / "an.index")
    assert not (tmp_path / "an.index").exists()


def test_other_settings_are_refused_and_overwrite_takes_them(tmp_path: Path) -> None:
    corpus, folder = write(tmp_path / "corpus.jsonl", {"a": "ants"}), tmp_path / "an.index"
    make_index(corpus, folder)
    with pytest.raises(UsageError, match=r"num_steps \(2, not 3\), document_prompt \('', not 'x'\).*--overwrite"):
        make_index(corpus, folder, made_with=settings(num_steps=3, document_prompt="x"))
    with pytest.raises(UsageError, match="model weights"):
        make_index(corpus, folder, made_with=settings(model_checksum="1"))
    assert make_index(corpus, folder, made_with=settings(num_steps=3), overwrite=True).added == 1
    assert Manifest.read(folder).settings.num_steps == 3
    write(corpus, {"a": {"text": "ants", "n": 1}, "b": {"text": "bees", "n": 2.5}})
    make_index(corpus, folder, made_with=settings(num_steps=3))
    write(corpus, {"a": {"text": "ants", "n": "one"}})
    with pytest.raises(UsageError, match=r"column 'n' .* holds double, and the corpus now has string"):
        make_index(corpus, folder, made_with=settings(num_steps=3))


@pytest.mark.parametrize("name", ["_distance", "_rowoffset", "_row_created_at_version", "_Row_Last_Updated_At_Version"])
def test_names_that_the_table_needs_are_refused(tmp_path: Path, name: str) -> None:
    corpus = write(tmp_path / "corpus.jsonl", {"a": {"text": "ants", name: 1}})
    with pytest.raises(UsageError, match=f"'{name}', a name that the index needs for itself; rename it"):
        make_index(corpus, tmp_path / "an.index")


def test_what_is_not_an_index_is_left_alone(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", {"a": {"text": "ants", "vector": 1}})
    with pytest.raises(UsageError, match="'vector', a name that the index needs"):
        make_index(corpus, tmp_path / "an.index")
    write(corpus, {"a": "ants"})
    with pytest.raises(UsageError, match="holds other things"):
        make_index(corpus, tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        make_index(corpus, corpus)
    with pytest.raises(UsageError, match="no index; make one with"):
        Manifest.read(tmp_path)
    (tmp_path / "an.index").mkdir()
    with FileLock(tmp_path / "an.index" / ".lock"), pytest.raises(GircseError, match="another gircse index"):
        make_index(corpus, tmp_path / "an.index")


def test_stemming_is_of_the_language_asked_for(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", {"a": "zwei Häuser", "b": "he was running"})
    found = {}
    for language in ("English", "German"):
        make_index(corpus, tmp_path / language, made_with=settings(text_language=language))
        table = ChunkTable.open(tmp_path / language)
        found[language] = [bool(table.text_search(word, 5, None, None)) for word in ("runs", "Haus")]
    assert found == {"English": [True, False], "German": [False, True]}
    with pytest.raises(UsageError, match="knows no language 'Klingon'; choose from Arabic, Danish"):
        settings(text_language="Klingon")
    assert settings(text_language="tamil") == settings(text_language="Tamil")


@pytest.mark.parametrize("language", TEXT_LANGUAGES)
def test_the_languages_are_those_of_the_library(tmp_path: Path, language: str) -> None:
    table = ChunkTable.create(tmp_path, 1, {})
    table.add([Chunk("a", 0, "", "words", {})], np.ones((1, 1)))
    table.build_indices(language, 9)
    assert table.has_text_index


def test_settings_that_contradict_each_other_are_never_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="chunks of 40 tokens cannot overlap by 25"):
        settings(chunk_tokens=40, chunk_overlap=25)
    corpus, folder = write(tmp_path / "corpus.jsonl", {"a": "ants"}), tmp_path / "an.index"
    make_index(corpus, folder)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"chunk_overlap": 3', '"chunk_overlap": 30'))  # as older ones were
    with pytest.raises(GircseError, match=r"an\.index: chunks of 12 .*; make the index anew with --overwrite"):
        make_index(corpus, folder)
    assert make_index(corpus, folder, overwrite=True).added == 1


@pytest.mark.parametrize("commits", [0, 1, 2, 3])
def test_whole_numbers_become_doubles_without_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commits: int
) -> None:
    corpus, folder, model = tmp_path / "corpus.jsonl", tmp_path / "an.index", WordModel()
    make_index(write(corpus, {"a": {"text": "ants", "n": 1}, "b": {"text": "bees"}}), folder, model)
    model.embedded.clear()
    write(corpus, {"a": {"text": "ants", "n": 1}, "b": {"text": "bees"}, "c": {"text": "cats", "n": 2.5}})
    stop_after(monkeypatch, commits)
    if commits < 3:
        with pytest.raises(KeyboardInterrupt):
            make_index(corpus, folder, model)
    monkeypatch.undo()
    assert ChunkTable.open(folder).metadata_columns in ([], ["n"])
    assert make_index(corpus, folder, model).unchanged == 2
    assert model.embedded == ["cats"]
    assert_same(folder, make_fresh(corpus, tmp_path))
    assert Manifest.read(folder).metadata == {"n": "double"}
    write(corpus, {"a": {"text": "ants", "n": 3}})
    make_index(corpus, folder, model)
    assert [row["n"] for row in content(folder)] == [3.0]


def test_a_parquet_column_that_becomes_one_of_doubles_embeds_nothing_again(tmp_path: Path) -> None:
    corpus, folder, model = tmp_path / "corpus.parquet", tmp_path / "an.index", WordModel()
    rows: dict[str, Any] = {"id": ["a", "b"], "text": ["ants", "bees"]}
    for values, embedded in (([1, 2], ["ants", "bees"]), ([1.0, 2.0], []), ([1.0, 2.5], ["bees"]), ([1.0, 2.5], [])):
        pq.write_table(pa.table({**rows, "n": values}), corpus)  # one type a column: all are floats where one is
        model.embedded.clear()
        make_index(corpus, folder, model)
        assert model.embedded == embedded
        assert [row["n"] for row in content(folder)] == values


def stop_after(monkeypatch: pytest.MonkeyPatch, commits: int) -> None:
    """Ctrl-C at the commit of a table's columns after so many."""
    left = iter(range(commits))
    for name in ("alter_columns", "add_columns", "drop_columns"):
        monkeypatch.setattr(LanceTable, name, stopping(getattr(LanceTable, name), left))


def stopping(method: Any, left: Iterator[int]) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return method(*arguments, **options)

    return call


def make_fresh(corpus: Path, root: Path) -> Path:
    make_index(corpus, root / "fresh.index")
    return root / "fresh.index"


def test_files_that_cannot_be_read_or_written_are_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, folder = write(tmp_path / "corpus.jsonl", {"a": {"text": "ants", "n": 1}}), tmp_path / "an.index"
    (tmp_path / "file").write_text("")
    with pytest.raises(GircseError, match=r"no index can be written to .*file/an\.index \(Not a directory\); choose"):
        make_index(corpus, tmp_path / "file" / "an.index")
    full = "lance error: LanceError(IO): Generic error: No space left on device (os error 28), /src/a.rs:1"

    def fill(*arguments: Any) -> None:
        raise RuntimeError(full)

    with monkeypatch.context() as patch:
        patch.setattr(LanceTable, "add", fill)
        with pytest.raises(GircseError) as caught:
            make_index(corpus, folder)
    said = f"{folder} cannot be read or written: No space left on device; mend that, and run the same command again"
    assert str(caught.value) == said
    make_index(corpus, folder)
    index = SearchIndex(folder)
    for path in (folder / "chunks.lance" / "data").glob("*.lance"):
        path.write_bytes(path.read_bytes()[:200])
    for where in (None, "n = 1"):
        with pytest.raises(GircseError) as caught:
            index.search("ants", mode="text", where=where)
        assert re.fullmatch(rf"{folder} is damaged \([^/]+\); make the index anew .* --overwrite", str(caught.value))
    for path in (folder / "chunks.lance" / "_versions").iterdir():
        path.write_bytes(b"")
    with pytest.raises(GircseError, match="is damaged"):
        SearchIndex(folder)


@pytest.mark.slow
@pytest.mark.parametrize("update", [False, True])
def test_kill_in_the_middle(tmp_path: Path, update: bool) -> None:
    corpus, folder, fresh = tmp_path / "corpus.jsonl", tmp_path / "an.index", tmp_path / "fresh.index"
    documents = {str(n): f"Document {n}. {LONG if n % 3 else ''}" for n in range(120)}
    if update:
        make_index(write(corpus, documents), folder)
        for n in range(0, 120, 2):  # half change: some grow, some shrink, and some go
            documents[str(n)] = f"Changed {n}. {'' if n % 3 else LONG}"
        for n in range(5, 120, 12):
            del documents[str(n)]
    write(corpus, documents)
    make_index(corpus, fresh)
    command = [sys.executable, "-m", "tests.search_model", str(corpus), str(folder), "0.2"]
    embedded = 0
    for commits in (1, 2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(commits)]
            process.kill()
        assert all(lines), "it ended before it could be killed"
        embedded += int(lines[-1])
    assert not Manifest.read(folder).complete
    model = WordModel()
    summary = make_index(corpus, folder, model)
    assert summary.unchanged > 0, "finished documents are not embedded again"
    assert Manifest.read(folder).complete
    assert_same(folder, fresh)
    if not update:
        assert embedded + summary.embedded <= summary.chunks + 2 * 64, "what a kill costs is a commit"


@pytest.mark.slow
def test_an_approximate_index_above_a_size(tmp_path: Path) -> None:
    corpus, folder = tmp_path / "corpus.jsonl", tmp_path / "an.index"
    write(corpus, {str(n): f"word{n} word{n % 50} word{n % 7}" for n in range(600)})
    assert not make_index(corpus, folder).approximate
    assert make_index(corpus, folder, exact_below=500).approximate
    table = ChunkTable.open(folder)
    vector = np.array(table.rows()[17]["vector"], dtype=np.float32)
    near, exact = (table.vector_search(vector, 10, None, exact=exact) for exact in (False, True))
    assert near[0]["chunk_id"] == exact[0]["chunk_id"] == table.rows()[17]["chunk_id"]
    assert len({row["chunk_id"] for row in near} & {row["chunk_id"] for row in exact}) >= 8
    assert make_index(corpus, folder).approximate, "it is remembered"
    assert not make_index(corpus, folder, exact_below=601).approximate
