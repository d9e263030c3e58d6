"""Keeps finished shards of vectors, and merges them into the output file.

Knows files and how to survive being killed; knows nothing of texts, models or the terminal. The rules:

* a file appears under its name by an atomic rename, after its bytes are on the disk;
* a folder ``OUTPUT.parts`` that holds ``job.json`` is unfinished work, and every shard in it is whole;
* OUTPUT is renamed into place after its companions; then ``job.json`` becomes ``job.done``, and what lies beside that
  is leftovers. So at every moment either the shards are all there or the output is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from gircse.errors import GircseError, UsageError

_KEY = b"gircse"  # of the Parquet schema metadata
_PARQUET: dict[str, Any] = {"use_dictionary": False, "write_statistics": ["id"]}  # vectors neither repeat nor sort
_JOB, _DONE, _LOCK = "job.json", "job.done", "lock"
OUTPUT_FORMATS = ("parquet", "npy", "jsonl")


@dataclass(frozen=True)
class Shard:
    """What a finished shard says of itself.

    Attributes:
        rows: Its vectors.
        tokens: Tokens the model read for them, prompts included.
        truncated: Texts that were cut.
        rows_sha256: Of the ids and texts it was made from.
    """

    rows: int
    tokens: int
    truncated: int
    rows_sha256: str


def parts_folder(output: Path) -> Path:
    """Where unfinished work lies."""
    return output.with_name(output.name + ".parts")


def companions(output: Path) -> dict[str, Path]:
    """Files beside a .npy or .jsonl output: ``meta``, what made it; ``ids``, one a line where positions do not tell."""
    if _output_format(output) == "parquet":
        return {}
    files = {"meta": output.with_name(output.name + ".meta.json")}
    return files | ({"ids": output.with_name(output.name + ".ids.txt")} if output.suffix.lower() == ".npy" else {})


def refuse_existing(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise UsageError where a run would touch what is there without having been told to."""
    if resume and overwrite:
        raise UsageError("--resume continues and --overwrite starts again; give one of them")
    _output_format(output)
    if resume or overwrite:
        return
    if _job_file(output).exists():
        raise UsageError(f"{parts_folder(output)} holds unfinished work: continue with --resume, or --overwrite it")
    for path in (output, *companions(output).values()):
        if path.exists():
            raise UsageError(f"{path} exists: choose another OUTPUT, or replace it with --overwrite")


def is_complete(output: Path) -> bool:
    """Whether a run finished here and none was begun since."""
    return output.exists() and not _job_file(output).exists()


def remove_leftovers(output: Path) -> None:
    """Finish the tidying of a run that was killed after its output was whole."""
    folder = parts_folder(output)
    if folder.is_dir() and not _job_file(output).exists() and not _holds_other_files(folder):
        with ShardFolder(output, {}):
            pass


def read_metadata(output: Path) -> dict[str, Any]:
    """What made a finished output, as `ShardFolder.merge` stored it.

    Raises:
        UsageError: The file was not written here.
    """
    try:
        if _output_format(output) == "parquet":
            return json.loads((pq.read_schema(output).metadata or {})[_KEY])
        return json.loads(companions(output)["meta"].read_bytes())
    except (KeyError, ValueError, OSError, pa.ArrowException) as error:
        raise UsageError(f"{output} exists and was not made by gircse embed: choose another OUTPUT") from error


