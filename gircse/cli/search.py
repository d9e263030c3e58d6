"""`gircse search`: the command's options and how hits are printed. The work is `gircse.search`'s."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from gircse.cli.common import (
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    InstructionOption,
    JsonOption,
    ModelOption,
    NumStepsOption,
    Quantize,
    QuantizeOption,
    load_model,
    printable,
    shortened,
    stderr,
)
from gircse.search import DEFAULT_CANDIDATES, SearchMode

if TYPE_CHECKING:
    from gircse.model import GIRCSE
    from gircse.search.search import SearchHit, SearchIndex

IndexArgument = Annotated[Path, typer.Argument(metavar="INDEX", help="Folder that gircse index made.")]
WhereOption = Annotated[
    str | None, typer.Option("--where", help="SQL condition over metadata, such as \"language = 'English'\".")
]


def search(
    index: IndexArgument,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What is asked.")],
    top: Annotated[int, typer.Option(min=1, help="Documents shown.")] = 10,
    mode: Annotated[SearchMode, typer.Option(help="By meaning (vector), words (text), or both.")] = "hybrid",
    where: WhereOption = None,
    chunks: Annotated[bool, typer.Option("--chunks", help="Show chunks instead of documents.")] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare every vector even where the index is approximate.")
    ] = False,
    rerank_steps: Annotated[
        int | None, typer.Option(min=0, help="Rank the candidates again with so many refinement steps.")
    ] = None,
    candidates: Annotated[
        int, typer.Option(min=1, help="Chunks ranked again; also the depth of both rankings in hybrid search.")
    ] = DEFAULT_CANDIDATES,
    instruction: InstructionOption = None,
    num_steps: NumStepsOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Search an index by meaning, by words (BM25), or by both.

    The index knows its model, prompt and refinement steps: they need not be given, and
    others are refused. The instruction is the query's own. Hybrid search merges both
    rankings by reciprocal ranks. A document's score is that of its best chunk.

    [bold]Examples[/bold]

      gircse search articles.index "how do plants eat?"
      gircse search articles.index "photosynthesis" --mode text --where "language = 'English'"
      gircse search articles.index "how do plants eat?" --rerank-steps 20 --json
    """
    found = open_index(index)
    found.check(query, where, num_steps)
    if mode != "text" or rerank_steps is not None:
        load_index_model(found, model, device=device, dtype=dtype, quantize=quantize)
    hits = found.search(
        query,
        mode=mode,
        top=top,
        where=where,
        instruction=instruction,
        num_steps=num_steps,
        chunks=chunks,
        exact=exact,
        rerank_steps=rerank_steps,
        candidates=candidates,
    )
    if json_output:
        facts = {"query": query, "mode": mode, "num_steps": found.manifest.settings.num_steps, "hits": as_json(hits)}
        print(json.dumps(facts, ensure_ascii=False, allow_nan=False))
        return
    console = Console(highlight=False, soft_wrap=True)
    for rank, hit in enumerate(hits, start=1):
        shown = hit.chunk_id if chunks else hit.document_id
        console.print(
            f"[bold]{rank:>3}[/]  {hit.score:.4f}  [cyan]{printable(shown)}[/]  {printable(shortened(hit.text))}"
        )
    if not hits:
        stderr.print("nothing found", highlight=False)


def open_index(folder: Path) -> SearchIndex:
    """An index, and a word where it is unfinished.

    Raises:
        UsageError: There is no index.
    """
    from gircse.search.search import SearchIndex

    index = SearchIndex(folder)
    if not index.manifest.complete:
        words = "" if index.table.has_text_index else "; until then words do not count, only meaning does"
        message = f"{folder} is unfinished: run gircse index again{words}"
        stderr.print(message, markup=False, highlight=False, soft_wrap=True)
    return index


def load_index_model(
    index: SearchIndex,
    model: str | None,
    *,
    device: str | None,
    dtype: Dtype,
    quantize: Quantize | None = None,
    pack: bool = True,
) -> GIRCSE:
    """The model that made an index, loaded as `load_model` does; one that a person names must be that one.

    Raises:
        GircseError: It is another one, or is not to be had.
    """
    name = model or index.manifest.settings.model
    loaded = load_model(name, device=device, dtype=dtype, quantize=quantize, pack=pack)
    index.use_model(loaded)
    return loaded


def as_json(hits: Sequence[SearchHit]) -> list[dict[str, Any]]:
    """Hits as a program reads them."""
    return [{"rank": rank, **asdict(hit)} for rank, hit in enumerate(hits, start=1)]
