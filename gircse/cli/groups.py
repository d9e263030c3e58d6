"""What `gircse classify` and `gircse cluster` share: reading texts, their true labels, and writing a row a text."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gircse.cli.common import stderr
from gircse.embed import InputFormat
from gircse.errors import InputDataError, UsageError

OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUTPUT", help="A row a text, .jsonl or .csv.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT.")]


@dataclass(frozen=True)
class Texts:
    """What was read.

    Attributes:
        ids: Of the rows.
        texts: Of the rows.
        labels: Of the rows, as text, where a column of them was asked for.
    """

    ids: list[int | str]
    texts: list[str]
    labels: list[str]


def read_texts(
    source: str,
    input_format: InputFormat | None,
    column: str,
    id_column: str | None = None,
    label_column: str | None = None,
) -> Texts:
    """All rows of a file.

    Raises:
        InputDataError: A row is unusable, has no label in that column, or there is none.
        UsageError: Plain text has no columns.
    """
    from gircse.embed.reader import MEND, CorpusReader

    reader = CorpusReader(source, input_format, column=column, id_column=id_column, advice=MEND)
    if label_column is not None and reader.format == "txt":
        raise UsageError(f"{source} is plain text and has no column {label_column!r}; give a .jsonl, .csv or .parquet")
    reader.all_columns = label_column is not None
    rows = list(reader)
    if not rows:
        raise InputDataError(source, None, "holds no texts; there is nothing to do")
    labels = []
    for row in rows if label_column is not None else []:
        label = (row.cells or {}).get(label_column or "")
        if not isinstance(label, str | int) or not str(label).strip():
            what = "missing" if label is None else f"{label!r}, not a name or a whole number"
            raise InputDataError(source, row.line, f"the label in column {label_column!r} is {what}; {MEND}")
        labels.append(str(label))
    return Texts([row.id for row in rows], [row.text for row in rows], labels)


def check_output(output: Path | None, overwrite: bool) -> None:
    """Refuse an output of an unknown kind, or one that is there; before a model is loaded.

    Raises:
        UsageError: It says so in a line.
    """
    if output is None:
        if overwrite:
            raise UsageError("--overwrite replaces OUTPUT; name it with -o")
        return
    if output.suffix.lower() not in (".jsonl", ".csv"):
        raise UsageError(f"{output}: OUTPUT must end in .jsonl or .csv")
    if not output.parent.is_dir():
        raise UsageError(f"{output}: there is no folder {output.parent}; make it first")
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists: choose another OUTPUT, or replace it with --overwrite")


def write_rows(output: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a row a text; the file is there whole, or not at all."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.partial")
    rows = list(rows)
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            if output.suffix.lower() == ".csv":
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    stderr.print(f"{output}: {len(rows):,} rows", markup=False, highlight=False, soft_wrap=True)
