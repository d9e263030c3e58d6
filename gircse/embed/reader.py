"""Streams a corpus row by row from text, JSON lines, CSV or Parquet, and names the line of every unusable row.

Knows files, encodings and what makes a row unusable; knows nothing of models, vectors or the terminal. Memory is that
of one row (Parquet: one batch of rows), plus 8 bytes for every id where an id column is named.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gircse.embed import InputFormat
from gircse.errors import InputDataError, UsageError

STDIN = "-"
MEND = "mend or remove the row"
MEND_OR_SKIP = f"{MEND}, or leave bad rows out with --skip-bad"
_MAX_CSV_CELL = 1 << 26  # characters; a cell above this is a quote that was never closed
_PARQUET_BATCH = 1024  # rows


class Row(NamedTuple):
    """A usable row: its id, its text, its 1-based line (Parquet: row) in the source, and its cells where asked for."""

    id: int | str
    text: str
    line: int
    cells: dict[str, Any] | None = None


class _Record(NamedTuple):
    """A row before it is checked; `id` and `text` may be of any type."""

    line: int
    id: Any
    text: Any
    cells: dict[str, Any] | None = None


class _BadRow(NamedTuple):
    line: int
    kind: str
    problem: str


@dataclass
class BadRows:
    """What `--skip-bad` left out.

    Attributes:
        counts: Rows by kind of fault.
        lines: The first few line numbers of each kind.
    """

    counts: dict[str, int] = field(default_factory=dict)
    lines: dict[str, list[int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Rows left out."""
        return sum(self.counts.values())

    def add(self, kind: str, line: int, *, keep: int = 5) -> None:
        """Count a row; only the first `keep` line numbers of a kind are remembered."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        lines = self.lines.setdefault(kind, [])
        if len(lines) < keep:
            lines.append(line)

    def __str__(self) -> str:
        kinds = []
        for kind, count in self.counts.items():
            more = ", ..." if count > len(self.lines[kind]) else ""
            word = "line" if count == 1 else "lines"
            kinds.append(f"{kind} × {count:,} ({word} {', '.join(map(str, self.lines[kind]))}{more})")
        return "; ".join(kinds)


class CorpusReader:
    """The rows of a corpus, in order. Iterating again starts over (standard input can be read once).

    The id of a row is its 1-based number as an int (.txt and .jsonl: its line; .csv: the header is not counted), or the
    value of `id_column` as a string; an id column holds strings or integers, each once.

    Args:
        source: A path, or ``-`` for standard input.
        input_format: Found from the file's name where not given; ``txt`` for standard input.
        column: JSON key, CSV header or Parquet column of the text; plain text has none.
        id_column: Likewise of the ids.
        skip_bad: Count unusable rows in `bad` instead of raising on the first.
        advice: What people are told to do about an unusable row.
        stream: Read in place of standard input.

    Attributes:
        all_columns: Whether rows carry the `cells` of all columns, by name; a CSV row only those that are not empty.

    Raises:
        UsageError: The format is unknown, cannot be streamed, or has no columns.
        InputDataError: There is no such file, or its header lacks the column; while iterating, a row is unusable.
    """

    def __init__(
        self,
        source: str,
        input_format: InputFormat | None = None,
        *,
        column: str = "text",
        id_column: str | None = None,
        skip_bad: bool = False,
        advice: str = MEND_OR_SKIP,
        stream: BinaryIO | None = None,
    ) -> None:
        self.source, self.column, self.id_column, self.skip_bad = source, column, id_column, skip_bad
        self.name = "standard input" if source == STDIN else source
        self.format = input_format or _format_of(source)
        self.bad = BadRows()
        self.all_columns = False
        self._advice, self._stream = advice, stream
        if self.format == "txt" and id_column is not None:
            raise UsageError("a .txt corpus has no columns, so --id-column does not apply: ids are line numbers")
        if not self.is_stream:
            with self._opened():
                pass
        elif self.format == "parquet":
            raise UsageError("Parquet cannot be read from a stream; save it as a file")

    @property
    def is_stream(self) -> bool:
        """Whether the source can be read only once: standard input or a named pipe."""
        if self.source == STDIN:
            return True
        try:
            mode = os.stat(self.source).st_mode
        except OSError:
            return False  # opening it says what is wrong
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))

    @property
    def columns(self) -> list[str]:
        """The named columns: of the text, and of the ids where there is one."""
        return [self.column] if self.id_column is None else [self.column, self.id_column]

    def describe(self) -> dict[str, str | None]:
        """What decides the rows besides the file's content; content is compared by `hash_rows`."""
        return {
            "input": STDIN if self.source == STDIN else os.path.abspath(self.source),
            "input_format": self.format,
            "column": None if self.format == "txt" else self.column,
            "id_column": self.id_column,
        }

    def __iter__(self) -> Iterator[Row]:
        self.bad = BadRows()
        seen = SeenIds()
        readers = {"txt": _read_text, "jsonl": _read_json_lines, "csv": _read_csv, "parquet": _read_parquet}
        with self._opened() as stream:
            for record in readers[self.format](self, stream):
                row = record if isinstance(record, _BadRow) else self._checked(record, seen)
                if isinstance(row, Row):
                    yield row
                elif self.skip_bad:
                    self.bad.add(row.kind, row.line)
                else:
                    raise InputDataError(self.name, row.line, f"{row.problem}; {self._advice}")

    def peek(self) -> None:
        """Raise what the first row would raise, so that nobody waits for a model first. Streams are left alone."""
        if not self.is_stream:
            rows = iter(self)
            next(rows, None)
            rows.close()  # type: ignore[attr-defined]

    def count_rows(self) -> int | None:
        """Rows of the file, bad ones included, without parsing them; None for a stream."""
        if self.is_stream:
            return None
        if self.format == "parquet":
            return pq.read_metadata(self.source).num_rows
        newlines, quoted, last = 0, False, b"\n"
        with self._opened() as stream:
            while block := stream.read(1 << 20):
                # In CSV a line break between quotes is text; a doubled quote closes and opens, so parity is enough.
                for index, piece in enumerate(block.split(b'"') if self.format == "csv" else [block]):
                    quoted ^= index > 0
                    newlines += 0 if quoted else piece.count(b"\n")
                last = block[-1:]
        return max(0, newlines + (last != b"\n") - (self.format == "csv"))

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        if self.source == STDIN:
            yield self._stream or sys.stdin.buffer
            return
        try:
            stream = open(self.source, "rb")  # noqa: SIM115  # closed below
        except OSError as error:
            raise InputDataError(self.source, None, f"cannot be read ({error.strerror}); check the path") from error
        with stream:
            yield stream

    def _checked(self, record: _Record, seen: SeenIds) -> Row | _BadRow:
        line, key, text, cells = record
        if text is None or text != text:  # NaN differs from itself
            return _BadRow(line, "null", f"{self._cell(self.column)} is null")
        if not isinstance(text, str):
            return _BadRow(line, "not a string", f"{self._cell(self.column)} is a {_type_name(text)}, not a string")
        if not text.strip():
            return _BadRow(line, "empty text", "the text is empty")
        if (problem := _encoding_problem(text)) is not None:
            return _BadRow(line, "not UTF-8", problem)
        if self.id_column is None:
            return Row(key, text, line, cells)
        if isinstance(key, bool) or not isinstance(key, int | str):
            what = "null" if key is None or key != key else f"a {_type_name(key)}"
            return _BadRow(line, "bad id", f"{self._cell(self.id_column)} is {what}; an id is a string or an integer")
        key = str(key)
        if not key.strip() or "\n" in key or "\r" in key or _encoding_problem(key):
            return _BadRow(line, "bad id", f"the id {_shortened(key)} is empty or not a single line of valid text")
        if not seen.add(key):
            return _BadRow(line, "duplicate id", f"the id {_shortened(key)} occurred before")
        return Row(key, text, line, cells)

    def _cell(self, column: str | None) -> str:
        return "the text" if self.format == "txt" else f"column {column!r}"


