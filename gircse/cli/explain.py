"""`gircse explain`: what each soft token is made of."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gircse.cli.common import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    InstructionOption,
    JsonOption,
    ModelOption,
    NumStepsOption,
    load_model,
)  # fmt: skip
from gircse.errors import UsageError

if TYPE_CHECKING:
    from gircse.explanation import SoftTokenContent


def explain(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text.")],
    instruction: InstructionOption = None,
    num_steps: NumStepsOption = None,
    top: Annotated[int, typer.Option(min=1, help="Vocabulary tokens listed a step.")] = 5,
    model: ModelOption = None,
    backbone: Annotated[
        str | None, typer.Option(help="An untrained model over this decoder instead, to compare with.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Which vocabulary tokens each soft token is made of, and how far each step moves the embedding.

    [bold]Examples[/bold]

      gircse explain "who wrote Hamlet?" --instruction "Given a question, retrieve passages that answer it"
      gircse explain "the food was cold and the staff rude" --instruction "Represent the sentiment" --top 8
      gircse explain "who wrote Hamlet?" --num-steps 20 --json
      gircse explain "who wrote Hamlet?" --backbone smollm2-135m
    """
    if not text.strip():
        raise UsageError("the text is empty; give a text to explain")
    loaded = load_model(model, backbone=backbone, device=device, dtype=dtype, num_steps=num_steps)
    steps = loaded.explain(text, instruction=instruction, top=top)
    if json_output:
        print(json.dumps({"text": text, "instruction": instruction, "steps": [asdict(step) for step in steps]}))
    else:
        Console().print(soft_token_table(steps))


def soft_token_table(steps: list[SoftTokenContent]) -> Table:
    """A row a soft token: its tokens with weights, its entropy, and how far it moved the embedding."""
    table = Table(
        "step", "made of", "entropy (nats)", "moved the vector by", box=None, pad_edge=False, header_style="bold"
    )
    for step in steps:
        content = "  ".join(
            f"{escape(show_token(token))} [dim]{weight:.2f}[/]"
            for token, weight in zip(step.tokens, step.weights, strict=True)
        )
        moved = "" if step.movement is None else f"{step.movement:.4f}"
        table.add_row(str(step.step), content, f"{step.entropy:.2f}", moved)
    return table


def show_token(token: str) -> str:
    """A token with its white space visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
