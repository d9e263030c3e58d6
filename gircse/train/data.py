"""Training rows: read from JSON lines, drawn by task, laid out in columns for the trainer.

Knows the row format ``{"task", "instruction", "query", "pos": [...], "neg": [...]}``, of which ``query`` and ``pos``
must be there; knows nothing of models.
"""

from __future__ import annotations

import difflib
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers.base.sampler import MultiDatasetDefaultBatchSampler
from torch.utils.data import BatchSampler, ConcatDataset, SubsetRandomSampler
from tqdm import tqdm

from gircse.checkpoint import INSTRUCTION_TEMPLATE
from gircse.errors import GircseError, InputDataError, MissingExtraError, UsageError
from gircse.model import DEFAULT_INSTRUCTION
from gircse.train.answers import ANSWER_COLUMN, QUERIES_FORM, make_answers, matches
from gircse.train.recipe import Recipe, Source
from gircse.train.teacher import Teacher

try:
    import zstandard
    from datasets import Array2D, Dataset, DatasetDict, Features, List, Value
except ImportError as error:
    raise MissingExtraError("training", "train") from error


_NAMES = {"query": "anchor", "pos": "positive", "neg": "negative"}
"""Fields, and what sentence-transformers' data sets call them."""


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a ``.jsonl``, ``.jsonl.zst`` or ``.parquet`` file.

    Fields may go by the names of sentence-transformers' data sets, and a single text may stand where a list can.

    Returns:
        Each with all fields: a missing ``task`` is the file's name, a missing ``instruction`` empty.

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
        row = {**row, **{key: row[name] for key, name in _NAMES.items() if key not in row and name in row}}
        if not isinstance(row.get("query"), str) or not row["query"]:
            raise InputDataError(source, number, "'query' must be a text that is not empty")
        for key in ("pos", "neg"):
            given = row.get(key)
            row[key] = [] if given is None else [given] if isinstance(given, str) else given
            if not isinstance(row[key], list) or not all(isinstance(text, str) for text in row[key]):
                raise InputDataError(source, number, f"{key!r} must be a text or a list of texts")
        if not row["pos"] or not all(row["pos"]):
            raise InputDataError(source, number, "'pos' must hold texts that are not empty")
        for key, default in (("task", Path(source).name.split(".")[0]), ("instruction", "")):
            row[key] = default if row.get(key) is None else row[key]
            if not isinstance(row[key], str):
                raise InputDataError(source, number, f"{key!r} must be a text")
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

    Columns are ``anchor``, ``positive`` and ``negative_1``..., and last ``answer_to_spell`` where the source has
    answers; instructions are already in the texts. The rows and their order depend on the files and the seed alone.

    Args:
        recipe: Says which rows.
        teacher: Its embeddings of each row's texts, without instructions, become the column ``label``,
            (columns, width), of the sources that it has a say in. Where a source has a `class_field`, the column is
            the number of the row's class; with ``facet: form`` it has the numbers of the forms of the row's texts.

    Raises:
        InputDataError: A bad line.
        GircseError: A file is missing, or a source has fewer usable rows than the recipe asks for.
    """
    usable = usable_rows(recipe)
    counts = example_counts(recipe, [len(rows) for rows in usable])
    result = DatasetDict()
    # A teacher reads for minutes before the first step; without one this is done at once.
    silent = teacher is None or int(os.environ.get("LOCAL_RANK", 0)) > 0
    bar = tqdm(total=sum(counts), desc="the teacher reads", unit=" rows", leave=False, disable=silent)
    for source, rows, count in zip(recipe.data.sources, usable, counts, strict=True):
        if len(rows) * source.repeats < count:
            raise GircseError(
                f"{source.name}: {len(rows)} rows have {source.negatives} negatives, the recipe asks for {count}; "
                f"lower examples or negatives, or raise repeats"
            )
        if not count:
            continue
        # A generator of the source's own: adding a source does not change the rows of the others.
        generator = random.Random(f"{recipe.seed}/{source.name}")
        drawn = _draw(rows, count, generator)
        forms: list[list[int]] = []
        if source.facet is None:
            texts = [_texts(row, source, generator) for row in drawn]
        else:
            texts, forms = _facet_texts(drawn, source, rows, generator)
        usual = recipe.query_instruction or DEFAULT_INSTRUCTION
        laid_out = [_columns(row, source, own, usual, generator) for row, own in zip(drawn, texts, strict=True)]
        columns: dict[str, Any] = {name: [row[name] for row in laid_out] for name in laid_out[0]}
        features: dict[str, Any] = dict.fromkeys(columns, Value("string"))
        if answers := make_answers(drawn, source, texts, forms, generator):
            columns[ANSWER_COLUMN], features[ANSWER_COLUMN] = answers, Value("string")
        if teacher is not None and source.teacher:
            read = 1 if source.teacher == "anchor" else len(texts[0])
            vectors = teacher([text for own in texts for text in own[:read]]).astype(np.float32)
            labels = vectors.reshape(count, read, -1).repeat(len(texts[0]) // read, axis=1)  # (rows, columns, width)
            columns["label"], features["label"] = labels, Array2D(labels.shape[1:], "float32")
        elif source.class_field is not None:
            columns["label"], features["label"] = _classes(drawn, source), Value("int64")
        elif source.facet == "form" and source.in_batch_negatives:
            columns["label"], features["label"] = forms, List(Value("int64"))
        result[source.name] = Dataset.from_dict(columns, features=Features(features))
        bar.update(count)
    bar.close()
    return result


def _draw(rows: list[dict[str, Any]], count: int, generator: random.Random) -> list[dict[str, Any]]:
    """Rows without replacement; beyond their number, all of them once more, in another order."""
    whole, rest = divmod(count, len(rows))
    return [row for size in [len(rows)] * whole + [rest] for row in generator.sample(rows, size)]


def _classes(rows: list[dict[str, Any]], source: Source) -> list[int]:
    """The number of each row's class, the same in every process."""
    values = [row.get(str(source.class_field)) for row in rows]
    if not all(isinstance(value, str | int) for value in values):
        raise GircseError(
            f"{source.name}: class_field {source.class_field} must hold a text or a whole number in every row"
        )
    numbers = {name: number for number, name in enumerate(sorted({str(value) for value in values}))}
    return [numbers[str(value)] for value in values]


