"""`gircse merge`: the mean of trained models as a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gircse.cli.common import DebugOption, JsonOption, backbone_of, prepare_backbone, quiet_libraries, stderr


def merge(
    models: Annotated[list[str], typer.Argument(metavar="MODEL MODEL...", help="Folders or hub ids, two or more.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the merged model.")],
    weights: Annotated[
        str | None, typer.Option(help="Of each model, separated by commas, e.g. 0.7,0.3; equal ones where not given.")
    ] = None,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Average the weights of models that were trained from one start, such as two stages of a training.

    What the later one has lost comes back, at a part of what it has gained: score the result before it is used. K, the
    prompts and the longest prompt are the first model's.

    [bold]Examples[/bold]

      gircse merge runs/first runs/second -o runs/mean
      gircse merge runs/first runs/second -o runs/mean --weights 0.2,0.8
    """
    from gircse.errors import UsageError

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} is there already; choose another folder")
    try:
        shares = None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise UsageError(f"--weights {weights}: numbers separated by commas are wanted, e.g. 0.7,0.3") from None
    with stderr.status("importing"):
        from gircse.merge import merge_models, merging_shares

    merging_shares(shares, len(models))  # before anything is fetched
    prepare_backbone(backbone_of(models[0]))
    with stderr.status("merging"), quiet_libraries():
        merged = merge_models(models, shares)
        merged.save_pretrained(str(output))
    parts = [{key: part[key] for key in ("model", "weight")} for part in merged.encoder.training_facts["merged"]]
    if json_output:
        print(json.dumps({"output": str(output), "models": parts}))
    else:
        shown = " + ".join(f"{part['weight']:.3g} · {part['model']}" for part in parts)
        stderr.print(f"{output}: {shown}", highlight=False, markup=False)