class SeenIds:
    """Which ids have occurred, in 8 bytes each.

    An id is remembered by a 64-bit hash: among ten million ids the chance that two different ones are taken for the
    same is 3 in a million.
    """

    _RECENT = 1 << 16

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._older = np.empty(0, dtype=np.uint64)  # sorted

    def add(self, key: str) -> bool:
        """Remember an id; False where it is known already."""
        value = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")
        place = int(np.searchsorted(self._older, np.uint64(value)))
        if value in self._recent or (place < len(self._older) and int(self._older[place]) == value):
            return False
        self._recent.add(value)
        if len(self._recent) == self._RECENT:
            recent = np.fromiter(self._recent, dtype=np.uint64, count=self._RECENT)
            self._older = np.sort(np.concatenate([self._older, np.sort(recent)]), kind="stable")
            self._recent.clear()
        return True


# One generator a format: each yields records, and bad rows where a record cannot be had


def _read_text(reader: CorpusReader, stream: BinaryIO) -> Iterator[_Record | _BadRow]:
    for number, line in _numbered_lines(reader, stream):
        text = _decoded(number, line)
        yield text if isinstance(text, _BadRow) else _Record(number, number, text)


def _read_json_lines(reader: CorpusReader, stream: BinaryIO) -> Iterator[_Record | _BadRow]:
    blank_from: int | None = None  # blank lines at the end of a file are common and harmless
    for number, line in _numbered_lines(reader, stream):
        if not line.strip():
            blank_from = blank_from or number
            continue
        yield from _blank_lines(blank_from, number)
        blank_from = None
        text = _decoded(number, line)
        yield text if isinstance(text, _BadRow) else _parse_json(reader, number, text)


