"""Embeds a corpus on many workers: Ray Data hands out shards, actors hold the model, a shard becomes a Parquet file.

Knows ranges of a file, workers and their failures; knows no terminal. A shard is a fixed range of lines or rows, which
`gircse.embed.job.embed_corpus` embeds into a file of its own, put in place by an atomic rename. So a shard that is made
twice, after a worker died or in a later run, is the same file again: nothing is lost, nothing is there twice.
The output folder must be one that every worker sees; the input may be any fsspec address (s3:// ...).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from gircse.embed import InputFormat
from gircse.embed.job import EmbedSettings, EmbedSummary, Progress, TextEncoder, embed_corpus
from gircse.embed.reader import STDIN, CorpusReader, Row, SeenIds
from gircse.embed.writer import read_metadata, refuse_differences
from gircse.errors import GircseError, InputDataError, MissingExtraError, UsageError
from gircse.fast.kernel_caches import limit_kernel_caches

SUMMARY = "gircse.json"
"""Written last: a folder that holds it is whole."""

_MAX_RETRIES = 3  # a shard that kills its worker more often than this stops the run
_MAX_BLOCKS = 4096  # units of work that Ray Data keeps books of


@dataclass(frozen=True)
class Corpus:
    """A corpus that is read in ranges.

    Attributes:
        source: A path or an fsspec address.
        input_format: ``jsonl``, ``txt`` or ``parquet``.
        column: Of the text.
        id_column: Of the ids; row numbers of the whole corpus where None.
        skip_bad: Leave unusable rows out.
    """

    source: str
    input_format: InputFormat
    column: str = "text"
    id_column: str | None = None
    skip_bad: bool = False

    def open(self) -> BinaryIO:
        """The file.

        Raises:
            InputDataError: It cannot be read.
        """
        try:
            filesystem, path = url_to_fs(self.source)
            return cast(BinaryIO, filesystem.open(path, "rb"))
        except (OSError, ImportError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputDataError(self.source, None, f"cannot be read ({reason}); check the path") from error

    def plan(self, shard_size: int) -> list[ShardRange]:
        """Cut the corpus into shards of `shard_size` lines or rows."""
        with self.open() as stream:
            try:
                if self.input_format == "parquet":
                    return list(_cut_parquet(stream, shard_size))
                json_lines = self.input_format == "jsonl"
                return list(_cut_lines(stream, shard_size, blank_lines_say_nothing=json_lines))
            except (pa.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0]
                raise InputDataError(self.source, None, f"cannot be read ({reason}); is it whole?") from error

    def read(self, shard: ShardRange) -> bytes:
        """A shard as lines: those of the file, or the rows of Parquet as JSON."""
        with self.open() as stream:
            if self.input_format != "parquet":
                stream.seek(shard.start)
                return stream.read(shard.stop - shard.start)
            names = [self.column, *([self.id_column] if self.id_column else [])]
            file = pq.ParquetFile(stream)
            if missing := [name for name in names if name not in file.schema_arrow.names]:
                problem = f"no column {missing[0]!r}; choose with --column and --id-column"
                raise InputDataError(self.source, None, problem)
            rows = _parquet_rows(file, shard.start, shard.stop, names)
            return "".join(json.dumps(row, default=_as_text) + "\n" for row in rows).encode()


@dataclass(frozen=True)
class ShardRange:
    """Where a shard lies.

    Attributes:
        index: From 0.
        start: First byte, or row of a Parquet file.
        stop: One past the last.
        first: Lines or rows before it.
        sha256: Of its bytes; of the footer and the range in a Parquet file, whose rows the driver does not read.
    """

    index: int
    start: int
    stop: int
    first: int
    sha256: str


class ShardReader(CorpusReader):
    """The rows of one shard, numbered as in the whole corpus."""

    def __init__(self, corpus: Corpus, shard: ShardRange) -> None:
        kind = "jsonl" if corpus.input_format == "parquet" else corpus.input_format
        options: dict[str, Any] = {"column": corpus.column, "id_column": corpus.id_column, "skip_bad": corpus.skip_bad}
        super().__init__(STDIN, kind, **options)
        self.corpus, self.shard, self.name = corpus, shard, corpus.source
        self._content = corpus.read(shard)

    def describe(self) -> dict[str, str | None]:
        """As of the whole corpus, and which part of it this is."""
        return {**shard_facts(self.corpus, self.shard), "input": self.corpus.source}

    def __iter__(self) -> Iterator[Row]:
        self._stream = BytesIO(self._content)
        first = self.shard.first
        try:
            for row in super().__iter__():
                key = int(row.id) + first if self.id_column is None else row.id
                yield Row(key, row.text, row.line + first)
        except InputDataError as error:
            raise InputDataError(
                error.source, None if error.line is None else error.line + first, error.problem
            ) from error


def format_of(source: str) -> InputFormat:
    """What a file is, by its name.

    Raises:
        UsageError: It is none that can be cut into shards.
    """
    suffix = source.rpartition(".")[2].lower()
    if suffix not in ("jsonl", "txt", "parquet"):
        raise UsageError(f"{source}: --ray reads .jsonl, .txt and .parquet; name the format with --input-format")
    return cast(InputFormat, suffix)


def shard_facts(corpus: Corpus, shard: ShardRange) -> dict[str, str | None]:
    """What a part says of the rows it was made from."""
    column = None if corpus.input_format == "txt" else corpus.column
    return {
        "input_format": corpus.input_format,
        "column": column,
        "id_column": corpus.id_column,
        "shard_sha256": shard.sha256,
    }


def part(folder: Path, index: int) -> Path:
    """File of a shard."""
    return folder / f"part-{index:05d}.parquet"


class EmbedWorker:
    """What an actor does: hold a model, make parts.

    Args:
        load: Makes the model; called once an actor.
        corpus: The rows.
        folder: Of the parts.
        settings: What decides the vectors.
    """

    def __init__(self, load: Callable[[], TextEncoder], corpus: Corpus, folder: str, settings: EmbedSettings) -> None:
        limit_kernel_caches()
        self.model, self.corpus, self.folder, self.settings = load(), corpus, Path(folder), settings

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Ray Data's interface: a batch of one `ShardRange`, by column; what was done with it."""
        [shard] = [ShardRange(**values) for values in _rows_of(batch)]
        try:
            done = self.embed(shard)
        except GircseError as error:  # retrying would not mend it, and a traceback of Ray would hide it
            done = {"error": str(error)}
        values = {
            "texts": 0,
            "tokens": 0,
            "truncated": 0,
            "skipped": "{}",
            "seconds": 0.0,
            "dim": 0,
            "error": "",
        } | done
        return {"index": [shard.index], **{name: [value] for name, value in values.items()}}

    def embed(self, shard: ShardRange) -> dict[str, Any]:
        """Make a part, unless it is there already."""
        reader = ShardReader(self.corpus, shard)
        if self.corpus.skip_bad and next(iter(reader), None) is None:
            return {"skipped": json.dumps(reader.bad.counts)}
        summary = embed_corpus(self.model, reader, part(self.folder, shard.index), self.settings, resume=True)
        return {
            "texts": summary.texts,
            "tokens": summary.tokens,
            "truncated": summary.truncated,
            "skipped": json.dumps(summary.skipped_by_kind),
            "seconds": summary.seconds,
            "dim": summary.dim,
        }


