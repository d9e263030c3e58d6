"""The usable rows of every source of a recipe, from files or the hub.

Knows which rows a source asks for; knows nothing of how they are laid out.
"""

from __future__ import annotations

import difflib
import logging
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from gircse.errors import GircseError, UsageError
from gircse.train.answers import matches
from gircse.train.recipe import Recipe, Source
from gircse.train.rows import checked_rows, read_rows

logger = logging.getLogger("gircse.train")


def source_path(folder: Path, source: Source) -> Path:
    """The file of a source.

    Raises:
        GircseError: It is not there, or there in two formats.
    """
    if source.file is None:
        raise UsageError(f"{source.hub} is on the hub, not a file")
    paths = [folder / f"{source.file}{suffix}" for suffix in (".jsonl.zst", ".jsonl", ".parquet")]
    found = [path for path in paths if path.is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise GircseError(f"{found[0]} and {found[1].name} are both there; move away the one that is not meant")
    raise GircseError(
        f"{folder / source.file} is not there as .jsonl.zst, .jsonl or .parquet; name the data folder with --data"
    )


def usable_rows(recipe: Recipe) -> list[list[dict[str, Any]]]:
    """For every source of the recipe, its task's rows that have enough negatives. Each file is read once.

    How many are left out is told as a warning, by the first process.

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
        _tell_left_out(len(usable), len(wanted[path][source.task]), source)
        result.append(usable)
    return result


def _check_found(usable: list[dict[str, Any]], place: str, source: Source, tasks: Counter[str]) -> None:
    """Raise where a source has no usable row; `tasks` counts the rows of every task in its place."""
    if usable:
        return
    found = _count(tasks, source)
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
    """Usable rows of a data set on the hub, drawn from all of it.

    Raises:
        GircseError: The hub cannot be reached, or there is no such data set.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name = str(source.hub)
    try:
        splits = load_dataset(name)  # kept in its cache, for a dry run, all processes and --resume
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise GircseError(f"the data set {name} cannot be loaded ({reason}); is the hub reachable?") from error
    parts: dict[str | None, Any] = {str(split): rows for split, rows in splits.items()}  # each of them a task
    if "train" in parts:
        parts = {None: parts["train"]}
    places = [(split, row) for split, rows in parts.items() for row in range(len(rows))]
    random.Random(f"{seed}/{name}").shuffle(places)
    drawn = (_renamed(parts[split][row], split, source) for split, row in places)
    tasks: Counter[str] = Counter()
    wanted = (row for row in _counted(checked_rows(drawn, name), tasks) if matches(row["task"], source.task))
    found = list(islice((row for row in wanted if _usable(row, source)), source.examples))
    _check_found(found, name, source, tasks)
    _tell_left_out(len(found), _count(tasks, source), source)
    return found


def _tell_left_out(usable: int, found: int, source: Source) -> None:
    if usable < found and is_first_local_process():
        negatives = "1 negative" if source.negatives == 1 else f"{source.negatives} negatives"
        logger.warning("%s: %d of %d rows left out: fewer than %s", source.name, found - usable, found, negatives)


def _count(tasks: Counter[str], source: Source) -> int:
    """Rows of the source's task, or tasks."""
    return sum(number for task, number in tasks.items() if matches(task, source.task))


def _counted(rows: Iterable[dict[str, Any]], tasks: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows, counted by task as they pass."""
    for row in rows:
        tasks[row["task"]] += 1
        yield row


def _renamed(row: dict[str, Any], split: str | None, source: Source) -> dict[str, Any]:
    """A row with its instruction and its task: its own, its split, its type, or the whole data set."""
    given = source.instruction if isinstance(source.instruction, str | None) else source.instruction[0]
    return {
        **row,
        "instruction": given or row.get("instruction") or row.get("prompt"),
        "task": row.get("task") or split or row.get("type") or str(source.hub),
    }


def is_first_local_process() -> bool:
    """Whether this process, of those on this machine, is the one that tells people of the data."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def _usable(row: dict[str, Any], source: Source) -> bool:
    return source.facet is not None or len(row["neg"]) >= source.negatives