def refuse_differences(then: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Raise UsageError naming every value of `now` that was another in `then`."""
    changed = [key for key in now if then.get(key) != now[key]]
    if changed:
        differences = [f"{key} was {_brief(then.get(key))}, is {_brief(now[key])}" for key in changed]
        raise UsageError(f"{what} with other settings ({'; '.join(differences)}): set them back, or use --overwrite")


class ShardFolder:
    """The shards of one output between the first and the merge; a context manager that keeps other processes out.

    A shard is a Parquet file ``part-00000.parquet`` of ids and vectors. Leaving by an exception before any shard is
    finished removes the folder: there is nothing to resume.

    Args:
        output: The file to be made.
        job: Everything that decides the output's bytes; compared with that of the unfinished work found there.
        restart: Throw unfinished work away.

    Raises:
        UsageError: The unfinished work there belongs to another job.
        GircseError: Another process is at it, or the disk refuses.
    """

    def __init__(self, output: Path, job: Mapping[str, Any], *, restart: bool = False) -> None:
        self.output, self.job, self.restart = output, dict(job), restart
        self.folder = parts_folder(output)
        self._lock = FileLock(self.folder / _LOCK)

    def __enter__(self) -> ShardFolder:
        with _disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise GircseError(f"another process is writing {self.folder}; wait for it to end") from error
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise
        return self

    def _begin(self) -> None:
        job_file = _job_file(self.output)
        if not job_file.exists() and _holds_other_files(self.folder):
            raise UsageError(f"{self.folder} holds files of something else; move it away")
        if job_file.exists() and not self.restart:
            try:
                then = json.loads(job_file.read_bytes())
            except ValueError as error:
                raise UsageError(f"{job_file} is damaged; start again with --overwrite") from error
            refuse_differences(then, self.job, f"{self.folder} was begun")
            return
        self._remove_files()
        with _atomic(job_file, self.folder) as file:
            file.write(_json(self.job))

    def __exit__(self, *exception: object) -> None:
        if self._done_file.exists() or not self.finished:
            self._remove_files()
            self._lock.release()
            with contextlib.suppress(OSError):  # a file of somebody else's may stay, and then the folder does
                (self.folder / _LOCK).unlink(missing_ok=True)
                self.folder.rmdir()
        else:
            self._lock.release()

    @property
    def finished(self) -> int:
        """Shards that are finished."""
        return sum(1 for _ in self.folder.glob("part-*.parquet"))

    @property
    def _done_file(self) -> Path:
        return self.folder / _DONE

    def part(self, index: int) -> Path:
        """File of a shard, finished or not."""
        return self.folder / f"part-{index:05d}.parquet"

    def find(self, index: int) -> Shard | None:
        """A finished shard; None where it is still to be made."""
        try:
            return Shard(**json.loads((pq.read_schema(self.part(index)).metadata or {})[_KEY]))
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
            return None  # absent, or damaged by the disk: made anew either way

    def add(self, index: int, shard: Shard, ids: Sequence[int | str], vectors: np.ndarray) -> None:
        """Store a finished shard.

        Args:
            index: Shards are numbered from 0 without gaps.
            shard: What it is.
            ids: Its ids.
            vectors: (rows, width), of the output's type.
        """
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        table = pa.table({"id": pa.array(ids), "embedding": values}, metadata={_KEY: json.dumps(asdict(shard))})
        with _atomic(self.part(index), self.folder) as file:
            pq.write_table(table, file, **_PARQUET)

    def merge(
        self,
        count: int,
        metadata: Mapping[str, Any],
        *,
        write_ids: bool,
        on_shard: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the output out of shards 0 to `count` - 1, one shard in memory at a time, and remove them.

        Args:
            count: Shards, 1 or more.
            metadata: Stored with the output: what made it.
            write_ids: Put ids beside a .npy output.
            on_shard: Called after every shard that was merged.
        """

        def tables(columns: list[str] | None = None) -> Iterator[pa.Table]:
            for index in range(count):
                with pq.ParquetFile(self.part(index)) as file:
                    yield file.read(columns, use_threads=False)

        write = {"parquet": _write_parquet, "npy": _write_npy, "jsonl": _write_jsonl}[_output_format(self.output)]
        beside = companions(self.output)
        if "ids" in beside and write_ids:
            with _atomic(beside["ids"], self.folder) as file:
                for table in tables(["id"]):
                    file.write("".join(f"{key}\n" for key in table["id"].to_pylist()).encode())
        elif "ids" in beside:
            beside["ids"].unlink(missing_ok=True)
        if "meta" in beside:
            with _atomic(beside["meta"], self.folder) as file:
                file.write(_json(metadata))
        with _atomic(self.output, self.folder) as file:
            write(file, _announced(tables(), on_shard), metadata)
        self._end_job()

    def _end_job(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.replace(_job_file(self.output), self._done_file)
            _sync_folder(self.folder)

    def _remove_files(self) -> None:
        self._end_job()
        for pattern in ("part-*.parquet", "*.tmp", self._done_file.name):  # in this order: the mark goes last
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)


def _announced(tables: Iterator[pa.Table], on_shard: Callable[[], None]) -> Iterator[pa.Table]:
    for table in tables:
        yield table
        on_shard()


# One writer a format: tables of ids and vectors to a file


def _write_parquet(file: BinaryIO, tables: Iterator[pa.Table], metadata: Mapping[str, Any]) -> None:
    writer: pq.ParquetWriter | None = None
    for table in tables:
        table = table.replace_schema_metadata({_KEY: json.dumps(metadata, sort_keys=True, ensure_ascii=False)})
        writer = writer or pq.ParquetWriter(file, table.schema, **_PARQUET)
        writer.write_table(table)
    assert writer is not None, "an output has at least one shard"
    writer.close()


def _write_npy(file: BinaryIO, tables: Iterator[pa.Table], metadata: Mapping[str, Any]) -> None:
    for index, table in enumerate(tables):
        vectors = _vectors(table)
        if index == 0:
            header = np.lib.format.header_data_from_array_1_0(vectors) | {"shape": (metadata["rows"], vectors.shape[1])}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(vectors).tobytes())


def _write_jsonl(file: BinaryIO, tables: Iterator[pa.Table], metadata: Mapping[str, Any]) -> None:
    for table in tables:
        vectors = _vectors(table)
        # Digits enough to restore every value of the type, and no more.
        digits = {"float32": "%.9g", "float16": "%.5g", "int8": "%d"}[vectors.dtype.name]
        pattern = ", ".join([digits] * vectors.shape[1])
        for key, vector in zip(table["id"].to_pylist(), vectors.tolist(), strict=True):
            line = f'{{"id": {json.dumps(key, ensure_ascii=False)}, "embedding": [{pattern % tuple(vector)}]}}\n'
            file.write(line.encode())


def _vectors(table: pa.Table) -> np.ndarray:
    column = table["embedding"].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)


# Files


@contextmanager
def _atomic(path: Path, folder: Path) -> Iterator[BinaryIO]:
    """A file to write in `folder` that takes its place at `path` when it is whole and on the disk."""
    temporary = folder / f"{path.name}.tmp"
    with _disk_errors(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise GircseError(f"{path} cannot be written ({reason}); mend that and use --resume") from error


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere folders cannot be opened, and renames are journalled
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _job_file(output: Path) -> Path:
    return parts_folder(output) / _JOB


def _holds_other_files(folder: Path) -> bool:
    # Without a job, what may lie there is what is left of a finished one, or of one that was killed as it began.
    names = {path.name for path in folder.iterdir() if path.suffix != ".tmp"} - {_LOCK}
    return bool(names) and _DONE not in names


def _output_format(output: Path) -> str:
    suffix = output.suffix.lower().removeprefix(".")
    if suffix not in OUTPUT_FORMATS:
        raise UsageError(f"{output}: OUTPUT must end in .{', .'.join(OUTPUT_FORMATS)}")
    return suffix


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:197] + "..."