def embed_on_ray(
    load: Callable[[], TextEncoder],
    corpus: Corpus,
    folder: Path,
    settings: EmbedSettings,
    *,
    address: str,
    workers: int | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_plan: Callable[[int], None] = lambda rows: None,
) -> EmbedSummary:
    """Embed a corpus into a folder of parts.

    Args:
        load: Makes a worker's model; must be picklable.
        corpus: The rows.
        folder: Of the parts.
        settings: What decides the vectors; `shard_size` rows a part.
        address: ``local`` starts Ray on this machine, ``auto`` finds a running one, else ``HOST:PORT`` or ``ray://``.
        workers: Actors; one a GPU of the cluster, or one a CPU core, where None.
        resume: Continue what an earlier run began.
        on_progress: Called after every part.
        on_plan: Called with the rows of the corpus before the work begins.

    Raises:
        UsageError: The folder is in the way, or holds parts of other settings.
        InputDataError: A row is unusable, or an id occurs twice.
        MissingExtraError: Ray is not installed.
        GircseError: There is no Ray at the address, or a shard kills every worker that tries it.
    """
    if corpus.input_format == "csv":
        raise UsageError("--ray reads .jsonl, .txt and .parquet; a record of .csv may span lines, so convert it first")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; --ray writes a folder of parts")
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise UsageError(f"{folder} is not empty: continue with --resume, or choose another OUTPUT")
    shards = corpus.plan(settings.shard_size)
    if not shards:
        raise InputDataError(corpus.source, None, "there are no texts to embed; check the input")
    folder.mkdir(parents=True, exist_ok=True)
    on_plan(_count_rows(shards, corpus))
    run = _Run(corpus, folder, settings, on_progress)
    left = [shard for shard in shards if not run.is_done(shard)]
    if part(folder, len(shards)).exists():
        raise UsageError(f"{folder} holds more parts than {corpus.source} has shards; choose another OUTPUT")
    (folder / SUMMARY).unlink(missing_ok=True)
    if left:
        run.embed(left, load, address, workers)
    if corpus.id_column is not None:
        run.refuse_repeated_ids(len(shards))
    return run.finish()


