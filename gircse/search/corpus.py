"""The documents of a corpus, in a file or in memory: text, id, and every other column as metadata.

Knows what may be metadata; knows nothing of files (`gircse.embed.reader` does), chunks, models or tables.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from io import BytesIO
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from gircse.embed.reader import STDIN, CorpusReader
from gircse.errors import InputDataError, UsageError

MetadataType = Literal["bool", "int64", "double", "string"]
Scalar = bool | int | float | str


class Document(NamedTuple):
    """A document: its id, its text, and its metadata without nulls."""

    id: str
    text: str
    metadata: dict[str, Scalar]

    @property
    def content_hash(self) -> str:
        """Of text and metadata: two documents of one id that have the same are the same.

        1 and 1.0 are the same number: a file makes one of the other when its column gains a decimal elsewhere.
        """
        metadata = [
            (name, int(value) if isinstance(value, float) and value.is_integer() else value)
            for name, value in sorted(self.metadata.items())
        ]
        content = json.dumps([self.text, metadata], ensure_ascii=True)
        return blake2b(content.encode(), digest_size=16).hexdigest()


class DocumentCorpus:
    """The documents of a file, in order; iterating again starts over.

    Columns besides text and id are metadata under their own names, characters other than letters, digits and ``_``
    replaced by ``_``; one without a name is ``_``. Values that are no scalars (lists, objects, dates) become text, as
    JSON where they can. Numbers that are not finite count as absent.

    Args:
        reader: Of a file; a stream can be read only once.

    Raises:
        UsageError: The source is a stream.
    """

    def __init__(self, reader: CorpusReader) -> None:
        if reader.is_stream:
            raise UsageError("an index is made from a file, which is read twice; save the stream as a file first")
        self.reader = reader
        reader.all_columns = True

    def __iter__(self) -> Iterator[Document]:
        for row in self.reader:
            yield Document(str(row.id), row.text, self._metadata(row.cells or {}, row.line))

    def scan(self) -> tuple[int, dict[str, MetadataType]]:
        """Read everything once: the number of documents and the metadata columns with their types.

        Raises:
            InputDataError: A row is unusable; so it is known before any work is done.
        """
        count, types = 0, cast("dict[str, MetadataType]", {})
        for document in self:
            count += 1
            for name, value in document.metadata.items():
                types[name] = wider(types.get(name), _type_of(value))
        return count, types

    def _metadata(self, cells: dict[str, Any], line: int) -> dict[str, Scalar]:
        metadata: dict[str, Scalar] = {}
        for column, value in cells.items():
            if column in self.reader.columns or value is None:
                continue
            if isinstance(value, float) and not math.isfinite(value):  # Python reads them in JSON, which has none
                continue
            name = re.sub(r"\W", "_", column) or "_"  # pandas leaves its index column without a name
            if name in metadata:
                problem = f"two columns are called {name!r} once other characters are replaced by _; rename one"
                raise InputDataError(self.reader.name, line, problem)
            metadata[name] = _scalar(value)
        return metadata


class DocumentList(DocumentCorpus):
    """Documents in memory: mappings with an ``id`` and a ``text``; all other keys are metadata.

    Args:
        documents: As JSON has them; dates and other things count as their text.
    """

    def __init__(self, documents: Iterable[Mapping[str, Any]]) -> None:
        lines = (json.dumps(dict(document), default=_plain) + "\n" for document in documents)
        self.reader = _LinesReader("".join(lines).encode())
        self.reader.all_columns = True


class _LinesReader(CorpusReader):
    """Lines of JSON in memory."""

    def __init__(self, content: bytes) -> None:
        super().__init__(STDIN, "jsonl", id_column="id", advice="mend it")
        self.name, self._content = "documents", content

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        yield BytesIO(self._content)


def _plain(value: Any) -> Any:
    """What JSON has no type for: NumPy's numbers as numbers, all else as text."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else str(value)


def wider(a: MetadataType | None, b: MetadataType | None) -> MetadataType:
    """The narrowest type that holds values of both."""
    if a == b or not b or not a:
        return a or b or "string"
    return "double" if {a, b} == {"int64", "double"} else "string"


def as_type(value: Scalar | None, kind: MetadataType) -> Scalar | None:
    """A value as the type of its column."""
    if value is None or kind != "string":
        return float(value) if kind == "double" and value is not None else value
    return value if isinstance(value, str) else json.dumps(value)


def _type_of(value: Scalar) -> MetadataType:
    return {bool: "bool", int: "int64", float: "double"}.get(type(value), "string")  # type: ignore[return-value]


def _scalar(value: Any) -> Scalar:
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, bool | float) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return value
    text = json.dumps(value, ensure_ascii=False, default=str)
    return json.loads(text) if text.startswith('"') else text  # a date and its like: without the quotes
