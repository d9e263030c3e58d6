"""Every row of every format comes back as it was written, and an unusable one is named by its line."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gircse.embed.reader import CorpusReader, SeenIds
from gircse.errors import InputDataError, UsageError

PATIENT = settings(deadline=None)  # files, on a machine that may be busy
TEXTS = st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=8)
LINES = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\ufeff"), min_size=1).filter(str.strip),
    min_size=1,
    max_size=8,
)


def corpus(folder: Path | str, name: str, content: bytes | str) -> str:
    path = Path(folder) / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def rows(source: str, **options: Any) -> list[tuple[int | str, str, int]]:
    return [(row.id, row.text, row.line) for row in CorpusReader(source, **options)]


def failure(source: str, **options: Any) -> InputDataError:
    with pytest.raises(InputDataError) as caught:
        list(CorpusReader(source, **options))
    assert "\n" not in str(caught.value)
    return caught.value


# What was written comes back


@PATIENT
@given(LINES, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_text_round_trip(texts: list[str], end: str, last_end: bool, mark: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        content = ("\ufeff" if mark else "") + end.join(texts) + (end if last_end else "")
        source = corpus(folder, "a.txt", content)
        assert rows(source) == [(number, text, number) for number, text in enumerate(texts, 1)]
        assert CorpusReader(source).count_rows() == len(texts)


@PATIENT
@given(TEXTS, st.booleans(), st.booleans(), st.sampled_from(["", "\n", "\n\n \n"]))
def test_json_lines_round_trip(texts: list[str], escaped: bool, mark: bool, tail: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps({"key": f"k{i}", "body": text}, ensure_ascii=escaped) for i, text in enumerate(texts)]
        source = corpus(folder, "a.jsonl", ("\ufeff" if mark else "") + "\n".join(lines) + tail)
        expected = [(f"k{i}", text, i + 1) for i, text in enumerate(texts)]
        assert rows(source, column="body", id_column="key") == expected
        assert [row[0] for row in rows(source, column="body")] == list(range(1, len(texts) + 1))


@PATIENT
@given(TEXTS, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
def test_csv_round_trip(texts: list[str], end: str, mark: bool, quoting: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if "\r" in "".join(texts):
            quoting = csv.QUOTE_ALL  # Python before 3.13 forgets that a lone \r needs quotes
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, lineterminator=end, quoting=quoting)
        writer.writerow(["id", 'a, "b"', "text"])
        expected = []
        for number, text in enumerate(texts, 1):
            line = buffer.getvalue().count("\n") + 1  # breaks inside cells count as lines too
            expected.append((f"k{number}", text, line))
            writer.writerow([f"k{number}", "x", text])
        source = corpus(folder, "a.csv", ("\ufeff" if mark else "") + buffer.getvalue())
        assert rows(source, id_column="id") == expected
        assert [row[0] for row in rows(source)] == list(range(1, len(texts) + 1))
        assert CorpusReader(source).count_rows() == len(texts)


KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]


@PATIENT
@given(TEXTS, st.integers(1, 9), st.sampled_from(KINDS))
def test_parquet_round_trip(texts: list[str], group: int, kind: pa.DataType) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        column = pa.array([text.encode() for text in texts] if kind == pa.binary() else texts)
        table = pa.table({"key": range(len(texts)), "text": column.cast(kind)})
        pq.write_table(table, path, row_group_size=group)
        expected = [(str(number - 1), text, number) for number, text in enumerate(texts, 1)]
        assert rows(str(path), id_column="key") == expected
        assert CorpusReader(str(path)).count_rows() == len(texts)


def test_standard_input_is_text_unless_told() -> None:
    assert [row.text for row in CorpusReader("-", stream=io.BytesIO(b"one\ntwo"))] == ["one", "two"]
    stream = io.BytesIO(b'text,n\n"a\nb",1\n')
    assert [row.text for row in CorpusReader("-", "csv", stream=stream)] == ["a\nb"]
    assert CorpusReader("-", stream=io.BytesIO(b"one")).count_rows() is None
    with pytest.raises(UsageError, match="stream"):
        CorpusReader("-", "parquet")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX")
def test_a_named_pipe_is_read_once_and_not_peeked_into(tmp_path: Path) -> None:
    pipe = tmp_path / "a.txt"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("one\ntwo\n",), daemon=True)
    writer.start()
    reader = CorpusReader(str(pipe))
    reader.peek()
    assert reader.count_rows() is None
    assert [row.text for row in reader] == ["one", "two"]
    writer.join(5)


def test_a_huge_csv_cell_is_fine_and_the_modules_limit_is_put_back(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    assert rows(corpus(tmp_path, "a.csv", "text\n" + "x" * 1_000_000 + "\n"))[0][1] == "x" * 1_000_000
    assert csv.field_size_limit() == limit


# What is unusable is named

BAD = [
    # name, content, options, line, kind, in the message, texts that remain
    ("a.txt", b"one\n \t\ntwo\n", {}, 2, "empty text", "empty", ["one", "two"]),
    ("a.txt", b"one\nca\xe9\ntwo", {}, 2, "not UTF-8", "byte 0xe9 at position 3", ["one", "two"]),
    ("a.jsonl", b'{"text": "one"}\n{"text": \n', {}, 2, "broken JSON", "not valid JSON at character", ["one"]),
    ("a.jsonl", b'{"text": "one"}\n["text"]\n', {}, 2, "broken JSON", "a list where a JSON object", ["one"]),
    ("a.jsonl", b"[" * 100_000 + b'\n{"text": "one"}\n', {}, 1, "broken JSON", "not valid JSON", ["one"]),
    ("a.jsonl", b'{"text": "one"}\n\n{"text": "two"}', {}, 2, "blank line", "blank", ["one", "two"]),
    ("a.jsonl", b'{"text": "one"}\n{"txt": "two", "n": 1}', {}, 2, "missing column", "'txt', 'n'", ["one"]),
    ("a.jsonl", b'{"text": "one"}\n{"text": null}', {}, 2, "null", "null", ["one"]),
    ("a.jsonl", b'{"text": NaN}\n{"text": "one"}', {}, 1, "null", "null", ["one"]),
    ("a.jsonl", b'{"text": 3}\n{"text": "one"}', {}, 1, "not a string", "a number, not a string", ["one"]),
    ("a.jsonl", b'{"text": "\\ud800x"}\n{"text": "one"}', {}, 1, "not UTF-8", "surrogate", ["one"]),
    ("a.jsonl", b'{"text": "one", "id": 1}\n{"text": "two", "id": "1"}', {"id_column": "id"}, 2, "duplicate id", "'1'",
     ["one"]),
    ("a.jsonl", b'{"text": "one", "id": 1.5}\n', {"id_column": "id"}, 1, "bad id", "a number", []),
    ("a.jsonl", b'{"text": "one", "id": true}\n', {"id_column": "id"}, 1, "bad id", "true/false", []),
    ("a.jsonl", b'{"text": "one", "id": "a\\nb"}\n', {"id_column": "id"}, 1, "bad id", "single line", []),
    ("a.csv", b'text,id\n"one\n1",1\n,2\nthree,3\n', {}, 4, "empty text", "empty", ["one\n1", "three"]),
    ("a.csv", b'text,id\n"a\nb\nc\xff",1\ntwo,2\n', {}, 4, "not UTF-8", "byte 0xff at position 2", ["two"]),
    ("a.csv", b"text,id\none,1\nand, two,2\nthree,3\n", {}, 3, "wrong number of cells", "3 cells", ["one", "three"]),
    ("a.csv", b"id,text\n1,one\n2\n3,three\n", {}, 3, "wrong number of cells", "1 cells", ["one", "three"]),
    ("a.csv", b"id,text\n1,one\n\n3,three\n\n\n", {}, 3, "blank line", "blank", ["one", "three"]),
    ("a.csv", b'id,text\n1,one\n2,"a"b\n3,three\n', {}, 3, "broken CSV", "double the quotes", ["one", "three"]),
    ("a.csv", b"id,text\n1,one\n1,two\n3,three\n", {"id_column": "id"}, 3, "duplicate id", "'1'", ["one", "three"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "options", "line", "kind", "words", "remain"), BAD)
def test_a_bad_row_is_named_by_its_line_or_skipped(
    tmp_path: Path,
    name: str,
    content: bytes,
    options: dict[str, Any],
    line: int,
    kind: str,
    words: str,
    remain: list[str],
) -> None:
    source = corpus(tmp_path, name, content)
    error = failure(source, **options)
    assert (error.source, error.line) == (source, line)
    assert words in error.problem
    assert "--skip-bad" in error.problem

    reader = CorpusReader(source, skip_bad=True, **options)
    assert [row.text for row in reader] == remain
    assert reader.bad.counts == {kind: 1}
    assert reader.bad.lines == {kind: [line]}


def test_bad_parquet_cells_are_named_by_their_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    cells = pa.array([b"one", None, b"\xff", b"", "\ufefftwo".encode()]).cast(pa.large_binary())
    pq.write_table(pa.table({"text": cells, "id": [1, 2, 3, 4, None]}), path)
    assert failure(str(path)).line == 2
    reader = CorpusReader(str(path), skip_bad=True)
    assert [row.text for row in reader] == ["one", "\ufefftwo"]
    assert reader.bad.lines == {"null": [2], "not UTF-8": [3], "empty text": [4]}
    reader = CorpusReader(str(path), id_column="id", skip_bad=True)
    assert [row.id for row in reader] == ["1"]
    assert reader.bad.counts["bad id"] == 1


def test_skipping_does_not_change_the_ids_of_other_rows(tmp_path: Path) -> None:
    assert [row[0] for row in rows(corpus(tmp_path, "a.txt", "a\n\nb\n"), skip_bad=True)] == [1, 3]
    assert [row[0] for row in rows(corpus(tmp_path, "a.csv", 'text\n"a\nb"\n" "\nc\n'), skip_bad=True)] == [1, 3]


def test_bad_rows_in_words(tmp_path: Path) -> None:
    reader = CorpusReader(corpus(tmp_path, "a.txt", b"a\n" + b"\n" * 7 + b"\xff\n"), skip_bad=True)
    list(reader)
    assert str(reader.bad) == "empty text × 7 (lines 2, 3, 4, 5, 6, ...); not UTF-8 × 1 (line 9)"
    list(reader)
    assert reader.bad.total == 8, "a second pass starts counting anew"


# What makes the whole file unusable is said even where bad rows are skipped


@pytest.mark.parametrize("skip_bad", [False, True])
def test_whole_files_that_cannot_be_read(tmp_path: Path, skip_bad: bool) -> None:
    def problem(name: str, content: bytes, **options: Any) -> tuple[int | None, str]:
        error = failure(corpus(tmp_path, name, content), skip_bad=skip_bad, **options)
        return error.line, error.problem

    line, words = problem("a.csv", b'id,text\n1,one\n2,"two\n3,three\n')
    assert line == 3
    assert "never closed" in words
    assert problem("b.csv", b"id,body\n1,one\n")[1].startswith("no column 'text'; the header has 'id', 'body'")
    assert "more than one column 'text'" in problem("c.csv", b"text,text\n1,one\n")[1]
    assert "UTF-16" in problem("d.txt", "one".encode("utf-16"))[1]
    assert "cannot be read as Parquet" in problem("e.parquet", b"PAR1 not really")[1]
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"body": ["one"], "n": [1], "f": [0.5]}), path)
    assert "no column 'text'; the file has 'body', 'n', 'f'" in failure(str(path)).problem
    assert "column 'n' holds int64, not strings" in failure(str(path), column="n").problem
    assert "column 'f' holds double" in failure(str(path), column="body", id_column="f").problem


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(InputDataError, match="No such file"):
        CorpusReader(str(tmp_path / "none.txt"))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputDataError, match="directory"):
        CorpusReader(str(tmp_path / "folder.txt"))
    with pytest.raises(UsageError, match="--input-format"):
        CorpusReader(corpus(tmp_path, "a.doc", "x"))
    with pytest.raises(UsageError, match="--id-column"):
        CorpusReader(corpus(tmp_path, "a.txt", "x"), id_column="id")


def test_peek_raises_what_the_first_row_would(tmp_path: Path) -> None:
    reader = CorpusReader(corpus(tmp_path, "a.csv", "body\nx\n"))
    with pytest.raises(InputDataError, match="no column"):
        reader.peek()


def test_seen_ids_find_every_repetition_across_their_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SeenIds, "_RECENT", 8)
    seen = SeenIds()
    assert all(seen.add(str(number)) for number in range(100))
    assert not any(seen.add(str(number)) for number in range(100))
    assert len(seen._older) == 96, "8 bytes an id, but for the last few"
