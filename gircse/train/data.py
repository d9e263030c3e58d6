"""Training rows: read from JSON lines, drawn by task, laid out in columns for the trainer.

Knows the row format ``{"task", "instruction", "query", "pos": [...], "neg": [...]}``; knows nothing of models.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gircse.encoder import INSTRUCTION_TEMPLATE
from gircse.errors import GircseError, InputDataError, MissingExtraError
from gircse.train.recipe import Recipe, Source

try:
    import zstandard
    from datasets import Dataset, DatasetDict
except ImportError as error:
    raise MissingExtraError("training", "train") from error


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a ``.jsonl`` or ``.jsonl.zst`` file.

    Raises:
        InputDataError: A line is no JSON object, or lacks a field; with file and line.
    """
    opener = zstandard.open if path.suffix == ".zst" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputDataError(
                    str(path), number, f"not JSON ({error.msg}); one object a line is expected"
                ) from None
            if not isinstance(row, dict):
                raise InputDataError(str(path), number, "not a JSON object; one object a line is expected")
            for key, kind in (("task", str), ("instruction", str), ("query", str), ("pos", list)):
                if not isinstance(row.get(key), kind) or not row[key]:
                    raise InputDataError(str(path), number, f"{key!r} must be a non-empty {kind.__name__}")
            if not isinstance(row.setdefault("neg", []), list):
                raise InputDataError(str(path), number, "'neg' must be a list")
            yield row


def source_path(folder: Path, source: Source) -> Path:
    """The file of a source.

    Raises:
        GircseError: It is not there.
    """
    for suffix in (".jsonl.zst", ".jsonl"):
        path = folder / f"{source.file}{suffix}"
        if path.is_file():
            return path
    raise GircseError(f"{folder / source.file}.jsonl(.zst) is not there; name the data folder with --data")


def load_training_data(recipe: Recipe) -> DatasetDict:
    """One data set a source, so that every batch holds one task.

    Columns are ``anchor``, ``positive`` and ``negative_1``...; instructions are already in the texts. The rows and
    their order depend on the files and the seed alone.

    Raises:
        InputDataError: A bad line.
        GircseError: A file is missing, or a source has fewer usable rows than the recipe asks for.
    """
    wanted: dict[Path, list[Source]] = {}
    for source in recipe.data.sources:
        wanted.setdefault(source_path(recipe.data.folder, source), []).append(source)
    datasets: dict[str, Dataset] = {}
    for path, sources in wanted.items():
        rows: dict[str, list[dict[str, Any]]] = {source.task: [] for source in sources}
        for row in read_rows(path):
            if row["task"] in rows:
                rows[row["task"]].append(row)
        for source in sources:
            usable = [row for row in rows[source.task] if len(row["neg"]) >= source.negatives]
            if len(usable) < source.examples:
                raise GircseError(
                    f"{path}: {len(usable)} rows of {source.task} have {source.negatives} negatives, "
                    f"the recipe asks for {source.examples}; lower examples or negatives"
                )
            # A generator of the source's own: adding a source does not change the rows of the others.
            generator = random.Random(f"{recipe.seed}/{source.file}/{source.task}")
            drawn = generator.sample(usable, source.examples)
            datasets[f"{source.file}/{source.task}"] = Dataset.from_list(
                [_columns(row, source, generator) for row in drawn]
            )
    result = DatasetDict()
    result.update(datasets)
    return result


def _columns(row: dict[str, Any], source: Source, generator: random.Random) -> dict[str, str]:
    prompt = INSTRUCTION_TEMPLATE.format(instruction=row["instruction"])
    passage_prompt = prompt if source.symmetric else ""
    columns = {"anchor": prompt + row["query"], "positive": passage_prompt + generator.choice(row["pos"])}
    for index, negative in enumerate(generator.sample(row["neg"], source.negatives), start=1):
        columns[f"negative_{index}"] = passage_prompt + negative
    return columns