class _Run:
    """One call of `embed_on_ray` and its counts."""

    def __init__(
        self, corpus: Corpus, folder: Path, settings: EmbedSettings, on_progress: Callable[[Progress], None]
    ) -> None:
        self.corpus, self.folder, self.settings, self.on_progress = corpus, folder, settings, on_progress
        self.texts = self.resumed = self.tokens = self.tokens_here = self.truncated = self.dim = 0
        self.skipped: dict[str, int] = {}
        self.seconds = 0.0

    def is_done(self, shard: ShardRange) -> bool:
        """Whether the part of a shard is there; counts it.

        Raises:
            UsageError: It was made with other settings, or of other rows.
        """
        file = part(self.folder, shard.index)
        if not file.exists():
            return False
        made = read_metadata(file)
        refuse_differences(made, self.settings.describe() | shard_facts(self.corpus, shard), f"{file} was made")
        self.resumed += made["rows"]
        self._count(made["rows"], made["tokens"], made["truncated"], made["skipped"], made["dimensions"])
        return True

    def embed(
        self, shards: list[ShardRange], load: Callable[[], TextEncoder], address: str, workers: int | None
    ) -> None:
        """Make the parts of shards."""
        ray = connect(address)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        gpus = int(ray.cluster_resources().get("GPU", 0))
        workers = min(workers or gpus or int(ray.cluster_resources().get("CPU", 1)), len(shards))
        dataset = ray.data.from_items(
            [asdict(shard) for shard in shards], override_num_blocks=min(len(shards), _MAX_BLOCKS)
        ).map_batches(
            EmbedWorker,
            fn_constructor_args=(load, self.corpus, str(self.folder.absolute()), self.settings),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            ray_remote_args_fn=lambda: {"max_task_retries": _MAX_RETRIES, "max_restarts": -1},
            **({"num_gpus": 1} if gpus else {"num_cpus": 1}),
        )
        try:
            for done in dataset.iter_rows():
                if done["error"]:
                    raise GircseError(f"{done['error']} (finished parts are kept: afterwards go on with --resume)")
                self.tokens_here += done["tokens"]
                self.seconds += done["seconds"] / workers
                skipped = json.loads(done["skipped"])
                self._count(done["texts"], done["tokens"], done["truncated"], skipped, done["dim"])
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise GircseError(f"a worker failed ({reason}); finished parts are kept: go on with --resume") from error

    def _count(self, texts: int, tokens: int, truncated: int, skipped: dict[str, int], dim: int) -> None:
        self.texts += texts
        self.tokens += tokens
        self.truncated += truncated
        self.dim = dim or self.dim
        for kind, count in skipped.items():
            self.skipped[kind] = self.skipped.get(kind, 0) + count
        left_out = sum(self.skipped.values())
        self.on_progress(Progress("embed", self.texts, self.resumed, self.tokens_here, self.seconds, left_out))

    def refuse_repeated_ids(self, count: int) -> None:
        """Workers see one shard each; only here are all ids together."""
        seen = SeenIds()
        for index in range(count):
            file = part(self.folder, index)
            for key in pq.read_table(file, columns=["id"])["id"].to_pylist() if file.exists() else []:
                if not seen.add(str(key)):
                    problem = f"the id {key!r} occurs in two shards; mend the corpus and embed it into another OUTPUT"
                    raise InputDataError(self.corpus.source, None, problem)

    def finish(self) -> EmbedSummary:
        """Say in the folder that it is whole."""
        if not self.texts:
            raise InputDataError(self.corpus.source, None, "there are no texts to embed; check the input")
        summary = EmbedSummary(
            output=str(self.folder),
            texts=self.texts,
            dim=self.dim,
            precision=self.settings.precision,
            skipped=sum(self.skipped.values()),
            skipped_by_kind=self.skipped,
            truncated=self.truncated,
            tokens=self.tokens,
            seconds=self.seconds,
            tokens_per_second=self.tokens_here / self.seconds if self.seconds else 0.0,
            resumed=self.resumed,
            already_complete=self.resumed == self.texts,
        )
        facts = {"rows": self.texts, "tokens": self.tokens, "truncated": self.truncated, "skipped": self.skipped}
        temporary = self.folder / f"{SUMMARY}.tmp"
        temporary.write_text(json.dumps(self.settings.describe() | facts, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / SUMMARY)
        return summary


def connect(address: str) -> Any:
    """Ray, started or connected to.

    Raises:
        MissingExtraError: It is not installed.
        GircseError: There is none at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report home
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("gircse embed --ray", "ray") from error
    if not ray.is_initialized():
        try:
            options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise GircseError(f"no Ray at {address} ({reason}); start one with: ray start --head") from error
    return ray


def _cut_lines(stream: BinaryIO, shard_size: int, *, blank_lines_say_nothing: bool) -> Iterator[ShardRange]:
    index, start, stop, first, lines, digest = 0, 0, 0, 0, 0, sha256()
    for line in stream:
        # Blank lines at the end of a file are common: they stay with the rows before, and make no shard without rows.
        if lines - first >= shard_size and (line.strip() or not blank_lines_say_nothing):
            yield ShardRange(index, start, stop, first, digest.hexdigest())
            index, start, first, digest = index + 1, stop, lines, sha256()
        digest.update(line)
        stop += len(line)
        lines += 1
    if lines > first:
        yield ShardRange(index, start, stop, first, digest.hexdigest())


def _cut_parquet(stream: BinaryIO, shard_size: int) -> Iterator[ShardRange]:
    size = stream.seek(-8, os.SEEK_END)
    length = int.from_bytes(stream.read(4), "little")
    stream.seek(max(0, size - length))
    footer = sha256(stream.read(length)).hexdigest()
    total = pq.ParquetFile(stream).metadata.num_rows
    for index, start in enumerate(range(0, total, shard_size)):
        stop = min(start + shard_size, total)
        yield ShardRange(index, start, stop, start, sha256(f"{footer} {start} {stop}".encode()).hexdigest())


def _parquet_rows(file: pq.ParquetFile, start: int, stop: int, names: list[str]) -> Iterator[dict[str, Any]]:
    before = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        low, high = max(start - before, 0), min(stop - before, count)
        if low < high:
            yield from file.read_row_group(group, columns=names).slice(low, high - low).to_pylist()
        before += count


def _as_text(value: Any) -> str:
    """What JSON has no word for; bytes that are not UTF-8 become half surrogates, which the reader refuses by row."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _count_rows(shards: list[ShardRange], corpus: Corpus) -> int:
    last = shards[-1]
    if corpus.input_format == "parquet":
        return last.stop
    return last.first + corpus.read(last).rstrip(b"\n").count(b"\n") + 1


def _rows_of(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for values in zip(*batch.values(), strict=True):
        yield {
            name: getattr(value, "item", lambda value=value: value)() for name, value in zip(batch, values, strict=True)
        }