def _parse_json(reader: CorpusReader, number: int, line: str) -> _Record | _BadRow:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be parsed"
        return _BadRow(number, "broken JSON", f"not valid JSON{where}: {reason}")
    if not isinstance(values, dict):
        return _BadRow(number, "broken JSON", f"a {_type_name(values)} where a JSON object is expected")
    for column in reader.columns:
        if column not in values:
            problem = f"no key {column!r} (this line has {_listed(values)}); choose with --column and --id-column"
            return _BadRow(number, "missing column", problem)
    key = number if reader.id_column is None else values[reader.id_column]
    return _Record(number, key, values[reader.column], values if reader.all_columns else None)


class _CsvLines:
    """Decoded lines for the csv module, which may take several for one record."""

    def __init__(self, lines: Iterator[tuple[int, bytes]]) -> None:
        self._lines = lines
        self.bad: _BadRow | None = None  # the first line that is not UTF-8 since this was last cleared
        self.exhausted = False

    def __iter__(self) -> Iterator[str]:
        for number, line in self._lines:
            text = _decoded(number, line)
            if isinstance(text, _BadRow):
                # The quotes must still be seen, or every later record would be misread.
                self.bad = self.bad or text
                text = line.decode("utf-8", errors="replace")
            yield text
        self.exhausted = True


def _read_csv(reader: CorpusReader, stream: BinaryIO) -> Iterator[_Record | _BadRow]:
    lines = _CsvLines(_numbered_lines(reader, stream, keep_ends=True))
    rows = csv.reader(lines, strict=True)
    previous_limit = csv.field_size_limit(_MAX_CSV_CELL)
    try:
        header: list[str] | None = None
        row_number, blank_from = 0, None
        while True:
            line, lines.bad = rows.line_num + 1, None
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                # After these the reader no longer knows where rows begin, so there is no skipping them.
                if lines.exhausted or "field limit" in str(error):
                    problem = f"a quote opened in the record that begins here is never closed ({error}); close it"
                    raise InputDataError(reader.name, line, problem) from error
                if header is None:
                    problem = f"the header is not valid CSV ({error}); mend it"
                    raise InputDataError(reader.name, line, problem) from error
                row_number += 1
                yield _BadRow(line, "broken CSV", f"not valid CSV ({error}); double the quotes inside a quoted cell")
                continue
            if not cells:
                blank_from = blank_from or line
                continue
            if header is None:
                header = cells
                text_index, id_index = _csv_columns(reader, header, line)
                blank_from = None
                continue
            yield from _blank_lines(blank_from, line)
            blank_from = None
            row_number += 1
            if lines.bad is not None:
                yield lines.bad
            elif len(cells) != len(header):
                problem = f"{len(cells)} cells where the header has {len(header)}; put cells with commas between quotes"
                yield _BadRow(line, "wrong number of cells", problem)
            else:
                key = row_number if id_index is None else cells[id_index]
                named = dict(zip(header, cells, strict=True)) if reader.all_columns else {}
                yield _Record(line, key, cells[text_index], {name: cell for name, cell in named.items() if cell})
    finally:
        csv.field_size_limit(previous_limit)


