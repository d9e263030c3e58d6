"""The table of an index: a row a chunk with its text, metadata and vector, in LanceDB under INDEX.

Knows LanceDB and SQL; knows nothing of models, corpora or what made the vectors. Every write of rows is one commit of
LanceDB: after a kill it has happened or it has not.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from gircse.errors import GircseError, MissingExtraError, UsageError
from gircse.search.condition import in_parentheses, refusal

if TYPE_CHECKING:
    from gircse.search.corpus import MetadataType

_NAME = "chunks"
_OWN_COLUMNS = ("chunk_id", "document_id", "chunk_number", "document_hash", "text", "vector")
_LANCE_COLUMNS = (
    "_distance",
    "_score",
    "_rowid",
    "_rowaddr",
    "_rowoffset",
    "_row_created_at_version",
    "_row_last_updated_at_version",
)
_SHOWN = ("chunk_id", "document_id", "chunk_number", "text")
_ARROW_TYPES = {"bool": pa.bool_(), "int64": pa.int64(), "double": pa.float64(), "string": pa.string()}
_WIDE = " as double"  # ends the name of a column that will take another's place; no corpus has one with spaces here
_IDS_A_FILTER = 500
_REFINE = 5  # times as many candidates are compared by their whole vectors as are asked for
_OLD_VERSIONS = timedelta(hours=1)  # what a search that runs meanwhile may still read


@dataclass(frozen=True)
class Chunk:
    """One row without its vector.

    Attributes:
        document_id: Of the document.
        number: Of the chunk in it, from 0.
        document_hash: Content hash of the whole document.
        text: Of the chunk.
        metadata: Of the document, each value of its column's type.
    """

    document_id: str
    number: int
    document_hash: str
    text: str
    metadata: Mapping[str, Any]

    @property
    def id(self) -> str:
        """``document#number``: the same as long as the document has so many chunks."""
        return f"{self.document_id}#{self.number}"


