"""`gircse mine`: add hard negatives to a file of training rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gircse.cli.common import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    check_device,
    concrete_dtype,
    load_model,
    quiet_libraries,
    stderr,
)

if TYPE_CHECKING:
    from gircse.train.mine import MinedTask


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
    dtype: DtypeOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the tasks mined before an interruption.")
    ] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Add hard negatives: passages of the same task that a model finds close to the query, but not too close.

    Rows look like {"task": ..., "instruction": ..., "query": ..., "pos": [...], "neg": [...]}; what is found is put
    before the negatives that a row has. Tasks are mined one after the other and kept in OUTPUT.parts until the output
    is written: stopped or killed, the same command with --resume goes on after the last one.

    [bold]Examples[/bold]

      gircse mine data/train/medquad.jsonl.zst -o data/train/medquad-mined.jsonl.zst
      gircse mine rows.jsonl -o mined.jsonl --encoder all-minilm-l6-v2 --negatives 8
    """
    from gircse.errors import UsageError

    if model is not None and encoder is not None:
        raise UsageError("give either --model (a GIRCSE model) or --encoder (any SentenceTransformer), not both")
    with stderr.status("importing the miner"):
        from gircse.checksum import vectors_checksum
        from gircse.train.mine import mine_file
    if encoder is None:
        miner = load_model(model, device=device, dtype=dtype)
        name = vectors_checksum(miner.encoder)
    else:
        import torch

        from gircse.other_models import load_other_model

        check_device(device)
        weights = getattr(torch, concrete_dtype(dtype, device))
        with stderr.status(f"loading {encoder}"), quiet_libraries():
            miner, name = load_other_model(encoder, device=device, dtype=weights), encoder
    rows: dict[str, int] = {}

    def show(mined: MinedTask) -> None:
        rows[mined.task] = mined.rows
        counts = f"{mined.rows_with_negatives} of {mined.rows} rows got negatives"
        stderr.print(f"{mined.task}: {counts} (task {mined.number} of {mined.tasks})", highlight=False, markup=False)

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
            resume=resume,
            model_name=name,
            report=show,
        )
    if json_output:
        print(json.dumps({"output": str(output), "rows": rows, "rows_with_negatives": found}))
