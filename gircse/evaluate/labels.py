"""Labels that mteb's classification tasks read once.

mteb hands its samplers, scikit-learn and a dozen measures a lazy column of the data set, and they read it row by row,
again in every experiment of every step: most of such a task's time without the encoding. The values are the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from mteb.abstasks import AbsTaskClassification


class ReadColumns:
    """A data set of which a column is a list when it is asked for, not a view."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, column: str) -> list[Any]:
        return self._dataset[column][:]

    def select(self, rows: list[int]) -> Any:
        """Rows of it, as the data set itself returns them."""
        return self._dataset.select(rows)


def read_labels_once(task: AbsTaskClassification) -> None:
    """Make a task read its labels once an experiment; on the object alone, scores stay the same."""
    changed: Any = task
    kind: Any = type(task)
    if kind._undersample_data is AbsTaskClassification._undersample_data:  # regression has its own, which needs more
        changed._undersample_data = partial(_undersample, kind._undersample_data, task)
    changed._run_experiment = partial(_run, kind._run_experiment, task)


def _undersample(original: Any, task: Any, dataset: Any, *rest: Any, **named: Any) -> Any:
    return original(task, ReadColumns(dataset), *rest, **named)


def _run(original: Any, task: Any, train_split: Any, eval_split: Any, *rest: Any, **named: Any) -> Any:
    return original(task, ReadColumns(train_split), ReadColumns(eval_split), *rest, **named)
