"""Training data: rows drawn from every source, laid out in columns for the trainer, and the order of their batches.

Knows what a recipe says of rows; knows nothing of the files that they come from, or of models.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Mapping
from itertools import accumulate, islice
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.sampler import MultiDatasetDefaultBatchSampler
from torch.utils.data import BatchSampler, ConcatDataset, SubsetRandomSampler
from tqdm import tqdm

from gircse.checkpoint import INSTRUCTION_TEMPLATE
from gircse.errors import GircseError, MissingExtraError
from gircse.losses.candidates import KNOWN_KEYS
from gircse.model import DEFAULT_INSTRUCTION
from gircse.train.answers import ANSWER_COLUMN, QUERIES_FORM, make_answers
from gircse.train.recipe import Recipe, Source
from gircse.train.same_texts import KEY_COLUMNS, PLAIN_KEYS, TEXT_KEYS, key_of_text
from gircse.train.sources import is_first_local_process, usable_rows
from gircse.train.teacher import Teacher

try:
    from datasets import Array2D, Dataset, DatasetDict, Features, List, Value
except ImportError as error:
    raise MissingExtraError("training", "train") from error

logger = logging.getLogger("gircse.train")


def load_training_data(recipe: Recipe, teacher: Teacher | None = None, *, tokenizer: Any = None) -> DatasetDict:
    """One data set a source, or, with `by_task`, a task of it, so that every batch holds one.

    Columns are ``anchor``, ``positive`` and ``negative_1``..., and last ``answer_to_spell`` where the source has
    answers; instructions are already in the texts. ``plain_keys`` says which texts are the same but for these,
    ``known_keys`` which are no negatives of a row, and ``text_keys`` where instructions have several wordings which
    texts are the same under another one. The rows and their order depend on the files and the seed alone.

    Args:
        recipe: Says which rows.
        teacher: Its embeddings of each row's texts, without instructions, become the column ``label``,
            (columns, width), of the sources that it has a say in. Where a source has a `class_field`, the column is
            the number of the row's class; with ``facet: form`` it has the numbers of the forms of the row's texts.
        tokenizer: Where given, instructions are refused that leave no room for a text.

    Raises:
        InputDataError: A bad line.
        GircseError: A file is missing, or a source has fewer usable rows than the recipe asks for.
    """
    usable = usable_rows(recipe)
    counts = example_counts(recipe, [len(rows) for rows in usable])
    result = DatasetDict()
    # A teacher reads for minutes before the first step; without one this is done at once.
    silent = teacher is None or not is_first_local_process()
    bar = tqdm(total=sum(counts), desc="the teacher reads", unit=" rows", leave=False, disable=silent)
    for source, rows, count in _data_sets(recipe, usable, counts):
        if source.name in result:
            raise GircseError(f"data.sources: the rows of {source.name} are in two sources; name each task once")
        if count:
            result[source.name] = _data_set(recipe, source, rows, count, teacher, tokenizer)
        elif is_first_local_process():
            unit = recipe.training.batch_size
            logger.warning("%s: left out: its share of data.examples is less than a batch of %d", source.name, unit)
        bar.update(count)
    bar.close()
    return result


def _data_set(
    recipe: Recipe, source: Source, rows: list[dict[str, Any]], count: int, teacher: Teacher | None, tokenizer: Any
) -> Dataset:
    """So many of a source's rows, drawn and laid out in columns."""
    if len(rows) * source.repeats < count:
        raise GircseError(
            f"{source.name}: {len(rows)} rows have {source.negatives} negatives, the recipe asks for {count}; "
            f"lower examples or negatives, or raise repeats"
        )
    # A generator of the source's own: adding a source does not change the rows of the others.
    generator = random.Random(f"{recipe.seed}/{source.name}")
    drawn = _draw(rows, count, generator)
    forms: list[list[int]] = []
    if source.facet is None:
        texts = [_texts(row, source, generator) for row in drawn]
    else:
        texts, forms = _facet_texts(drawn, source, rows, generator)
    usual = recipe.query_instruction or DEFAULT_INSTRUCTION
    instructions = [_instruction(row, source, usual, generator) for row in drawn]
    if tokenizer is not None:
        _check_room(recipe, source, set(instructions), tokenizer)
    prompted = [_prompted(own, source, asked) for own, asked in zip(texts, instructions, strict=True)]
    columns: dict[str, Any] = dict(zip(_names(len(texts[0])), map(list, zip(*prompted, strict=True)), strict=True))
    features: dict[str, Any] = dict.fromkeys(columns, Value("string"))
    if answers := make_answers(drawn, source, texts, forms, generator):
        columns[ANSWER_COLUMN], features[ANSWER_COLUMN] = answers, Value("string")
    columns[PLAIN_KEYS] = [[key_of_text(text) for text in own] for own in texts]
    # Of a facet the row's other texts may be its negatives.
    answering = [row["pos"] if source.facet is None else own[1:2] for row, own in zip(drawn, texts, strict=True)]
    columns[KNOWN_KEYS] = [
        [key_of_text(text) for text in (own[0], *known)] for own, known in zip(texts, answering, strict=True)
    ]
    features[PLAIN_KEYS] = features[KNOWN_KEYS] = List(Value("int64"))
    if isinstance(source.instruction, list):  # keys are those of the texts under the first wording
        one = source.instruction[0]
        columns[TEXT_KEYS] = [[key_of_text(text) for text in _prompted(own, source, one)] for own in texts]
        features[TEXT_KEYS] = List(Value("int64"))
    if teacher is not None and source.teacher:
        labels = _taught(texts, source, teacher)
        columns["label"], features["label"] = labels, Array2D(labels.shape[1:], "float32")
    elif source.class_field is not None:
        columns["label"], features["label"] = _classes(drawn, source), Value("int64")
    elif source.facet == "form" and source.in_batch_negatives:
        columns["label"], features["label"] = forms, List(Value("int64"))
    return Dataset.from_dict(columns, features=Features(features))


