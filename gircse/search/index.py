"""Brings an index in step with a corpus: new and changed documents are embedded, those that are gone are removed.

Knows the order of the work; knows no terminal, no file format and no LanceDB. A document's chunks are written in one
commit, with the content hash of the whole document: whatever a kill leaves behind, the next run sees which documents
are done, and does the others. So to resume, to update and to repeat are the same call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock, Timeout

from gircse._version import __version__
from gircse.embed.reader import SeenIds
from gircse.errors import GircseError, InputDataError, UsageError
from gircse.search.chunks import split_text
from gircse.search.corpus import Document, DocumentCorpus, as_type, wider
from gircse.search.manifest import IndexSettings, Manifest
from gircse.search.table import Chunk, ChunkTable, check_metadata_names, files_in_words

_LOOKUP_DOCUMENTS = 512  # whose hashes are looked up at once
_LOOKUP_CHARACTERS = 1 << 24  # or earlier, where they are long
_COMMIT_SECONDS = 5.0  # of the model's work: what a kill can cost
_COMMIT_CHUNKS = 32, 4096  # at least, at most
_COMPACT_COMMITS = 64
_CHUNK_SLACK = 16  # a chunk alone may have a few tokens more than it had in its document


class TextEncoder(Protocol):
    """What a model must offer to fill an index; `gircse.GIRCSE` does."""

    tokenizer: Any

    def tokenize_texts(self, texts: Sequence[str], prompt: str | None = None, max_length: int | None = None) -> Any:
        """Token ids of every prompt + text."""
        ...

    def encode_tokenized(self, tokenized: Any, *, num_steps: int | None = None, batch_tokens: int | None = None) -> Any:
        """(n, d) float32 on the CPU."""
        ...


@dataclass(frozen=True)
class IndexProgress:
    """How far the work is.

    Attributes:
        documents: Of the corpus, looked at so far.
        total: Documents of the corpus.
        embedded: Chunks embedded in this run.
        seconds: Time the model took for them.
    """

    documents: int
    total: int
    embedded: int
    seconds: float


@dataclass
class IndexSummary:
    """What a run did.

    Attributes:
        index: The folder.
        documents: In the index now.
        chunks: In the index now.
        added: Documents that were not there.
        changed: Documents whose text or metadata was another.
        unchanged: Documents left alone.
        removed: Documents that are no longer in the corpus.
        embedded: Chunks the model embedded.
        skipped: Bad rows left out.
        approximate: Whether vectors are searched by an approximate index.
        seconds: Wall time.
    """

    index: str
    documents: int = 0
    chunks: int = 0
    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    embedded: int = 0
    skipped: int = 0
    approximate: bool = False
    seconds: float = 0.0


def index_corpus(
    model: TextEncoder,
    corpus: DocumentCorpus,
    folder: Path,
    settings: IndexSettings,
    *,
    exact_below: int | None = None,
    batch_tokens: int | None = None,
    overwrite: bool = False,
    keep_others: bool = False,
    on_progress: Callable[[IndexProgress], None] | None = None,
) -> IndexSummary:
    """Make an index of a corpus, or bring one in step with it. Killed at any moment, the same call goes on.

    Args:
        model: Embeds the chunks.
        corpus: All documents that the index shall hold; others are removed from it.
        folder: The index; made where it is not there.
        settings: Must be those that the index was made with.
        exact_below: Chunks from which on the vectors get an approximate index; as before, or
            `gircse.search.DEFAULT_EXACT_BELOW`, where not given.
        batch_tokens: Padded tokens of a batch of the model.
        overwrite: Make the index anew instead of bringing it in step.
        keep_others: Leave documents in the index that are not in the corpus, whose ids must be names then.
        on_progress: Called now and then.

    Raises:
        UsageError: The index was made with other settings, or the folder holds something else.
        InputDataError: A row of the corpus is unusable; nothing has been written then.
        GircseError: Another run is at work on the index, or a file of it cannot be read or written.
    """
    started = time.monotonic()
    total, metadata = corpus.scan()
    if not total and not (keep_others and Manifest.find(folder)):
        raise InputDataError(corpus.reader.name, None, "holds no documents; an index of it would be empty")
    check_metadata_names(metadata)
    check_folder(folder)
    if keep_others and settings.id_column is None:
        raise UsageError("documents that are added need ids of their own, not row numbers; name their column")
    with files_in_words(folder), _locked(folder):
        unfinished = keep_others and (before := Manifest.find(folder)) is not None and not before.complete
        table, manifest = _prepared(folder, settings, metadata, overwrite)
        manifest = replace(manifest, exact_below=exact_below or manifest.exact_below)
        job = _Job(model, table, manifest, batch_tokens, total, on_progress)
        seen = SeenIds()
        for documents in _groups(corpus):
            for document in documents:
                seen.add(document.id)
            job.take(documents)
        job.flush()
        others = list(dict.fromkeys(name for name in table.document_ids() if seen.add(name)))
        removed = [] if keep_others else others
        table.delete_documents(removed)
        documents = total + len(others) - len(removed)
        if job.commits or removed or not manifest.complete:
            table.compact()
        manifest = _finished(folder, table, manifest, documents, complete=not unfinished)
        skipped = corpus.reader.bad.total
        summary = IndexSummary(str(folder), documents, manifest.chunks, skipped=skipped, removed=len(removed))
    summary.added, summary.changed, summary.unchanged = job.added, job.changed, job.unchanged
    summary.embedded, summary.approximate = job.embedded, table.is_approximate
    summary.seconds = round(time.monotonic() - started, 3)
    return summary


def remove_documents(folder: Path, ids: Iterable[str]) -> int:
    """Take documents out of an index; ids that it does not hold are passed over.

    Returns:
        How many were there.

    Raises:
        UsageError: There is no index.
        GircseError: Another run is at work on it, or a file of it cannot be read or written.
    """
    check_folder(folder)
    Manifest.read(folder)
    with files_in_words(folder), _locked(folder):
        manifest, table = Manifest.read(folder), ChunkTable.open(folder)
        there = set(table.document_ids())
        gone = [name for name in dict.fromkeys(ids) if name in there]
        if gone:
            table.delete_documents(gone)
            table.compact()
            _finished(folder, table, manifest, len(there) - len(gone), complete=manifest.complete)
    return len(gone)


def _finished(folder: Path, table: ChunkTable, manifest: Manifest, documents: int, *, complete: bool) -> Manifest:
    """Bring the table's own indices in step with it, and write down what there is now."""
    table.build_indices(manifest.settings.text_language, manifest.exact_below)
    chunks = table.count_chunks()
    manifest = replace(manifest, complete=complete, documents=documents, chunks=chunks, gircse_version=__version__)
    manifest.write(folder)
    return manifest


