"""Documents of a corpus file: every other column is metadata, beside the right text."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gircse.embed.reader import CorpusReader
from gircse.errors import InputDataError, UsageError
from gircse.search.corpus import DocumentCorpus, as_type


def read(path: Path, **options: object) -> DocumentCorpus:
    return DocumentCorpus(CorpusReader(str(path), id_column="id", **options))  # type: ignore[arg-type]


def test_json_lines(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "text": "one", "year": 1999, "meta.lang": "en", "score": 1, "tags": ["x", "é"], "none": None},
        {"id": "b", "text": "two", "year": "around 2000", "score": 0.5, "big": 2**70, "ok": True},
    ]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    corpus = read(path)
    first, second = corpus
    assert (first.id, first.text) == ("a", "one")
    assert first.metadata == {"year": 1999, "meta_lang": "en", "score": 1, "tags": '["x", "é"]'}
    assert second.metadata == {"year": "around 2000", "score": 0.5, "big": str(2**70), "ok": True}
    count, types = corpus.scan()
    assert count == 2
    assert types == {
        "year": "string", "meta_lang": "string", "score": "double", "tags": "string", "big": "string", "ok": "bool",
    }  # fmt: skip
    assert as_type(1999, "string") == "1999"
    assert as_type(True, "string") == "true"
    assert isinstance(as_type(1, "double"), float)


def test_metadata_stays_beside_its_text_when_bad_rows_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    rows = ['{"id": "a", "text": "one", "n": 1}', "{broken", '{"id": "b", "text": " ", "n": 2}', "[1]"]
    path.write_text("\n".join([*rows, '{"id": "c", "text": "three", "n": 3}']), encoding="utf-8")
    assert [(d.id, d.metadata["n"]) for d in read(path, skip_bad=True)] == [("a", 1), ("c", 3)]
    with pytest.raises(InputDataError, match=":2: not valid JSON"):
        list(read(path))
    table = tmp_path / "corpus.csv"
    table.write_text('id,text,n\na,"one\nline",1\n\nb,,2\nc,three\nd,"four, five",4\n', encoding="utf-8")
    assert [(d.id, d.metadata) for d in read(table, skip_bad=True)] == [("a", {"n": "1"}), ("d", {"n": "4"})]


def test_a_column_without_a_name_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "corpus.csv"  # as pandas writes it with its index
    path.write_text(",id,text\n0,a,one\n1,b,two\n", encoding="utf-8")
    assert [document.metadata for document in read(path)] == [{"_": "0"}, {"_": "1"}]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    table = pa.table({"day": [date(2020, 2, 1), None], "id": [7, 8], "text": ["one", "two"], "x": [0.5, float("nan")]})
    pq.write_table(table, path)
    documents = list(read(path))
    assert [document.id for document in documents] == ["7", "8"]
    assert [document.metadata for document in documents] == [{"day": "2020-02-01", "x": 0.5}, {}]


def test_the_hash_is_of_text_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    content = [("a", {"x": 1}), ("a", {"x": 1, "y": None}), ("a", {"x": 2}), ("b", {"x": 1}), ("a", {"x": 1.0})]
    rows = [{"id": str(n), "text": text, **metadata} for n, (text, metadata) in enumerate(content)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    hashes = [document.content_hash for document in read(path)]
    assert hashes[0] == hashes[1] == hashes[4], "absent or null, 1 or 1.0"
    assert len(set(hashes)) == 3


def test_names_that_collide_and_streams_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "1", "text": "a", "x.y": 1, "x y": 2}', encoding="utf-8")
    with pytest.raises(InputDataError, match="rename one"):
        read(path).scan()
    with pytest.raises(UsageError, match="save the stream"):
        DocumentCorpus(CorpusReader("-"))
