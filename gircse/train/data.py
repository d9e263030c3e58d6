"""Training rows: read from JSON lines, drawn by task, laid out in columns for the trainer.

Knows the row format ``{"task", "instruction", "query", "pos": [...], "neg": [...]}``; knows nothing of models.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gircse.encoder import INSTRUCTION_TEMPLATE
from gircse.errors import GircseError, InputDataError, MissingExtraError, UsageError
from gircse.train.recipe import Recipe, Source

try:
    import zstandard
    from datasets import Array2D, Dataset, DatasetDict
except ImportError as error:
    raise MissingExtraError("training", "train") from error

Teacher = Callable[[list[str]], np.ndarray]
"""Embeddings (n, width) of texts, by a model that is taught from."""


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a ``.jsonl``, ``.jsonl.zst`` or ``.parquet`` file.

    Raises:
        InputDataError: The file cannot be read, or a row is no JSON object or lacks a field; with file and line.
    """
    try:
        yield from _checked_rows(_raw_rows(path), str(path))
    except (OSError, UnicodeDecodeError, zstandard.ZstdError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputDataError(str(path), None, f"cannot be read ({reason}); check the file") from error


def _checked_rows(rows: Iterable[str | dict[str, Any]], source: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows, start=1):
        if isinstance(row, str):
            try:
                row = json.loads(row)
            except json.JSONDecodeError as error:
                raise InputDataError(source, number, f"not JSON ({error.msg}); one object a line is expected") from None
        if not isinstance(row, dict):
            raise InputDataError(source, number, "not a JSON object; one object a line is expected")
        for key, kind in (("task", str), ("instruction", str), ("query", str), ("pos", list)):
            if not isinstance(row.get(key), kind) or not row[key]:
                raise InputDataError(source, number, f"{key!r} must be a non-empty {kind.__name__}")
        row["neg"] = [] if row.get("neg") is None else row["neg"]
        for key in ("pos", "neg"):
            if not isinstance(row[key], list) or not all(isinstance(text, str) for text in row[key]):
                raise InputDataError(source, number, f"{key!r} must be a list of texts")
        yield row


def _raw_rows(path: Path) -> Iterator[str | dict[str, Any]]:
    """Lines of text, or rows of a table."""
    if path.suffix == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    opener = zstandard.open if path.suffix == ".zst" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        yield from lines


def source_path(folder: Path, source: Source) -> Path:
    """The file of a source.

    Raises:
        GircseError: It is not there.
    """
    if source.file is None:
        raise UsageError(f"{source.hub} is on the hub, not a file")
    for suffix in (".jsonl.zst", ".jsonl", ".parquet"):
        path = folder / f"{source.file}{suffix}"
        if path.is_file():
            return path
    raise GircseError(
        f"{folder / source.file} is not there as .jsonl.zst, .jsonl or .parquet; name the data folder with --data"
    )


def load_training_data(recipe: Recipe, teacher: Teacher | None = None) -> DatasetDict:
    """One data set a source, so that every batch holds one task.

    Columns are ``anchor``, ``positive`` and ``negative_1``...; instructions are already in the texts. The rows and
    their order depend on the files and the seed alone.

    Args:
        recipe: Says which rows.
        teacher: Its embeddings of each row's texts, without instructions, become the column ``label``,
            (columns, width), of the sources that it has a say in.

    Raises:
        InputDataError: A bad line.
        GircseError: A file is missing, or a source has fewer usable rows than the recipe asks for.
    """
    usable = usable_rows(recipe)
    counts = example_counts(recipe, [len(rows) for rows in usable])
    result = DatasetDict()
    for source, rows, count in zip(recipe.data.sources, usable, counts, strict=True):
        if len(rows) < count:
            raise GircseError(
                f"{source.name}: {len(rows)} rows of {source.task} have {source.negatives} negatives, the recipe asks "
                f"for {count}; lower examples or negatives"
            )
        if not count:
            continue
        # A generator of the source's own: adding a source does not change the rows of the others.
        generator = random.Random(f"{recipe.seed}/{source.name}")
        drawn = generator.sample(rows, count)
        texts = [_texts(row, source, rows, generator) for row in drawn]
        rows = Dataset.from_list([_columns(row, source, own) for row, own in zip(drawn, texts, strict=True)])
        if teacher is not None and source.teacher:
            vectors = teacher([text for own in texts for text in (own[:1] * 2 if source.teacher == "anchor" else own)])
            labels = vectors.astype(np.float32).reshape(count, len(texts[0]), -1)  # (rows, columns, width)
            rows = rows.add_column("label", labels.tolist(), feature=Array2D(labels.shape[1:], "float32"))
        result[source.name] = rows
    return result


def usable_rows(recipe: Recipe) -> list[list[dict[str, Any]]]:
    """For every source of the recipe, its task's rows that have enough negatives. Each file is read once."""
    wanted: dict[Path, dict[str, list[dict[str, Any]]]] = {}
    for source in recipe.data.sources:
        if source.file is not None:
            wanted.setdefault(source_path(recipe.data.folder, source), {})[str(source.task)] = []
    for path, tasks in wanted.items():
        for row in read_rows(path):
            if row["task"] in tasks:
                tasks[row["task"]].append(row)
    return [
        _hub_rows(source, recipe.seed)
        if source.file is None
        else [row for row in wanted[source_path(recipe.data.folder, source)][str(source.task)] if _usable(row, source)]
        for source in recipe.data.sources
    ]


def _hub_rows(source: Source, seed: int) -> list[dict[str, Any]]:
    """The first usable rows of a data set on the hub, streamed through a shuffling buffer.

    Raises:
        GircseError: The hub cannot be reached, or there is no such data set.
    """
    from datasets import load_dataset

    name = str(source.hub)
    try:
        stream = load_dataset(name, split="train", streaming=True).shuffle(seed=seed, buffer_size=10_000)
        rows = _checked_rows((_renamed(row, name, source.instruction) for row in stream), name)
        usable = (row for row in rows if source.task in (None, row["task"]) and _usable(row, source))
        return list(islice(usable, source.examples))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise GircseError(f"the data set {name} cannot be loaded ({reason}); is the hub reachable?") from error


def _renamed(row: dict[str, Any], name: str, instruction: str | None) -> dict[str, Any]:
    return {
        **row,
        "instruction": instruction or row.get("instruction") or row.get("prompt"),
        "task": row.get("task") or row.get("type") or name,
    }


def example_counts(recipe: Recipe, available: list[int]) -> list[int]:
    """How many rows of each source: its own number, or its share of ``data.examples``.

    Shares are proportional to size^(1/T), whole batches (an incomplete batch would be dropped), and never more than
    there is; what a small source cannot give goes to the others.

    Args:
        recipe: The recipe.
        available: Usable rows of each source.

    Returns:
        One number a source.
    """
    sources, batch = recipe.data.sources, recipe.training.batch_size
    counts = [source.examples or 0 for source in sources]
    shared = [index for index, source in enumerate(sources) if source.examples is None]
    weights = {index: available[index] ** (1 / recipe.data.mixture_temperature) for index in shared}
    for _ in range((recipe.data.examples or 0) // batch):  # a batch at a time to whoever is furthest below its share
        room = [index for index in shared if counts[index] + batch <= available[index]]
        if not room:
            break
        counts[min(room, key=lambda index: (counts[index] + batch) / weights[index])] += batch
    return counts


def _usable(row: dict[str, Any], source: Source) -> bool:
    return source.facet is not None or len(row["neg"]) >= source.negatives


def _texts(row: dict[str, Any], source: Source, rows: list[dict[str, Any]], generator: random.Random) -> list[str]:
    """Query, one positive, and the source's number of negatives."""
    pair = (row["query"], generator.choice(row["pos"]))
    if source.facet is None:
        return [*pair, *generator.sample(row["neg"], source.negatives)]
    side = generator.randrange(2)  # either form asks
    anchor, counterpart = pair[side], pair[1 - side]
    same_form = _others(pair, side, rows, source.negatives, generator)
    return [anchor, counterpart, *same_form] if source.facet == "content" else [anchor, *same_form, counterpart]


def _others(
    pair: tuple[str, str], side: int, rows: list[dict[str, Any]], count: int, generator: random.Random
) -> list[str]:
    """Texts of other rows, on one side; not the pair's own, which several rows may hold."""
    found: list[str] = []
    for row in generator.sample(rows, min(len(rows), 4 * count + 8)):
        text = (row["query"], row["pos"][0])[side]
        if text not in pair and text not in found:
            found.append(text)
    if len(found) < count:
        raise GircseError(f"a facet needs {count + 1} different texts on each side; the rows have fewer")
    return found[:count]


def _columns(row: dict[str, Any], source: Source, texts: list[str]) -> dict[str, str]:
    """The texts with their prompts, by the name of their column."""
    prompt = INSTRUCTION_TEMPLATE.format(instruction=source.instruction or row["instruction"])
    passage_prompt = prompt if source.symmetric else ""
    names = ["anchor", "positive", *(f"negative_{index}" for index in range(1, len(texts) - 1))]
    prompts = [prompt, *[passage_prompt] * (len(texts) - 1)]
    return {name: before + text for name, before, text in zip(names, prompts, texts, strict=True)}