@dataclass
class _Job:
    """Documents to chunks to vectors to commits, a bounded number at a time."""

    model: TextEncoder
    table: ChunkTable
    manifest: Manifest
    batch_tokens: int | None
    total: int
    on_progress: Callable[[IndexProgress], None] | None
    new: list[Chunk] = field(default_factory=list)
    other: list[Chunk] = field(default_factory=list)  # of documents that the table holds with another content
    looked_at: int = 0
    added: int = 0
    changed: int = 0
    unchanged: int = 0
    embedded: int = 0
    commits: int = 0
    commit_chunks: int = _COMMIT_CHUNKS[0]
    seconds: float = 0.0

    def take(self, documents: Sequence[Document]) -> None:
        known = self.table.document_hashes([document.id for document in documents])
        for document in documents:
            self.looked_at += 1
            before, now = known.get(document.id), document.content_hash
            if before == now:
                self.unchanged += 1
                continue
            self.added += before is None
            self.changed += before is not None
            (self.new if before is None else self.other).extend(self._chunks(document, now))
            if len(self.new) + len(self.other) >= self.commit_chunks:
                self.flush()

    def flush(self) -> None:
        """Embed and write what has gathered."""
        for chunks, write in ((self.new, self.table.add), (self.other, self.table.replace)):
            if chunks:
                write(chunks, self._embed([chunk.text for chunk in chunks]))
                chunks.clear()
                self.commits += 1
                if self.commits % _COMPACT_COMMITS == 0:
                    self.table.compact()
        if self.on_progress is not None:
            self.on_progress(IndexProgress(self.looked_at, self.total, self.embedded, self.seconds))

    def _chunks(self, document: Document, content_hash: str) -> Iterator[Chunk]:
        settings, types = self.manifest.settings, self.manifest.metadata
        metadata = {name: as_type(value, types[name]) for name, value in document.metadata.items()}
        texts = split_text(document.text, self.model.tokenizer, settings.chunk_tokens, settings.chunk_overlap)
        for number, text in enumerate(texts):
            yield Chunk(document.id, number, content_hash, text, metadata)

    def _embed(self, texts: list[str]) -> np.ndarray:
        started = time.monotonic()
        settings = self.manifest.settings
        vectors = embed_chunks(self.model, texts, settings, settings.num_steps, self.batch_tokens)
        took = time.monotonic() - started
        self.embedded += len(texts)
        self.seconds += took
        least, most = _COMMIT_CHUNKS
        self.commit_chunks = min(max(int(len(texts) * _COMMIT_SECONDS / max(took, 1e-9)), least), most)
        return vectors