def _taught(texts: list[list[str]], source: Source, teacher: Teacher) -> np.ndarray:
    """The teacher's embeddings of each row's texts, (rows, columns, width)."""
    read = 1 if source.teacher == "anchor" else len(texts[0])
    vectors = teacher([text for own in texts for text in own[:read]]).astype(np.float32)
    return vectors.reshape(len(texts), read, -1).repeat(len(texts[0]) // read, axis=1)


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
    room = [available[index] for index in shared]
    given = _share_out(recipe.data.examples, room, batch, recipe.data.mixture_temperature)
    for index, count in zip(shared, given, strict=True):
        counts[index] = count
    return counts


def _share_out(total: int, available: list[int], unit: int, temperature: float = 1.0) -> list[int]:
    """Parts of a total in proportion to size^(1/T), each a multiple of a unit and no more than there is."""
    counts = [0] * len(available)
    weights = [there ** (1 / temperature) for there in available]
    for _ in range(total // unit):  # a unit at a time to whoever is furthest below its share
        room = [index for index, there in enumerate(available) if counts[index] + unit <= there]
        if not room:
            break
        counts[min(room, key=lambda index: (counts[index] + unit) / weights[index])] += unit
    return counts


def _data_sets(
    recipe: Recipe, usable: list[list[dict[str, Any]]], counts: list[int]
) -> Iterator[tuple[Source, list[dict[str, Any]], int]]:
    """The data sets that a recipe's sources make, the rows of each and how many to draw: one a source, or one a task.

    Raises:
        GircseError: No task of a source makes a batch.
    """
    unit = recipe.training.batch_size
    if recipe.training.gather_across_devices:
        unit *= int(os.environ.get("WORLD_SIZE", "1"))  # a step takes a batch for every process
    for source, rows, count in zip(recipe.data.sources, usable, counts, strict=True):
        if not source.by_task:
            yield source, rows, count
            continue
        tasks: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            tasks.setdefault(row["task"], []).append(row)
        shares = _share_out(count, [len(own) * source.repeats for own in tasks.values()], unit)
        small = [task for task, share in zip(tasks, shares, strict=True) if not share]
        if len(small) == len(tasks):
            raise GircseError(f"{source.name}: no task has {unit} rows, which make a step; lower training.batch_size")
        if small and is_first_local_process():
            logger.warning(
                "%s: left out for want of %d rows, which make a step: %s", source.name, unit, ", ".join(small)
            )
        for (task, own), share in zip(tasks.items(), shares, strict=True):
            yield source.of_task(task), own, share


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
    for size in (min(len(rows), 4 * count + 8), len(rows)):  # some, and all where those are too much alike
        for other in generator.sample(rows, size):
            text = (other["query"], other["pos"][0])[side]
            if own.isdisjoint((other["query"], *other["pos"])) and text not in found:
                found.append(text)
        if len(found) >= count:
            return found[:count]
    raise GircseError(f"a facet needs {count + 1} different texts on each side; the rows have fewer")


def _instruction(row: dict[str, Any], source: Source, usual: str, generator: random.Random) -> str:
    """The source's, or one of its wordings, else the row's; `usual` where nobody names one."""
    instruction = source.instruction or row["instruction"] or usual
    return instruction if isinstance(instruction, str) else generator.choice(instruction)


def _check_room(recipe: Recipe, source: Source, instructions: set[str], tokenizer: Any) -> None:
    """Refuse instructions that texts are cut behind: all texts would be the same, and no batch would have a negative.

    Raises:
        GircseError: One is as long as all that training reads.
    """
    limit = recipe.data.max_seq_length
    for instruction in sorted(instructions):
        length = len(tokenizer(INSTRUCTION_TEMPLATE.format(instruction=instruction), verbose=False).input_ids)
        if length >= limit:
            raise GircseError(
                f"{source.name}: the instruction {instruction[:60]!r} alone takes {length} tokens, and "
                f"data.max_seq_length is {limit}; shorten it or raise the latter"
            )


def _prompted(texts: list[str], source: Source, instruction: str) -> list[str]:
    """A row's texts with their prompts."""
    prompt = INSTRUCTION_TEMPLATE.format(instruction=instruction)
    passage_prompt = prompt if source.symmetric else ""
    return [prompt + texts[0], *(passage_prompt + text for text in texts[1:])]


def _names(count: int) -> list[str]:
    """Of the columns of so many texts a row."""
    return ["anchor", "positive", *(f"negative_{index}" for index in range(1, count - 1))]


def text_columns(rows: Dataset) -> list[str]:
    """The columns of a data set that are embedded: anchor, positive and negatives."""
    return [name for name in rows.column_names if name not in ("label", ANSWER_COLUMN, *KEY_COLUMNS)]


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