def usable_rows(recipe: Recipe) -> list[list[dict[str, Any]]]:
    """For every source of the recipe, its task's rows that have enough negatives. Each file is read once.

    Raises:
        InputDataError: A bad line.
        GircseError: A file is missing, or has no usable row of a source's task.
    """
    wanted: dict[Path, dict[str | None, list[dict[str, Any]]]] = {}
    for source in recipe.data.sources:
        if source.file is not None:
            wanted.setdefault(source_path(recipe.data.folder, source), {})[source.task] = []
    there: dict[Path, Counter[str]] = {path: Counter() for path in wanted}
    for path, patterns in wanted.items():
        for row in read_rows(path):
            there[path][row["task"]] += 1
            for pattern, rows in patterns.items():
                if matches(row["task"], pattern):
                    rows.append(row)
    result = []
    for source in recipe.data.sources:
        if source.file is None:
            result.append(_hub_rows(source, recipe.seed))
            continue
        path = source_path(recipe.data.folder, source)
        usable = [row for row in wanted[path][source.task] if _usable(row, source)]
        _check_found(usable, str(path), source, there[path])
        result.append(usable)
    return result


def _check_found(usable: list[dict[str, Any]], place: str, source: Source, tasks: Counter[str]) -> None:
    """Raise where a source has no usable row; `tasks` counts the rows of every task in its place."""
    if usable:
        return
    found = sum(number for task, number in tasks.items() if matches(task, source.task))
    if not tasks:
        raise GircseError(f"{place}: it has no rows at all")
    if found:
        task = "" if source.task is None else f" of {source.task}"
        raise GircseError(f"{place}: none of the {found} rows{task} has {source.negatives} negatives; lower negatives")
    near = difflib.get_close_matches(str(source.task), tasks, n=1)
    listed = ", ".join(sorted(tasks)[:8]) + (", ..." if len(tasks) > 8 else "")
    hint = f"did you mean {near[0]}?" if near else f"it has {listed}"
    raise GircseError(f"{place}: there is no task {source.task}; {hint}")


