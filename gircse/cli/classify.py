"""`gircse classify`: texts into classes. The work is `gircse.groups.classify`'s."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
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
    JsonOption,
    MaxLengthOption,
    ModelOption,
    NumStepsOption,
    QuantizeOption,
    load_model,
    printable,
    shortened,
    stderr,
)
from gircse.cli.groups import OutputOption, OverwriteOption, check_output, read_texts, write_rows
from gircse.errors import InputDataError, UsageError
from gircse.groups import DEFAULT_INSTRUCTION


def classify(
    source: FileArgument,
    labels: Annotated[
        str | None,
        typer.Option("--labels", metavar="NAMES", help="Names, between commas, or a .txt with a name a line."),
    ] = None,
    examples: Annotated[
        str | None, typer.Option("--examples", metavar="FILE", help="Texts with their classes: .jsonl, .csv, .parquet.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option("--label-column", help="Of the classes in --examples; label where not given.")
    ] = None,
    truth: Annotated[
        str | None, typer.Option("--truth", metavar="COLUMN", help="True classes in FILE: says how many were found.")
    ] = None,
    instruction: Annotated[
        str, typer.Option("--instruction", help="What the classes are about.")
    ] = DEFAULT_INSTRUCTION,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    input_format: InputFormatOption = None,
    column: ColumnOption = "text",
    id_column: IdColumnOption = None,
    num_steps: NumStepsOption = None,
    max_length: MaxLengthOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Sort texts into classes: by the names of the classes alone, or by examples of each.

    By names a text goes to the nearest one, and its score is their cosine similarity; by examples a logistic
    regression decides, and the score is its probability. The margin is what the runner-up has less: read the texts
    where it is small.

    [bold]Examples[/bold]

      gircse classify mail.txt --labels "complaint, praise, question"
      gircse classify mail.txt --labels joy,fear --instruction "Identify the emotion"
      gircse classify mail.jsonl --examples sorted.jsonl --label-column team -o out.csv
      gircse classify test.jsonl --labels names.txt --truth label
    """
    if (labels is None) == (examples is None):
        raise UsageError("give the classes: either --labels (their names) or --examples (texts of each)")
    if label_column is not None and examples is None:
        raise UsageError("--label-column is of --examples; the true classes of FILE are --truth")
    check_output(output, overwrite)
    given = read_texts(source, input_format, column, id_column, truth)
    names = [] if labels is None else _names(labels)
    shown = None if examples is None else read_texts(examples, None, column, None, label_column or "label")
    with stderr.status("reading"):
        from gircse.groups.classify import Classifier, check_labels

        check_labels(names if shown is None else list(dict.fromkeys(shown.labels)))
    loaded = load_model(
        model, device=device, dtype=dtype, quantize=quantize, num_steps=num_steps, max_length=max_length
    )
    with stderr.status("reading the classes"):
        if shown is None:
            classifier = Classifier.from_labels(loaded, names, instruction=instruction)
        else:
            classifier = Classifier.from_examples(loaded, shown.texts, shown.labels, instruction=instruction)
    assigned = classifier(given.texts, show_progress_bar=stderr.is_terminal)
    rows = [
        {"id": key, **asdict(own), "text": text}
        for key, text, own in zip(given.ids, given.texts, assigned, strict=True)
    ]
    found = Counter(own.label for own in assigned)
    accuracy = None
    if truth is not None:
        accuracy = sum(own.label == true for own, true in zip(assigned, given.labels, strict=True)) / len(rows)
    if output is not None:
        write_rows(output, rows)
    if json_output:
        facts = {"instruction": instruction, "num_steps": loaded.num_steps, "texts": len(rows), "accuracy": accuracy}
        results = {} if output is not None else {"results": rows}
        print(json.dumps(facts | {"classes": dict(found.most_common())} | results, ensure_ascii=False))
        return
    console = Console(highlight=False, soft_wrap=True)
    for row in rows if output is None else []:
        label = f"[cyan]{printable(row['id'])}[/]  [bold]{printable(row['label'])}[/]"
        console.print(f"{label}  {row['score']:.2f} (+{row['margin']:.2f})  {printable(shortened(row['text']))}")
    for name, count in found.most_common() if output is not None else []:
        console.print(f"{count:>7,}  {printable(name)}")
    if accuracy is not None:
        console.print(f"accuracy {accuracy:.3f} of {len(rows):,}")


def _names(labels: str) -> list[str]:
    """Names between commas, or the lines of a .txt file."""
    if not labels.lower().endswith(".txt"):
        return [name.strip() for name in labels.split(",") if name.strip()]
    try:
        lines = Path(labels).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputDataError(labels, None, f"cannot be read ({reason}); check the path") from error
    return [line.strip() for line in lines if line.strip()]
