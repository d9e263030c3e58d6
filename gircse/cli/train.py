"""`gircse train`: run a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gircse.cli.common import DebugOption, JsonOption, stderr


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see recipes/.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the trained model and its checkpoints.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the training files, instead of the recipe's.")] = None,
    num_steps: Annotated[
        int | None, typer.Option(min=0, help="K, instead of the recipe's; 0 trains the encoder-only baseline.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train an embedding model with Iterative Contrastive Refinement.

    Checkpoints are written as the recipe says; stopped or killed, the same command with --resume goes on from the last
    one. The losses of the single steps L_1..L_K are logged to OUTPUT/log.jsonl.

    [bold]Examples[/bold]

      gircse train recipes/smollm2-135m-first.yaml --data data/train -o runs/first
      gircse train recipes/smollm2-135m-first.yaml --data data/train -o runs/first --resume
      gircse train recipes/smollm2-135m-first.yaml --data data/train -o runs/first-k0 --num-steps 0
    """
    with stderr.status("importing the trainer"):
        from gircse.train.recipe import load_recipe
        from gircse.train.run import train as run
    overrides: dict[str, Any] = {}
    if data is not None:
        overrides["data.folder"] = str(data)
    if num_steps is not None:
        overrides["model.num_steps"] = num_steps

    def log(entry: dict[str, float]) -> None:
        output.mkdir(parents=True, exist_ok=True)
        with (output / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    model = run(load_recipe(recipe, overrides), output, resume=resume, report=log)
    if json_output:
        print(json.dumps({"output": str(output), "num_steps": model.num_steps}))
    else:
        stderr.print(f'saved to {output}; try: gircse similarity --model {output} "one text" "another"')
