"""`gircse similarity`: two texts, one number."""

from __future__ import annotations

import json
from typing import Annotated

import typer

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


def similarity(
    a: Annotated[str, typer.Argument(metavar="A", help="A text.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    instruction: InstructionOption = None,
    num_steps: NumStepsOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Cosine similarity of two texts, both under the same instruction.

    [bold]Examples[/bold]

      gircse similarity "a cat sleeps" "a kitten naps"
      gircse similarity "great food" "awful food" --instruction "Represent the sentiment of the review"
      gircse similarity "a cat sleeps" "a kitten naps" --num-steps 20 --json
    """
    for name, text in (("A", a), ("B", b)):
        if not text.strip():
            raise UsageError(f"text {name} is empty; give two texts")
    loaded = load_model(model, device=device, dtype=dtype, num_steps=num_steps)
    prompt = "" if instruction is None else loaded.format_instruction(instruction)
    vectors = loaded.encode([a, b], prompt=prompt)
    score = float(loaded.similarity(vectors[:1], vectors[1:])[0, 0].clamp(-1, 1))  # rounding may pass 1
    if json_output:
        print(json.dumps({"similarity": score, "instruction": instruction, "num_steps": loaded.num_steps}))
    else:
        print(f"{score:.4f}")
