"""`gircse index`: the command's options, its progress bar and its closing words. The work is `gircse.search`'s."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from gircse.cli.common import (
    BatchTokensOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    NumStepsOption,
    QuantizeOption,
    load_model,
    stderr,
)
from gircse.embed import InputFormat
from gircse.errors import UsageError
from gircse.search import DEFAULT_CHUNK_TOKENS, DEFAULT_EXACT_BELOW, TEXT_LANGUAGES

if TYPE_CHECKING:
    from gircse.search.index import IndexProgress, IndexSummary

_LOG_EVERY = 30.0  # seconds between lines where there is no terminal to draw a bar on


def index(
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help=".jsonl, .csv, .parquet, or .txt (a text a line).")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="INDEX", help="Folder of the index.")],
    input_format: Annotated[InputFormat | None, typer.Option(help="What CORPUS is; told by its name.")] = None,
    column: Annotated[str | None, typer.Option(help="Key or header of the text; text where not given.")] = None,
    id_column: Annotated[
        str | None, typer.Option(help="The same of the ids. Row numbers, counted from 1, where not given.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unusable rows out and report them.")] = False,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Longest chunk of a document; {DEFAULT_CHUNK_TOKENS} where not given.")
    ] = None,
    chunk_overlap: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens shared by neighbouring chunks; an eighth of a chunk where not given."),
    ] = None,
    text_language: Annotated[
        str | None,
        typer.Option(
            help=f"Whose word endings full-text search ignores; English where not given. {', '.join(TEXT_LANGUAGES)}."
        ),
    ] = None,
    exact_below: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Chunks from which on vectors are searched approximately; {DEFAULT_EXACT_BELOW:,} where not given.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make the index anew instead of bringing it in step.")
    ] = False,
    keep_others: Annotated[
        bool, typer.Option("--keep-others", help="Keep documents that are not in CORPUS: add to the index.")
    ] = False,
    model: ModelOption = None,
    instruction: Annotated[
        str | None, typer.Option(help="Of the documents; the model's document prompt (none) where not given.")
    ] = None,
    num_steps: NumStepsOption = None,
    batch_tokens: BatchTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a corpus searchable: its texts, their metadata and their vectors in one folder.

    Run again, the index is brought in step with the corpus: documents with a new id or
    another content are embedded, those that are gone are removed, all others are left
    alone. Killed at any moment, the same command goes on. The options of an existing
    index need not be repeated; others than it was made with are refused.

    Every column besides text and id is metadata, which a search can filter by.
    Documents longer than a chunk are cut into overlapping chunks at ends of
    sentences; a document's score in a search is that of its best chunk.

    [bold]Examples[/bold]

      gircse index articles.jsonl -o articles.index --id-column id
      gircse index articles.jsonl -o articles.index              after articles.jsonl has changed
      gircse index today.jsonl -o articles.index --keep-others   adds to it
      gircse index notes.txt -o notes.index --num-steps 1
    """
    from gircse.embed.reader import CorpusReader
    from gircse.search.corpus import DocumentCorpus
    from gircse.search.index import check_folder, index_corpus
    from gircse.search.manifest import Manifest, text_language_named
    from gircse.search.settings import choose_settings, chunk_sizes

    if overwrite and keep_others:
        raise UsageError("--overwrite makes the index anew, and --keep-others adds to it; give one of them")
    check_folder(output)
    made = None if overwrite else Manifest.find(output)
    had = made.settings if made else None
    chunk_sizes(had, chunk_tokens, chunk_overlap)  # refused before the model loads
    language = text_language_named(text_language) if text_language is not None else None
    text_column = column or (had.column if had else "text")
    ids = id_column or (had.id_column if had else None)
    documents = DocumentCorpus(CorpusReader(corpus, input_format, column=text_column, id_column=ids, skip_bad=skip_bad))
    documents.reader.peek()
    with _interruptible(output, overwrite):
        encoder = load_model(model or (had.model if had else None), device=device, dtype=dtype, quantize=quantize)
        settings = choose_settings(
            encoder,
            had,
            instruction=instruction,
            num_steps=num_steps,
            chunk_tokens=chunk_tokens,
            chunk_overlap=chunk_overlap,
            text_language=language,
            column=text_column,
            id_column=ids,
        )
        with _Display() as display:
            summary = index_corpus(
                encoder,
                documents,
                output,
                settings,
                exact_below=exact_below,
                batch_tokens=batch_tokens,
                overwrite=overwrite,
                keep_others=keep_others,
                on_progress=display.update,
            )
    _print_closing_words(summary, str(documents.reader.bad))
    if json_output:
        print(json.dumps(asdict(summary), ensure_ascii=False))


@contextmanager
def _interruptible(output: Path, overwrite: bool) -> Iterator[None]:
    """Say on Ctrl-C what it costs, and how to go on."""
    from gircse.search.manifest import Manifest

    try:
        yield
    except KeyboardInterrupt:
        begun = Manifest.find(output)
        command = "the same command without --overwrite" if overwrite else "the same command"
        kept = begun is not None and not begun.complete
        what = f"what is done is kept in {output}: {command} goes on" if kept else "nothing was done yet"
        stderr.print(f"stopped; {what}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


class _Display:
    """Documents, chunks a second and time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self.bar = ProgressBar(
            TextColumn("indexing"),
            BarColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=stderr,
            disable=not stderr.is_terminal,
        )
        self.task = self.bar.add_task("index", total=None, counts="")
        self.logged = time.monotonic()

    def __enter__(self) -> _Display:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def update(self, progress: IndexProgress) -> None:
        """Show how far the work is."""
        rate = f", {progress.embedded / progress.seconds:,.0f} chunks/s" if progress.seconds else ""
        counts = f"{progress.documents:,}/{progress.total:,} documents, {progress.embedded:,} chunks embedded{rate}"
        self.bar.update(self.task, total=progress.total, completed=progress.documents, counts=counts)
        if not stderr.is_terminal and time.monotonic() - self.logged > _LOG_EVERY:
            self.logged = time.monotonic()
            stderr.print(f"indexing {counts}", highlight=False, soft_wrap=True)


def _print_closing_words(summary: IndexSummary, bad: str) -> None:
    took = timedelta(seconds=round(summary.seconds))
    kind = "approximate" if summary.approximate else "exact"
    what = f"{summary.documents:,} documents in {summary.chunks:,} chunks, {kind} vector search"
    done = f"{summary.added:,} added, {summary.changed:,} changed, {summary.removed:,} removed"
    left = f"{summary.unchanged:,} unchanged; {summary.embedded:,} chunks embedded in {took}"
    lines = [f"{summary.index}: {what}; {done}, {left}"]
    if summary.skipped:
        lines.append(f"bad rows left out: {summary.skipped:,}; {bad}")
    for line in lines:
        stderr.print(line, markup=False, highlight=False, soft_wrap=True)