def _hub_rows(source: Source, seed: int) -> list[dict[str, Any]]:
    """The first usable rows of a data set on the hub, streamed through a shuffling buffer.

    Raises:
        GircseError: The hub cannot be reached, or there is no such data set.
    """
    from datasets import load_dataset

    name = str(source.hub)
    try:
        stream = load_dataset(name, split="train", streaming=True).shuffle(seed=seed, buffer_size=10_000)
        rows = _checked_rows((_renamed(row, name, source) for row in stream), name)
        tasks: Counter[str] = Counter()
        usable = (row for row in _counted(rows, tasks) if matches(row["task"], source.task) and _usable(row, source))
        found = list(islice(usable, source.examples))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise GircseError(f"the data set {name} cannot be loaded ({reason}); is the hub reachable?") from error
    _check_found(found, name, source, tasks)
    return found


def _counted(rows: Iterable[dict[str, Any]], tasks: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows, counted by task as they pass."""
    for row in rows:
        tasks[row["task"]] += 1
        yield row


def _renamed(row: dict[str, Any], name: str, source: Source) -> dict[str, Any]:
    given = source.instruction if isinstance(source.instruction, str | None) else source.instruction[0]
    return {
        **row,
        "instruction": given or row.get("instruction") or row.get("prompt"),
        "task": row.get("task") or row.get("type") or name,
    }


def example_counts(recipe: Recipe, available: list[int]) -> list[int]:
    """How many rows of each source: its own number, its share of ``data.examples``, or, without that number, all.

    Shares are proportional to size^(1/T), whole batches (an incomplete batch would be dropped), and never more than
    there is; what a small source cannot give goes to the others.

    Args:
        recipe: The recipe.
        available: Usable rows of each source; one that has `repeats` gives them that many times.

    Returns:
        One number a source.
    """
    sources, batch = recipe.data.sources, recipe.training.batch_size
    available = [there * source.repeats for source, there in zip(sources, available, strict=True)]
    if recipe.data.examples is None:
        return [source.examples or there for source, there in zip(sources, available, strict=True)]
    counts = [source.examples or 0 for source in sources]
    shared = [index for index, source in enumerate(sources) if source.examples is None]
    weights = {index: available[index] ** (1 / recipe.data.mixture_temperature) for index in shared}
    for _ in range(recipe.data.examples // batch):  # a batch at a time to whoever is furthest below its share
        room = [index for index in shared if counts[index] + batch <= available[index]]
        if not room:
            break
        counts[min(room, key=lambda index: (counts[index] + batch) / weights[index])] += batch
    return counts


def _usable(row: dict[str, Any], source: Source) -> bool:
    return source.facet is not None or len(row["neg"]) >= source.negatives


def _texts(row: dict[str, Any], source: Source, generator: random.Random) -> list[str]:
    """Query, one positive, and the source's number of negatives."""
    return [row["query"], generator.choice(row["pos"]), *generator.sample(row["neg"], source.negatives)]


def _facet_texts(
    drawn: list[dict[str, Any]], source: Source, rows: list[dict[str, Any]], generator: random.Random
) -> tuple[list[list[str]], list[list[int]]]:
    """Anchor, positive and negatives of the drawn rows; and under ``facet: form`` the number of each text's form.

    Queries have one form, `QUERIES_FORM`; the positives of every task one of their own.
    """
    of_task: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of_task.setdefault(row["task"], []).append(row)
    numbers = {task: number for number, task in enumerate(sorted(of_task), start=1)}
    texts, forms = [], []
    for row in drawn:
        pair, pair_forms = (row["query"], generator.choice(row["pos"])), (QUERIES_FORM, numbers[row["task"]])
        side = generator.randrange(2)  # either form asks
        anchor, counterpart = pair[side], pair[1 - side]
        if source.facet == "content":
            texts.append([anchor, counterpart, *_others(row, side, of_task[row["task"]], source.negatives, generator)])
        else:
            same_form = _others(row, side, of_task[row["task"]], 1, generator)
            texts.append([anchor, *same_form, *[counterpart] * source.negatives])
            forms.append([pair_forms[side]] * 2 + [pair_forms[1 - side]] * source.negatives)
    return texts, forms


def _others(
    row: dict[str, Any], side: int, rows: list[dict[str, Any]], count: int, generator: random.Random
) -> list[str]:
    """Texts of other rows, on one side; not of rows that share a text with this one, which say the same."""
    own, found = {row["query"], *row["pos"]}, []
    for other in generator.sample(rows, min(len(rows), 4 * count + 8)):
        text = (other["query"], other["pos"][0])[side]
        if own.isdisjoint((other["query"], *other["pos"])) and text not in found:
            found.append(text)
    if len(found) < count:
        raise GircseError(f"a facet needs {count + 1} different texts on each side; the rows have fewer")
    return found[:count]


def _columns(
    row: dict[str, Any], source: Source, texts: list[str], usual: str, generator: random.Random
) -> dict[str, str]:
    """The texts with their prompts, by the name of their column; `usual` is the instruction where nobody names one."""
    instruction = source.instruction or row["instruction"] or usual
    if not isinstance(instruction, str):
        instruction = generator.choice(instruction)
    prompt = INSTRUCTION_TEMPLATE.format(instruction=instruction)
    passage_prompt = prompt if source.symmetric else ""
    names = ["anchor", "positive", *(f"negative_{index}" for index in range(1, len(texts) - 1))]
    prompts = [prompt, *[passage_prompt] * (len(texts) - 1)]
    return {name: before + text for name, before, text in zip(names, prompts, texts, strict=True)}


def steps_an_epoch(recipe: Recipe, examples: Mapping[str, int], processes: int = 1) -> int:
    """Optimiser steps that the rows make, incomplete batches and rounds of processes being dropped.

    Args:
        recipe: The recipe.
        examples: Rows of each source, by its name.
        processes: That share a step, a batch each.

    Raises:
        GircseError: A source has fewer rows than a batch, or, where all processes share its candidates, fewer batches
            than there are processes.
    """
    batch = recipe.training.batch_size
    for name, count in examples.items():
        if count < batch:
            raise GircseError(
                f"{name}: a batch holds one source, and {count} rows make none of {batch}; lower training.batch_size"
            )
    if not recipe.training.gather_across_devices:
        return sum(count // batch for count in examples.values()) // processes
    for name, count in examples.items():
        if count // batch < processes:
            raise GircseError(
                f"{name}: with gather_across_devices a step takes {processes} batches of {batch} rows from one source, "
                f"and {count} examples make fewer; raise its examples or lower training.batch_size"
            )
    return sum(count // batch // processes for count in examples.values())


class SameSourceBatches(MultiDatasetDefaultBatchSampler):
    """Batches in such an order that at every step all processes have one of the same source.

    A source is drawn in proportion to its size, and then gives as many batches in a row as there are processes, which
    take them in turns. With one process the order is that of sentence-transformers' ``ProportionalBatchSampler``.

    Args:
        dataset: The sources, one after the other.
        batch_samplers: One a source; what does not fill a round of all processes is dropped.
        generator: Of the order.
        seed: Of the generator; the epoch is added.
        processes: How many share a step.
    """

    def __init__(
        self,
        dataset: ConcatDataset,
        batch_samplers: list[BatchSampler],
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        processes: int = 1,
    ) -> None:
        super().__init__(dataset, batch_samplers=batch_samplers, generator=generator, seed=seed)
        self.processes = processes

    def __iter__(self) -> Iterator[list[int]]:
        """Indices into the joined data set, a batch at a time."""
        if self.generator is not None and self.seed is not None:
            self.generator.manual_seed(self.seed + self.epoch)
        offsets = [0, *accumulate(len(rows) for rows in self.dataset.datasets)]  # type: ignore[arg-type]
        rounds = [index for index, count in enumerate(self._rounds()) for _ in range(count)]
        batches = [iter(sampler) for sampler in self.batch_samplers]
        for index in SubsetRandomSampler(rounds, generator=self.generator):
            for batch in islice(batches[index], self.processes):
                yield [row + offsets[index] for row in batch]

    def __len__(self) -> int:
        """Batches of all processes."""
        return sum(self._rounds()) * self.processes

    def _rounds(self) -> list[int]:
        return [len(sampler) // self.processes for sampler in self.batch_samplers]