def embed_chunks(
    model: TextEncoder, texts: Sequence[str], settings: IndexSettings, num_steps: int, batch_tokens: int | None = None
) -> np.ndarray:
    """The vectors of chunks as an index with these settings holds them: (n, d) float32 of length 1."""
    prompt = settings.document_prompt
    longest = len(model.tokenize_texts([""], prompt).ids[0]) + settings.chunk_tokens + _CHUNK_SLACK
    tokenized = model.tokenize_texts(texts, prompt, longest)
    return normalized(model.encode_tokenized(tokenized, num_steps=num_steps, batch_tokens=batch_tokens))


def normalized(vectors: Any) -> np.ndarray:
    """(n, d) float32 of length 1."""
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _groups(corpus: DocumentCorpus) -> Iterator[list[Document]]:
    group: list[Document] = []
    characters = 0
    for document in corpus:
        group.append(document)
        characters += len(document.text)
        if len(group) == _LOOKUP_DOCUMENTS or characters >= _LOOKUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _prepared(
    folder: Path, settings: IndexSettings, metadata: dict[str, Any], overwrite: bool
) -> tuple[ChunkTable, Manifest]:
    """The table, its columns in step with the corpus, and a manifest that says the index is being worked on."""
    manifest = None if overwrite else Manifest.find(folder)
    if manifest is None:
        # The manifest comes last: a table without one is a leftover, which `create` drops.
        Manifest.remove(folder)
        table = ChunkTable.create(folder, settings.dimension, metadata)
        manifest = Manifest(settings, metadata)
        manifest.write(folder)
        return table, manifest
    if different := manifest.settings.differences(settings):
        raise UsageError(
            f"{folder} was made with other settings: {', '.join(different)}; "
            "leave those options out, or make the index anew with --overwrite"
        )
    columns = {**metadata, **manifest.metadata}
    for name, kind in metadata.items():
        had = columns[name]
        columns[name] = wider(had, kind)
        if columns[name] != had and (had, kind) != ("int64", "double"):
            raise UsageError(
                f"column {name!r} of {folder} holds {had}, and the corpus now has {kind} in it; "
                "mend the corpus, or make the index anew with --overwrite"
            )
    table = ChunkTable.open(folder)
    table.fit_columns(columns)
    manifest = replace(manifest, metadata=columns)
    replace(manifest, complete=False).write(folder)
    return table, manifest


def check_folder(folder: Path) -> None:
    """Never write into a folder of other things.

    Raises:
        UsageError: There is a file of that name, or the folder holds something else than an index.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; an index is a folder: choose another name")
    names = {entry.name for entry in folder.iterdir()}
    if names and not names <= {"manifest.json", "manifest.json.new", "chunks.lance", ".lock"}:
        raise UsageError(f"{folder} holds other things than an index; choose a new folder")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise GircseError(f"another gircse index is at work on {folder}; wait for it or stop it") from error
    except OSError as error:
        raise GircseError(f"no index can be written to {folder} ({error.strerror}); choose another folder") from error
    try:
        yield
    finally:
        lock.release()
