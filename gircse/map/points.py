"""What is to be drawn: vectors of one or several embedding files over the same rows, their texts, a column of labels.

Knows Parquet and corpus files; knows nothing of projections or pages. Files are streamed: memory is that of the sample.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gircse.embed import DEFAULT_SHARD_SIZE, InputFormat
from gircse.embed.job import hash_rows
from gircse.embed.reader import CorpusReader
from gircse.errors import InputDataError, UsageError
from gircse.search.corpus import DocumentCorpus, Scalar

SEED = 0


@dataclass(frozen=True)
class EmbeddingFile:
    """Chosen rows of an embedding file.

    Attributes:
        path: The file.
        ids: Of the rows, as strings.
        vectors: (n, d) float32 of length 1.
        made: What `gircse embed` says of the file; empty where something else wrote it.
    """

    path: Path
    ids: list[str]
    vectors: np.ndarray
    made: dict[str, Any]


@dataclass(frozen=True)
class Labels:
    """Text and label of each point.

    Attributes:
        texts: None where there are none.
        values: Of the column to colour by, None for a missing one; None where no column was asked for.
    """

    texts: list[str] | None
    values: list[Scalar | None] | None


def sample_rows(path: Path, max_points: int) -> tuple[np.ndarray, int]:
    """Which rows of an embedding file to draw, ascending, and of how many; always the same ones of the same number."""
    total = _opened(path).metadata.num_rows
    if total < 3:
        raise InputDataError(str(path), None, f"{total} vectors are no map; embed at least 3 texts")
    if total <= max_points:
        return np.arange(total), total
    return np.sort(np.random.default_rng(SEED).choice(total, max_points, replace=False)), total


def read_files(paths: Sequence[Path], rows: np.ndarray, total: int) -> list[EmbeddingFile]:
    """Chosen rows of several files, which must be over the same texts.

    Raises:
        InputDataError: A file is of other texts, or is no embedding file.
    """
    files: list[EmbeddingFile] = []
    for path in paths:
        count = _opened(path).metadata.num_rows
        files.append(read_embeddings(path, rows[rows < count]))
        first, last = files[0], files[-1]
        checksums = {file.made.get("rows_sha256") for file in (first, last)}
        same_shards = first.made.get("shard_size") == last.made.get("shard_size")
        if count != total or last.ids != first.ids or (same_shards and len(checksums) > 1):
            raise InputDataError(str(path), None, f"it holds other texts than {paths[0]}; embed the same corpus twice")
    return files


def read_embeddings(path: Path, rows: np.ndarray) -> EmbeddingFile:
    """Read chosen rows of what `gircse embed -o X.parquet` writes, in any precision.

    Raises:
        InputDataError: The file is no such file.
    """
    file = _opened(path)
    if not {"id", "embedding"} <= set(file.schema_arrow.names):
        problem = "no columns 'id' and 'embedding'; give a .parquet that gircse embed wrote"
        raise InputDataError(str(path), None, problem)
    made = json.loads((file.schema_arrow.metadata or {}).get(b"gircse", b"{}"))
    table = _take(file, rows, ["id", "embedding"])
    stored = table["embedding"].combine_chunks()
    if table["embedding"].null_count or not len(stored):
        raise InputDataError(str(path), None, "some rows have no vector; embed the corpus again")
    vectors = stored.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    if made.get("precision") == "binary":
        bits = np.unpackbits((vectors.astype(np.int16) + 128).astype(np.uint8), axis=1, count=made.get("dimensions"))
        vectors = bits.astype(np.float32) * 2 - 1
    vectors = vectors.astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return EmbeddingFile(path, [str(key) for key in table["id"].to_pylist()], vectors, made)


def read_labels(
    source: EmbeddingFile, rows: np.ndarray, corpus: str | None, column: str | None, color_by: str | None
) -> Labels:
    """Texts and labels from the corpus that was embedded, or from further columns of the embedding file itself.

    Args:
        source: The points.
        rows: Their rows in the file.
        corpus: The file that was embedded; it may have more columns since.
        column: Of the text; the one that was embedded where None.
        color_by: Of the labels.

    Raises:
        InputDataError: The corpus is another one, or lacks a column.
    """
    if corpus is not None:
        return _labels_of_corpus(source, corpus, column, color_by)
    file = _opened(source.path)
    text = column or "text"
    for name, wanted in ((text, column is not None), (color_by, color_by is not None)):
        if wanted and name not in file.schema_arrow.names:
            raise UsageError(f"{source.path} has no column {name!r}; name the corpus that has it: --texts FILE")
    named = [name for name in (text, color_by) if name is not None and name in file.schema_arrow.names]
    table = _take(file, rows, named) if named else None
    texts = [str(cell or "") for cell in table[text].to_pylist()] if table and text in named else None
    return Labels(texts, table[color_by].to_pylist() if table and color_by else None)


def _labels_of_corpus(source: EmbeddingFile, corpus: str, column: str | None, color_by: str | None) -> Labels:
    id_column = source.made.get("id_column")
    reader = CorpusReader(
        corpus,
        _format_of(source, corpus),
        column=column or source.made.get("column") or "text",
        id_column=id_column,
        skip_bad=True,
    )
    wanted = dict.fromkeys(source.ids)
    found: dict[str, tuple[str, Scalar | None]] = {}
    digest, names = sha256(), set[str]()
    # Row numbers say nothing of the rows, so the rows themselves are compared with those embedded.
    compare = id_column is None and column is None and "rows_sha256" in source.made
    documents = iter(DocumentCorpus(reader))
    while shard := list(islice(documents, source.made.get("shard_size", DEFAULT_SHARD_SIZE))):
        if compare:
            digest.update(hash_rows(shard).encode())  # type: ignore[arg-type]  # documents have the fields of rows
        for document in shard:
            names |= document.metadata.keys()
            if document.id in wanted:
                value = document.metadata.get(color_by) if color_by else None
                found[document.id] = (document.text, value)
    if compare and digest.hexdigest() != source.made["rows_sha256"]:
        raise InputDataError(corpus, None, f"these are not the texts that {source.path} was made from; name that file")
    if missing := next((key for key in source.ids if key not in found), None):
        raise InputDataError(
            corpus, None, f"there is no text with the id {missing!r} of {source.path}; name its corpus"
        )
    if color_by and color_by not in names:
        known = ", ".join(sorted(names)) or "none"
        raise UsageError(f"{corpus} has no column {color_by!r} to colour by; it has {known}")
    return Labels([found[key][0] for key in source.ids], [found[key][1] for key in source.ids] if color_by else None)


def _format_of(source: EmbeddingFile, corpus: str) -> InputFormat | None:
    """What the corpus was embedded as, where its name does not say what it is; None where it does."""
    suffix = Path(corpus).suffix.lower().removeprefix(".")
    # Plain text has no columns, so vectors of a column were made from something else under that name.
    says_nothing = suffix not in get_args(InputFormat) or (suffix == "txt" and source.made.get("column") is not None)
    return source.made.get("input_format") if says_nothing else None


def _opened(path: Path) -> pq.ParquetFile:
    if not path.exists():
        raise InputDataError(str(path), None, "no such file; give a .parquet that gircse embed wrote")
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        problem = f"cannot be read as Parquet ({reason}); give a .parquet that gircse embed wrote"
        raise InputDataError(str(path), None, problem) from error


def _take(file: pq.ParquetFile, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
    """Rows of a file, which is read batch by batch."""
    taken, start = [], 0
    for batch in file.iter_batches(4096, columns=list(dict.fromkeys(columns))):
        inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + batch.num_rows)]
        taken.append(batch.take(pa.array(inside - start)))
        start += batch.num_rows
    return pa.Table.from_batches(taken)
