"""`gircse ask`: an answer as it is written, and the passages it cites. The work is `gircse.search.answer`'s."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from gircse.cli.common import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    InstructionOption,
    JsonOption,
    ModelOption,
    printable,
    shortened,
    stderr,
    without_control,
)
from gircse.cli.search import IndexArgument, WhereOption, load_index_model, open_index
from gircse.errors import UsageError
from gircse.search import DEFAULT_CONTEXT_TOKENS, DEFAULT_MAX_TOKENS, DEFAULT_MIN_SIMILARITY

if TYPE_CHECKING:
    from gircse.search.answer import Passage

_WRITER = "Writer"


def ask(
    index: IndexArgument,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question.")],
    top: Annotated[int, typer.Option(min=1, help="Passages at most.")] = 3,
    where: WhereOption = None,
    min_score: Annotated[
        float, typer.Option(help="Cosine similarity to the question below which a passage is not relevant.")
    ] = DEFAULT_MIN_SIMILARITY,
    instruction: InstructionOption = None,
    context_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of all passages together.", rich_help_panel=_WRITER)
    ] = DEFAULT_CONTEXT_TOKENS,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer in tokens.", rich_help_panel=_WRITER)
    ] = DEFAULT_MAX_TOKENS,
    llm: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="OpenAI-compatible endpoint that writes instead; GIRCSE_LLM_API_KEY is sent as its key.",
            rich_help_panel=_WRITER,
        ),
    ] = None,
    llm_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The endpoint's model.", rich_help_panel=_WRITER)
    ] = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Answer a question from an index, with numbered citations to its passages.

    The backbone that embeds also writes, on the same weights in memory, with the
    embedding adapter switched off. A small one writes modest answers: the passages
    under the answer are what counts; --llm has any OpenAI-compatible endpoint write.
    Where no passage reaches --min-score, nothing is written but that.

    [bold]Examples[/bold]

      gircse ask articles.index "How do plants make their food?"
      gircse ask articles.index "Who won?" --where "topic = 'sports'" --json
      gircse ask articles.index "Who won?" --llm http://localhost:11434/v1 --llm-model qwen3:8b
    """
    if (llm is None) != (llm_model is None):
        raise UsageError("--llm and --llm-model belong together; give both or none")
    found = open_index(index)
    found.check(question, where)
    loaded = load_index_model(found, model, device=device, dtype=dtype, pack=llm is not None)

    from gircse.search import answer as work
    from gircse.search.endpoint import EndpointWriter

    backbone = work.BackboneWriter(loaded.encoder, max_tokens)
    writer = backbone if llm is None or llm_model is None else EndpointWriter(llm, llm_model, max_tokens)
    result = work.ask(
        found,
        question,
        writer,
        count_tokens=backbone.count_tokens,
        top=top,
        where=where,
        instruction=instruction,
        min_similarity=min_score,
        context_tokens=context_tokens,
    )
    pieces: list[str] = []
    for piece in result.pieces:
        pieces.append(piece)
        if not json_output:
            sys.stdout.write(without_control(piece))
            sys.stdout.flush()
    text = "".join(pieces).strip()
    cited = work.cited(text, result.passages)
    if json_output:
        facts: dict[str, Any] = {
            "question": question,
            "answer": text,
            "found": bool(result.passages),
            "best_similarity": result.best_similarity,
            "passages": [_as_json(passage, passage in cited) for passage in result.passages],
        }
        print(json.dumps(facts, ensure_ascii=False, allow_nan=False))
        return
    print()
    if not result.passages and result.best_similarity is not None:
        best = f"the best passage has a similarity of {result.best_similarity:.3f}, --min-score is {min_score:g}"
        stderr.print(best, highlight=False, soft_wrap=True)
    _print_sources(result.passages, cited)


def _print_sources(passages: list[Passage], cited: list[Passage]) -> None:
    """What was read, and what of it the answer cites (bold)."""
    console = Console(highlight=False, soft_wrap=True)
    for passage in passages:
        style = "bold" if passage in cited else "dim"
        name, text = printable(passage.hit.chunk_id), printable(shortened(passage.text))
        console.print(f"[{style}]\\[{passage.number}][/]  {passage.hit.similarity:.3f}  [cyan]{name}[/]  {text}")


def _as_json(passage: Passage, is_cited: bool) -> dict[str, Any]:
    hit = passage.hit
    return {
        "number": passage.number,
        "cited": is_cited,
        "document_id": hit.document_id,
        "chunk_id": hit.chunk_id,
        "similarity": hit.similarity,
        "text": passage.text,
        "metadata": hit.metadata,
    }
