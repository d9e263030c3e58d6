"""Rows of a file are brought to one form; what is wrong with a row or a file is told by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from gircse.errors import InputDataError
from gircse.train.rows import read_rows
from tests.training_recipe import ROWS


def test_bad_data_is_named_by_file_and_line(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0])
    for bad, message in (
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps({**ROWS[0], "pos": []}), "'pos' must hold texts"),
        (json.dumps({"pos": "a"}), "'query' must be a text"),
        (json.dumps({"query": "a"}), "'pos' must hold texts"),
        (json.dumps({"query": "a", "pos": ["b", ""]}), "'pos' must hold texts that are not empty"),
        (json.dumps({**ROWS[0], "task": 3}), "'task' must be a text"),
        (json.dumps({**ROWS[0], "neg": 3}), "'neg' must be a text or a list of texts"),
        (json.dumps({**ROWS[0], "pos": [1]}), "'pos' must be a text or a list of texts"),
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text(f"{good}\n{bad}\n")
        with pytest.raises(InputDataError, match=rf"rows.jsonl:2: .*{message}"):
            list(read_rows(path))


def test_empty_lines_at_the_end_and_a_byte_order_mark_say_nothing(tmp_path: Path) -> None:
    file, row = tmp_path / "rows.jsonl", '{"query": "a", "pos": "b"}\n'
    file.write_text("\ufeff" + row + row + "\n\n", encoding="utf-8")
    assert [found["query"] for found in read_rows(file)] == ["a", "a"]
    file.write_text(row + "\n" + row, encoding="utf-8")
    with pytest.raises(InputDataError, match=r"rows.jsonl:2: an empty line"):
        list(read_rows(file))


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"task": "é"}'.encode("latin-1"))
    (tmp_path / "torn.jsonl.zst").write_bytes(b"no zstandard")
    (tmp_path / "torn.parquet").write_bytes(b"no table")
    for name in ("missing.jsonl", "latin.jsonl", "torn.jsonl.zst", "torn.parquet"):
        with pytest.raises(InputDataError, match=rf"{name}: cannot be read \(.+\); check the file"):
            list(read_rows(tmp_path / name))


@pytest.mark.parametrize("frames", [1, 3])
def test_a_compressed_file_that_was_cut_off_is_told(tmp_path: Path, frames: int) -> None:
    """Of several frames too, as parallel compressors write them, wherever the cut is."""
    rows = [{"query": f"query {number}", "pos": ["é" * (number % 7 + 1)]} for number in range(3000)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    size = -(-len(lines) // frames)
    whole = [zstandard.compress(lines[start : start + size]) for start in range(0, len(lines), size)]
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"".join(whole))
    assert [row["query"] for row in read_rows(path)] == [row["query"] for row in rows]
    for cut in (1, 5, len(whole[-1]) // 2):
        path.write_bytes(b"".join(whole)[:-cut])
        with pytest.raises(InputDataError, match=r"rows.jsonl.zst: it ends within its compressed data"):
            list(read_rows(path))
