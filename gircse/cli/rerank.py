"""`gircse rerank`: texts from a file, ranked by a query. The work is `gircse.search.rerank`'s."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from gircse.cli.common import (
    ColumnOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    FileArgument,
    IdColumnOption,
    InputFormatOption,
    InstructionOption,
    JsonOption,
    ModelOption,
    NumStepsOption,
    QuantizeOption,
    load_model,
    printable,
    shortened,
)
from gircse.errors import InputDataError


def rerank(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What is asked.")],
    source: FileArgument,
    input_format: InputFormatOption = None,
    column: ColumnOption = "text",
    id_column: IdColumnOption = None,
    top: Annotated[int | None, typer.Option(min=1, help="Texts shown; all where not given.")] = None,
    instruction: InstructionOption = None,
    num_steps: NumStepsOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Rank texts by their similarity to a query, as the second stage of any search.

    Few texts can afford many refinement steps: find candidates with few, rank them here
    with more. A text longer than a chunk is scored by its best chunk.

    [bold]Examples[/bold]

      gircse rerank "how do plants eat?" candidates.txt --num-steps 20
      grep -i plant notes.txt | gircse rerank "how do plants eat?" - --top 3
    """
    from gircse.embed.reader import MEND, CorpusReader

    rows = list(CorpusReader(source, input_format, column=column, id_column=id_column, advice=MEND))
    if not rows:
        raise InputDataError(source, None, "holds no texts; there is nothing to rank")
    loaded = load_model(model, device=device, dtype=dtype, quantize=quantize)

    from gircse.search.rerank import rerank as rank

    ranked = rank(loaded, query, [row.text for row in rows], instruction=instruction, num_steps=num_steps, top=top)
    if json_output:
        results = [{"rank": place, "id": rows[r.index].id, **asdict(r)} for place, r in enumerate(ranked, start=1)]
        steps = loaded.num_steps if num_steps is None else num_steps
        print(json.dumps({"query": query, "num_steps": steps, "results": results}, ensure_ascii=False))
        return
    console = Console(highlight=False, soft_wrap=True)
    for place, result in enumerate(ranked, start=1):
        name = printable(rows[result.index].id)
        console.print(f"[bold]{place:>3}[/]  {result.score:.4f}  [cyan]{name}[/]  {printable(shortened(result.text))}")