class ChunkTable:
    """The chunks of an index, always as the last commit left them, whichever process made it.

    Args:
        table: A LanceDB table, see `open` and `create`.
    """

    def __init__(self, table: Any) -> None:
        self._table = table

    @classmethod
    def create(cls, folder: Path, dimension: int, metadata: Mapping[str, MetadataType]) -> ChunkTable:
        """An empty table; what is left of an older one is dropped."""
        schema = pa.schema(
            [
                pa.field("chunk_id", pa.string(), nullable=False),
                pa.field("document_id", pa.string(), nullable=False),
                pa.field("chunk_number", pa.int32(), nullable=False),
                pa.field("document_hash", pa.string(), nullable=False),
                pa.field("text", pa.string(), nullable=False),
                pa.field("vector", pa.list_(pa.float32(), dimension), nullable=False),
                *(pa.field(name, _ARROW_TYPES[kind]) for name, kind in metadata.items()),
            ]
        )
        shutil.rmtree(folder / f"{_NAME}.lance", ignore_errors=True)  # a kill may have left one that does not open
        return cls(_connect(folder).create_table(_NAME, schema=schema))

    @classmethod
    def open(cls, folder: Path) -> ChunkTable:
        """The table of an index.

        Raises:
            GircseError: It is not there.
        """
        try:
            return cls(_connect(folder).open_table(_NAME))
        except ValueError as error:
            raise GircseError(f"{folder} has lost its table; make the index anew with --overwrite") from error

    @property
    def metadata_columns(self) -> list[str]:
        """Names of the columns that are not this package's own."""
        names = self._table.schema.names
        return [name for name in names if name not in _OWN_COLUMNS and not name.endswith(_WIDE)]

    @property
    def is_approximate(self) -> bool:
        """Whether there is a vector index."""
        return "vector" in self._indexed_columns()

    @property
    def has_text_index(self) -> bool:
        """Whether full-text search works."""
        return "text" in self._indexed_columns()

    def count_chunks(self) -> int:
        """Rows."""
        return self._table.count_rows()

    # Writing

    def fit_columns(self, metadata: Mapping[str, MetadataType]) -> None:
        """New metadata columns, null everywhere, and whole numbers made doubles where that is their type now."""
        for wide in [name for name in self._table.schema.names if name.endswith(_WIDE)]:  # a kill has left it
            self._take_place(wide)
        schema = self._table.schema
        for name, kind in metadata.items():
            if kind == "double" and name in schema.names and schema.field(name).type == pa.int64():
                # LanceDB does not cast a column in place. Meanwhile searches have the old one.
                self._table.add_columns({name + _WIDE: f"cast(`{name}` as double)"})
                self._take_place(name + _WIDE)
        present = set(self._table.schema.names)
        new = [pa.field(name, _ARROW_TYPES[kind]) for name, kind in metadata.items() if name not in present]
        if new:
            self._table.add_columns(pa.schema(new))

    def _take_place(self, wide: str) -> None:
        """Let a column have the name, and the place, of the one that it was made from."""
        name = wide.removesuffix(_WIDE)
        if name in self._table.schema.names:
            self._table.drop_columns([name])
        self._table.alter_columns({"path": wide, "rename": name})

    def add(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        """Chunks of documents that the table does not hold; `vectors` is (n, d) float32."""
        self._table.add(self._rows(chunks, vectors))

    def replace(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        """All chunks of documents that the table holds: surplus ones go, in the same commit."""
        documents = _one_of("document_id", {chunk.document_id for chunk in chunks})
        merge = self._table.merge_insert("chunk_id").when_matched_update_all().when_not_matched_insert_all()
        merge.when_not_matched_by_source_delete(documents).execute(self._rows(chunks, vectors))

    def delete_documents(self, ids: Sequence[str]) -> None:
        """Remove all their chunks."""
        for start in range(0, len(ids), _IDS_A_FILTER):
            self._table.delete(_one_of("document_id", ids[start : start + _IDS_A_FILTER]))

    def compact(self) -> None:
        """Merge small files, bring what is indexed up to date, and drop versions that nobody reads any more."""
        if "document_id" not in self._indexed_columns():
            from lancedb.index import BTree

            self._table.create_index("document_id", config=BTree())
        self._table.optimize(cleanup_older_than=_OLD_VERSIONS)

    def build_indices(self, text_language: str, exact_below: int) -> None:
        """Full-text search, and approximate vector search from `exact_below` chunks on (dropped below)."""
        from lancedb.index import FTS, HnswSq

        count = self.count_chunks()
        if count and not self.has_text_index:
            # The ICU tokenizer drops stop words of all languages at once, such as "sea" and "cats"; BM25 needs none.
            words = FTS(base_tokenizer="icu", language=text_language, remove_stop_words=False)
            self._table.create_index("text", config=words)
        if count >= max(exact_below, 1) and not self.is_approximate:
            self._table.create_index("vector", config=HnswSq(distance_type="cosine"))
        if count < exact_below and self.is_approximate:
            names = [index.name for index in self._table.list_indices() if "vector" in index.columns]
            for name in names:
                self._table.drop_index(name)

    def _rows(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> pa.Table:
        schema = self._table.schema
        flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
        columns: dict[str, Any] = {
            "chunk_id": [chunk.id for chunk in chunks],
            "document_id": [chunk.document_id for chunk in chunks],
            "chunk_number": [chunk.number for chunk in chunks],
            "document_hash": [chunk.document_hash for chunk in chunks],
            "text": [chunk.text for chunk in chunks],
            "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        }
        for name in self.metadata_columns:
            columns[name] = [chunk.metadata.get(name) for chunk in chunks]
        return pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names}, schema)

    # Reading

    def document_hashes(self, ids: Sequence[str]) -> dict[str, str]:
        """The content hash of each of these documents that the table holds."""
        rows = self._scan(["document_id", "document_hash"], _one_of("document_id", ids)) if ids else []
        return {row["document_id"]: row["document_hash"] for row in rows}

    def document_ids(self) -> Iterator[str]:
        """Of every chunk, so several times the same."""
        for batch in self._table.search().select(["document_id"]).limit(None).to_batches():
            yield from batch.column("document_id").to_pylist()

    def vector_search(self, vector: np.ndarray, limit: int, where: str | None, *, exact: bool) -> list[dict[str, Any]]:
        """The nearest chunks, nearest first, with ``similarity``: the cosine to the vector, (d,).

        A row has the columns that are this package's own, but for the vector, and a document's ``metadata`` as a
        dictionary without nulls and numbers that are not finite.
        """
        query = self._table.search(vector, vector_column_name="vector").distance_type("cosine").limit(limit)
        query = query.bypass_vector_index() if exact else query.refine_factor(_REFINE)
        metadata = self.metadata_columns
        rows = self._ask(query.select([*_SHOWN, *metadata, "_distance"]), where)
        return [{**_shown(row, metadata), "similarity": 1.0 - row["_distance"]} for row in rows]

    def text_search(self, text: str, limit: int, where: str | None, vector: np.ndarray | None) -> list[dict[str, Any]]:
        """The chunks that share words with `text`, by BM25 (``bm25``); with ``similarity`` where a vector is given.

        Rows are as those of `vector_search`.

        Raises:
            GircseError: There is no full-text index yet.
        """
        from lancedb.query import MatchQuery

        if not self.has_text_index:
            raise GircseError("full-text search needs a finished index; run gircse index again, or use --mode vector")
        query = self._table.search(MatchQuery(text, "text"), query_type="fts")  # type: ignore[call-arg]  # has defaults
        query = query.limit(limit)
        metadata = self.metadata_columns
        columns = [*_SHOWN, *metadata, "_score", *(["vector"] if vector is not None else [])]
        rows = []
        for row in self._ask(query.select(columns), where):
            similarity = {} if vector is None else {"similarity": float(np.asarray(row["vector"]) @ vector)}
            rows.append({**_shown(row, metadata), "bm25": row["_score"], **similarity})
        return sorted(rows, key=lambda row: (-row["bm25"], row["chunk_id"]))

    def check_where(self, where: str) -> None:
        """Refuse a condition that is not understood, before any work is done for it.

        Raises:
            UsageError: With the columns that there are.
        """
        self._ask(self._table.search().select(["chunk_id"]).limit(1), where)

    def rows(self) -> list[dict[str, Any]]:
        """Everything, by chunk id: for tests and small tables."""
        columns = [name for name in self._table.schema.names if not name.startswith("_")]
        return sorted(self._scan(columns, None), key=lambda row: row["chunk_id"])

    def _ask(self, query: Any, where: str | None) -> list[dict[str, Any]]:
        if where is None:
            return query.to_list()
        condition = in_parentheses(where)
        try:
            return query.where(condition, prefilter=True).to_list()
        except Exception as error:  # LanceDB raises several, one of them for what it has not implemented
            if _reason_in_files(error) is not None:
                raise
            raise refusal(where, error, self.metadata_columns) from error

    def _scan(self, columns: list[str], where: str | None) -> list[dict[str, Any]]:
        query = self._table.search().select(columns).limit(None)
        return (query.where(where) if where else query).to_list()

    def _indexed_columns(self) -> set[str]:
        return {column for index in self._table.list_indices() for column in index.columns}


@contextmanager
def files_in_words(folder: Path) -> Iterator[None]:
    """Tell of a file of the index that LanceDB cannot read or write as of any other failure: in a line.

    Raises:
        GircseError: There was such a file; every other exception passes.
    """
    try:
        yield
    except RuntimeError as error:
        reason = _reason_in_files(error)
        if reason is None:
            raise
        by_system = re.fullmatch(r".*?([^:(]+) \(os error \d+\)", reason)
        if by_system:  # no space, no permission and the like; what is committed is not harmed
            mend = "mend that, and run the same command again"
            raise GircseError(f"{folder} cannot be read or written: {by_system[1].strip()}; {mend}") from error
        mend = "make the index anew with gircse index --overwrite"
        raise GircseError(f"{folder} is damaged ({reason}); {mend}") from error


def _reason_in_files(error: Exception) -> str | None:
    """What LanceDB says of a file, without the place in its source; None where the error is of another kind."""
    found = re.search(r"lance error: (?:LanceError\(IO\): |(?=Not found))(.*?)(?:, /\S*)?$", str(error), re.DOTALL)
    return " ".join(found[1].split()) if found and isinstance(error, RuntimeError) else None


def check_metadata_names(names: Iterable[str]) -> None:
    """Refuse names that the table needs for itself.

    Raises:
        UsageError: One of them is taken.
    """
    taken = [name for name in names if name.lower() in (*_OWN_COLUMNS, *_LANCE_COLUMNS)]
    if taken:
        raise UsageError(f"the corpus has a column {taken[0]!r}, a name that the index needs for itself; rename it")


def _connect(folder: Path) -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise MissingExtraError("search", "search") from error
    # Without an interval a table that stays open would keep to its version, whose files an update removes in the end.
    return lancedb.connect(folder, read_consistency_interval=timedelta(0))


def _shown(row: Mapping[str, Any], metadata: Sequence[str]) -> dict[str, Any]:
    """A row with its metadata apart: their names are the corpus's, and may be those of what a search adds."""
    found = {name: row[name] for name in metadata if row[name] is not None}
    # Indices made before corpora were read without them may hold infinite numbers, which JSON does not know.
    found = {name: value for name, value in found.items() if not isinstance(value, float) or math.isfinite(value)}
    return {**{name: row[name] for name in _SHOWN}, "metadata": found}


def _one_of(column: str, values: Iterable[str]) -> str:
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in sorted(values))
    return f"{column} IN ({quoted})"
