"""Training rows as files hold them: read, checked, and brought to one form.

Knows the row format ``{"task", "instruction", "query", "pos": [...], "neg": [...]}``, of which ``query`` and ``pos``
must be there, and the files it comes in; knows nothing of recipes or models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gircse.errors import InputDataError, MissingExtraError

try:
    import zstandard
except ImportError as error:
    raise MissingExtraError("training", "train") from error

_NAMES = {"query": "anchor", "pos": "positive", "neg": "negative"}
"""Fields, and what sentence-transformers' data sets call them."""


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a ``.jsonl``, ``.jsonl.zst`` or ``.parquet`` file.

    Fields may go by the names of sentence-transformers' data sets, and a single text may stand where a list can.

    Returns:
        Each with all fields: a missing ``task`` is the file's name, a missing ``instruction`` empty.

    Raises:
        InputDataError: The file cannot be read, or a row is no JSON object or lacks a field; with file and line.
    """
    try:
        yield from checked_rows(_raw_rows(path), str(path))
    except (OSError, UnicodeDecodeError, zstandard.ZstdError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputDataError(str(path), None, f"cannot be read ({reason}); check the file") from error


def checked_rows(rows: Iterable[str | dict[str, Any]], source: str) -> Iterator[dict[str, Any]]:
    """Rows, or lines of JSON, in the form that `read_rows` gives them; `source` is what errors call their place."""
    empty = None
    for number, row in enumerate(rows, start=1):
        if isinstance(row, str) and not row.strip():
            empty = empty or number  # at the end it says nothing
            continue
        if empty is not None:
            raise InputDataError(source, empty, "an empty line; one object a line is expected")
        if isinstance(row, str):
            try:
                row = json.loads(row)
            except json.JSONDecodeError as error:
                raise InputDataError(source, number, f"not JSON ({error.msg}); one object a line is expected") from None
        if not isinstance(row, dict):
            raise InputDataError(source, number, "not a JSON object; one object a line is expected")
        row = {**row, **{key: row[name] for key, name in _NAMES.items() if key not in row and name in row}}
        if not isinstance(row.get("query"), str) or not row["query"]:
            raise InputDataError(source, number, "'query' must be a text that is not empty")
        for key in ("pos", "neg"):
            given = row.get(key)
            row[key] = [] if given is None else [given] if isinstance(given, str) else given
            if not isinstance(row[key], list) or not all(isinstance(text, str) for text in row[key]):
                raise InputDataError(source, number, f"{key!r} must be a text or a list of texts")
        if not row["pos"] or not all(row["pos"]):
            raise InputDataError(source, number, "'pos' must hold texts that are not empty")
        for key, default in (("task", Path(source).name.split(".")[0]), ("instruction", "")):
            row[key] = default if row.get(key) is None else row[key]
            if not isinstance(row[key], str):
                raise InputDataError(source, number, f"{key!r} must be a text")
        yield row


def _raw_rows(path: Path) -> Iterator[str | dict[str, Any]]:
    """Lines of text, or rows of a table."""
    if path.suffix == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    elif path.suffix == ".zst":
        yield from _lines(_decompressed(path))
    else:
        with path.open(encoding="utf-8-sig") as lines:
            yield from lines


def _decompressed(path: Path, block_size: int = 1 << 16) -> Iterator[bytes]:
    """The content of a file of one Zstandard frame or more.

    `zstandard.open` takes the end of the file for the end of the frame, and so a cut file for a whole one.
    """
    frame = None
    with path.open("rb") as file:
        while block := file.read(block_size):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                frame, block = (None, frame.unused_data) if frame.eof else (frame, b"")
    if frame is not None:
        raise InputDataError(str(path), None, "it ends within its compressed data, so it was cut off; get it whole")


def _lines(blocks: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from (line.decode("utf-8") for line in lines)
    if rest:
        yield rest.decode("utf-8")
