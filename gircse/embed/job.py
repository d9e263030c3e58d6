"""Embeds a corpus shard by shard: rows from a reader, vectors from a model, shards to a folder, one file at the end.

Knows the order of the work and how vectors are stored; knows no terminal and no file format. A shard's vectors depend
on its rows and the settings alone (batches never cross its border), so a shard made again is the same, byte for byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import numpy as np

from gircse._version import __version__
from gircse.batches import DEFAULT_BATCH_TOKENS, plan_batches
from gircse.embed import DEFAULT_SHARD_SIZE, Precision
from gircse.embed.reader import CorpusReader, Row
from gircse.embed.writer import (
    Shard,
    ShardFolder,
    is_complete,
    read_metadata,
    refuse_differences,
    refuse_existing,
    remove_leftovers,
)
from gircse.errors import GircseError, InputDataError, UsageError

INT8_SCALE = 1 / 127
"""What one step of an int8 value stands for: value ≈ int8 × INT8_SCALE.

A constant, so that vectors of different jobs can be compared and the cutting into shards does not matter; and the whole
range of a normalised vector, because decoders put much of its length into a few dimensions, which must not be clipped.
The error of a cosine does not grow with the number of dimensions.
"""


class TextEncoder(Protocol):
    """What a model must offer to embed a corpus; `gircse.GIRCSE` does."""

    def get_embedding_dimension(self) -> int | None:
        """Length of a vector."""
        ...

    def tokenize_texts(self, texts: Sequence[str], prompt: str | None = None, max_length: int | None = None) -> Any:
        """A dataclass with `ids`, the token ids of every prompt + text, and `truncated`, whether the text was cut."""
        ...

    def encode_tokenized(self, tokenized: Any, *, num_steps: int | None = None, batch_tokens: int | None = None) -> Any:
        """(n, d) float32 on the CPU. The same input gives the same bytes."""
        ...


@dataclass(frozen=True)
class EmbedSettings:
    """Everything besides the input that decides the bytes of the output; stored with it, and compared on resume.

    Attributes:
        model: Name or folder as the user gave it.
        model_checksum: Of the weights and configuration, so that a name that now means another model is noticed.
        num_steps: K.
        prompt: Put before every text.
        instruction: What `prompt` was made of, where it was.
        dim: Leading dimensions kept of every vector; all where None.
        precision: How values are stored, see `store_as`.
        max_length: Longest prompt + text in tokens; the model's where None.
        batch_tokens: Padded tokens (soft tokens included) of one batch.
        shard_size: Rows of one shard.
        environment: Device, dtype, threads and versions: what else vectors depend on, in the last bits.
    """

    model: str
    model_checksum: str
    num_steps: int
    prompt: str | None = None
    instruction: str | None = None
    dim: int | None = None
    precision: Precision = "float32"
    max_length: int | None = None
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    shard_size: int = DEFAULT_SHARD_SIZE
    environment: Mapping[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("dim", "max_length", "batch_tokens", "shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be 1 or more, not {value}")
        if self.num_steps < 0:
            raise UsageError(f"num_steps must be 0 or more, not {self.num_steps}")

    def describe(self) -> dict[str, Any]:
        """The settings as one flat JSON object."""
        values = asdict(self)
        environment = values.pop("environment")
        return {**values, **environment, "gircse_version": __version__}


@dataclass(frozen=True)
class Progress:
    """How far the work is.

    Attributes:
        stage: ``embed``, or ``write`` while shards are merged.
        texts: Rows done, those of earlier runs included; while merging, rows merged.
        resumed: Rows that earlier runs had done.
        tokens: Tokens the model read in this run.
        seconds: Time the model took for them.
        skipped: Bad rows left out.
    """

    stage: Literal["embed", "write"]
    texts: int
    resumed: int
    tokens: int
    seconds: float
    skipped: int


@dataclass(frozen=True)
class EmbedSummary:
    """What a run did. `texts`, `truncated`, `tokens` and `skipped` are of the whole output, not of this run alone.

    Attributes:
        output: The file.
        texts: Vectors in it.
        dim: Dimensions of a vector (binary: bits).
        precision: How they are stored.
        skipped: Bad rows left out.
        skipped_by_kind: The same by kind of fault.
        truncated: Texts that were cut to the maximum length.
        tokens: Tokens the model read, prompts included.
        seconds: Wall time of this run.
        tokens_per_second: Of this run, while the model worked; 0 where it did not.
        resumed: Vectors that earlier runs had made.
        already_complete: Nothing was left to do.
    """

    output: str
    texts: int
    dim: int
    precision: str
    skipped: int
    skipped_by_kind: dict[str, int]
    truncated: int
    tokens: int
    seconds: float
    tokens_per_second: float
    resumed: int
    already_complete: bool


def embed_corpus(
    model: TextEncoder,
    reader: CorpusReader,
    output: Path,
    settings: EmbedSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> EmbedSummary:
    """Embed every row of a corpus into one file of L2-normalised vectors, in input order.

    Args:
        model: The encoder.
        reader: The rows.
        output: ``.parquet`` (id, embedding), ``.npy`` or ``.jsonl``.
        settings: What decides the vectors.
        resume: Continue what an earlier run began; start where there is nothing.
        overwrite: Replace an existing output, and throw unfinished work away.
        on_progress: Called after every batch and every shard.

    Returns:
        The summary.

    Raises:
        UsageError: Something is in the way, or unfinished work has other settings.
        InputDataError: A row is unusable, or is not the one that a finished shard was made from.
        GircseError: The disk refuses, or the model returns something that is no number.
    """
    refuse_existing(output, resume=resume, overwrite=overwrite)
    if not reader.is_stream and output.exists() and output.samefile(reader.source):
        raise UsageError(f"{output} is the input itself; choose another OUTPUT")
    width = model.get_embedding_dimension()
    if width is None:
        raise GircseError(f"{settings.model} does not say how many dimensions its vectors have")
    if settings.dim is not None and settings.dim > width:
        raise UsageError(f"dim {settings.dim} is more than the {width} dimensions of {settings.model}")
    run = _Run(model, reader, settings, settings.dim or width, on_progress or (lambda progress: None))
    if resume and is_complete(output):
        summary = run.confirm(output)
        remove_leftovers(output)
        return summary
    with ShardFolder(output, settings.describe() | reader.describe(), restart=overwrite) as folder:
        try:
            run.make_shards(folder)
        except InputDataError as error:
            if not folder.finished:
                raise
            kept = f"{error.problem} (finished shards are kept: afterwards go on with --resume)"
            raise InputDataError(error.source, error.line, kept) from error
        return run.merge(folder)


class _Run:
    """One call of `embed_corpus` and its counts."""

    def __init__(
        self,
        model: TextEncoder,
        reader: CorpusReader,
        settings: EmbedSettings,
        dim: int,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.model, self.reader, self.settings, self.dim, self.on_progress = model, reader, settings, dim, on_progress
        self.shards: list[Shard] = []
        self.texts = self.resumed = self.tokens = 0  # tokens: of this run
        self.model_seconds = 0.0
        self.started = time.perf_counter()

    def make_shards(self, folder: ShardFolder) -> None:
        """Embed every shard that `folder` lacks, and check that the others were made from the rows of today."""
        for index, rows in enumerate(self._shard_rows()):
            checksum = hash_rows(rows)
            shard = folder.find(index)
            if shard is None:
                shard = self._embed_shard(folder, index, rows, checksum)
            elif shard.rows_sha256 == checksum:
                self.resumed += shard.rows
            else:
                self._refuse_input(rows[0].line, f"the {len(rows):,} rows from here are not those embedded before")
            self.shards.append(shard)
            self.texts += shard.rows
            self._report("embed", self.texts)
        if folder.find(len(self.shards)) is not None:
            self._refuse_input(None, "it ends before rows that were embedded before")
        if not self.shards:
            skipped = f" ({self.reader.bad.total:,} bad rows: {self.reader.bad})" if self.reader.bad.total else ""
            raise InputDataError(self.reader.name, None, f"there are no texts to embed{skipped}; check the input")

    def merge(self, folder: ShardFolder) -> EmbedSummary:
        """Write the output."""
        merged = accumulate(shard.rows for shard in self.shards)
        folder.merge(
            len(self.shards),
            self._metadata(),
            # Where rows were left out, positions in a .npy no longer tell which text is which.
            write_ids=self.reader.id_column is not None or self.reader.bad.total > 0,
            on_shard=lambda: self._report("write", next(merged)),
        )
        return self._summary(folder.output)

    def confirm(self, output: Path) -> EmbedSummary:
        """Check that a finished output is the one that this call would make."""
        metadata = read_metadata(output)
        now = self.settings.describe() | self.reader.describe()
        del now["input"]
        refuse_differences(metadata, now, f"{output} is complete, but was made")
        if _combined([hash_rows(rows) for rows in self._shard_rows()]) != metadata["rows_sha256"]:
            self._refuse_input(None, f"it is not what the complete {output} was made from")
        self.texts = self.resumed = metadata["rows"]
        self.shards = [Shard(metadata["rows"], metadata["tokens"], metadata["truncated"], metadata["rows_sha256"])]
        return replace(self._summary(output), already_complete=True)

    def _refuse_input(self, line: int | None, problem: str) -> NoReturn:
        advice = "put the old input back, or start again with --overwrite"
        raise InputDataError(self.reader.name, line, f"the input has changed, {problem}: {advice}")

    def _shard_rows(self) -> Iterator[list[Row]]:
        rows = iter(self.reader)
        while shard := list(islice(rows, self.settings.shard_size)):
            yield shard

    def _embed_shard(self, folder: ShardFolder, index: int, rows: list[Row], checksum: str) -> Shard:
        settings = self.settings
        tokenized = self.model.tokenize_texts([row.text for row in rows], settings.prompt, settings.max_length)
        lengths = [len(ids) for ids in tokenized.ids]
        vectors = np.empty((len(rows), self.dim), dtype=np.float32)
        done = self.texts
        padded = getattr(self.model, "pads_batches", True)
        for batch in plan_batches(lengths, settings.num_steps, settings.batch_tokens, padded=padded):
            vectors[batch] = self._embed_batch(rows, tokenized, batch)
            done += len(batch)
            self.tokens += sum(lengths[place] for place in batch)
            self._report("embed", done)
        shard = Shard(len(rows), sum(lengths), sum(tokenized.truncated), checksum)
        folder.add(index, shard, [row.id for row in rows], store_as(vectors, settings.precision))
        return shard

    def _embed_batch(self, rows: list[Row], tokenized: Any, batch: list[int]) -> np.ndarray:
        start = time.perf_counter()
        part = replace(
            tokenized,
            ids=[tokenized.ids[place] for place in batch],
            truncated=[tokenized.truncated[place] for place in batch],
        )
        settings = self.settings
        encoded = self.model.encode_tokenized(part, num_steps=settings.num_steps, batch_tokens=settings.batch_tokens)
        vectors = np.asarray(encoded, dtype=np.float32)[:, : self.dim]
        self.model_seconds += time.perf_counter() - start
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if broken.size:
            where = f"{self.reader.name}:{rows[batch[int(broken[0])]].line}"
            raise GircseError(
                f"{where}: the vector of this text came out as NaN or infinity; start again with another --dtype"
            )
        return vectors

    def _metadata(self) -> dict[str, Any]:
        described = self.settings.describe() | self.reader.describe()
        del described["input"]  # where it lay is nobody else's business
        return described | {
            "dimensions": self.dim,
            "normalized": True,
            "int8_scale": INT8_SCALE if self.settings.precision == "int8" else None,
            "rows": self.texts,
            "rows_sha256": _combined([shard.rows_sha256 for shard in self.shards]),
            "tokens": sum(shard.tokens for shard in self.shards),
            "truncated": sum(shard.truncated for shard in self.shards),
            "skipped": dict(self.reader.bad.counts),
        }

    def _summary(self, output: Path) -> EmbedSummary:
        return EmbedSummary(
            output=str(output),
            texts=self.texts,
            dim=self.dim,
            precision=self.settings.precision,
            skipped=self.reader.bad.total,
            skipped_by_kind=dict(self.reader.bad.counts),
            truncated=sum(shard.truncated for shard in self.shards),
            tokens=sum(shard.tokens for shard in self.shards),
            seconds=time.perf_counter() - self.started,
            tokens_per_second=self.tokens / self.model_seconds if self.model_seconds else 0.0,
            resumed=self.resumed,
            already_complete=False,
        )

    def _report(self, stage: Literal["embed", "write"], texts: int) -> None:
        self.on_progress(Progress(stage, texts, self.resumed, self.tokens, self.model_seconds, self.reader.bad.total))


def hash_rows(rows: Sequence[Row]) -> str:
    """SHA-256 of ids and texts; lengths go in, so that no two lists of rows run together to the same bytes."""
    digest = sha256()
    for row in rows:
        for value in (str(row.id).encode(), row.text.encode()):
            digest.update(len(value).to_bytes(8, "little"))
            digest.update(value)
    return digest.hexdigest()


def store_as(vectors: np.ndarray, precision: Precision) -> np.ndarray:
    """Normalise vectors to length 1 and store their values.

    Args:
        vectors: (n, d) float32.
        precision: ``float32``; ``float16``; ``int8``, the values divided by `INT8_SCALE`; or ``binary``,
            the signs packed to (n, ceil(d / 8)) int8 as sentence-transformers' ``binary``.
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.where(norms == 0, 1, norms)
    if precision == "int8":
        return np.rint(vectors / INT8_SCALE).astype(np.int8)
    if precision == "binary":
        return (np.packbits(vectors > 0, axis=1) - 128).astype(np.int8)
    return vectors.astype(precision)


def _combined(checksums: Sequence[str]) -> str:
    return sha256("".join(checksums).encode()).hexdigest()