def _csv_columns(reader: CorpusReader, header: list[str], line: int) -> tuple[int, int | None]:
    for column in reader.columns:
        if header.count(column) != 1:
            problem = "no column" if column not in header else "more than one column"
            advice = "choose with --column and --id-column"
            raise InputDataError(reader.name, line, f"{problem} {column!r}; the header has {_listed(header)}: {advice}")
    return header.index(reader.column), None if reader.id_column is None else header.index(reader.id_column)


def _read_parquet(reader: CorpusReader, stream: BinaryIO) -> Iterator[_Record | _BadRow]:
    try:
        file = pq.ParquetFile(stream, buffer_size=1 << 20)
        _check_parquet_columns(reader, file.schema_arrow)
        number = 0
        wanted = file.schema_arrow.names if reader.all_columns else reader.columns
        for batch in file.iter_batches(_PARQUET_BATCH, columns=list(dict.fromkeys(wanted))):
            texts = _cells(batch.column(reader.column))
            ids = [None] * len(texts) if reader.id_column is None else _cells(batch.column(reader.id_column))
            others = [name for name in wanted if name not in reader.columns]
            cells = batch.select(others).to_pylist() if others else [None] * len(texts)
            for key, text, named in zip(ids, texts, cells, strict=True):
                number += 1
                decoded = [_decoded(number, cell) if isinstance(cell, bytes) else cell for cell in (key, text)]
                bad = next((cell for cell in decoded if isinstance(cell, _BadRow)), None)
                yield bad or _Record(number, number if reader.id_column is None else decoded[0], decoded[1], named)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputDataError(reader.name, None, f"cannot be read as Parquet ({reason}); is it whole?") from error


def _check_parquet_columns(reader: CorpusReader, schema: pa.Schema) -> None:
    advice = "choose with --column and --id-column"
    for column in reader.columns:
        if schema.names.count(column) != 1:
            problem = f"no column {column!r}; the file has {_listed(schema.names)}: {advice}"
            raise InputDataError(reader.name, None, problem)
        kind = schema.field(column).type
        if not (_is_text(kind) or (column == reader.id_column != reader.column and pa.types.is_integer(kind))):
            raise InputDataError(reader.name, None, f"column {column!r} holds {kind}, not strings: {advice}")


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    text_types = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
    return kind in text_types


def _cells(column: pa.Array) -> list[Any]:
    # Text as bytes: Parquet does not promise valid UTF-8, and Arrow would fail on the batch instead of naming the row.
    return (column.cast(pa.large_binary()) if _is_text(column.type) else column).to_pylist()


# Lines, and words for messages


def _numbered_lines(reader: CorpusReader, stream: BinaryIO, *, keep_ends: bool = False) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(stream, start=1):
        if number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise InputDataError(reader.name, 1, "the file is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
            line = line.removeprefix(codecs.BOM_UTF8)
        if not keep_ends:
            line = line.removesuffix(b"\n").removesuffix(b"\r")
        yield number, line


def _decoded(number: int, line: bytes) -> str | _BadRow:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}"
        return _BadRow(number, "not UTF-8", f"{problem} (from Latin-1: iconv -f LATIN1 -t UTF-8)")


def _encoding_problem(text: str) -> str | None:
    # JSON can spell half a surrogate pair, which no UTF-8 text holds and no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half a surrogate pair (\\u{ord(text[error.start]):04x}) at character {error.start + 1} of the text"
    return None


def _blank_lines(first: int | None, end: int) -> Iterator[_BadRow]:
    if first is not None:
        for number in range(first, end):
            yield _BadRow(number, "blank line", "a blank line between rows")


def _type_name(value: Any) -> str:
    names = {dict: "JSON object", list: "list", bool: "true/false value", type(None): "null"}
    return "number" if type(value) in (int, float) else names.get(type(value), type(value).__name__)


def _shortened(text: str, limit: int = 40) -> str:
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def _listed(names: Sequence[str] | dict[str, Any], limit: int = 12) -> str:
    names = [_shortened(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") if names else "none"


def _format_of(source: str) -> InputFormat:
    suffix = Path(source).suffix.lower().removeprefix(".")
    for known in get_args(InputFormat):
        if suffix == known or source == STDIN:
            return known
    raise UsageError(f"{source}: unknown kind of file; name it with --input-format {'|'.join(get_args(InputFormat))}")
