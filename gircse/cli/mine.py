"""`gircse mine`: add hard negatives to a file of training rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gircse.cli.common import DebugOption, DeviceOption, JsonOption, ModelOption, load_model, quiet_libraries, stderr


def mine(
    source: Annotated[Path, typer.Argument(metavar="ROWS", help="A .jsonl, .jsonl.zst or .parquet file of rows.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .jsonl or .jsonl.zst file.")],
    model: ModelOption = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Any SentenceTransformer (a folder, a hub id or all-minilm-l6-v2) instead of a GIRCSE model."
        ),
    ] = None,
    negatives: Annotated[int, typer.Option(min=1, help="Add at most this many a row.")] = 4,
    skip_top: Annotated[int, typer.Option(min=0, help="Leave out the nearest candidates: often answers too.")] = 0,
    search_depth: Annotated[int, typer.Option(min=1, help="Look at this many of the nearest candidates.")] = 50,
    margin: Annotated[
        float, typer.Option(min=0, help="Leave out candidates above (1 - margin) times the positive's similarity.")
    ] = 0.05,
    symmetric: Annotated[
        list[str] | None, typer.Option(help="A task whose passages carry the instruction too; repeatable.")
    ] = None,
    device: DeviceOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Add hard negatives: passages of the same task that a model finds close to the query, but not too close.

    Rows look like {"task": ..., "instruction": ..., "query": ..., "pos": [...], "neg": [...]}; what is found is put
    before the negatives that a row has.

    [bold]Examples[/bold]

      gircse mine data/train/medquad.jsonl.zst -o data/train/medquad-mined.jsonl.zst
      gircse mine rows.jsonl -o mined.jsonl --encoder all-minilm-l6-v2 --negatives 8
    """
    from gircse.errors import UsageError

    if model is not None and encoder is not None:
        raise UsageError("give either --model (a GIRCSE model) or --encoder (any SentenceTransformer), not both")
    with stderr.status("importing the miner"):
        from gircse.train.mine import mine_file
    if encoder is None:
        miner = load_model(model, device=device)
    else:
        from gircse.other_models import load_other_model

        with stderr.status(f"loading {encoder}"), quiet_libraries():
            miner = load_other_model(encoder, device=device)
    with quiet_libraries(), stderr.status("mining"):
        found = mine_file(
            source,
            output,
            miner,
            negatives=negatives,
            skip_top=skip_top,
            search_depth=search_depth,
            margin=margin,
            symmetric_tasks=frozenset(symmetric or ()),
            overwrite=overwrite,
        )
    if json_output:
        print(json.dumps({"output": str(output), "rows_with_negatives": found}))
    else:
        for task, count in found.items():
            stderr.print(f"{task}: {count} rows got negatives", highlight=False)
