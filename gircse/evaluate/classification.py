"""mteb's classification tasks with less work around the same numbers.

mteb hands its samplers, scikit-learn and a dozen measures a lazy column of the data set, and they read it row by row,
again in every experiment of every step; six of the measures then check and count the same labels anew. That is most of
such a task's time without the encoding, and every step of a K-curve pays it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from mteb.abstasks import AbsTaskClassification
from sklearn.metrics import average_precision_score, precision_recall_fscore_support


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


def spare_work(task: AbsTaskClassification) -> None:
    """Make a task read and count its labels once an experiment; on the object alone, scores stay the same."""
    changed: Any = task
    kind: Any = type(task)
    if kind._undersample_data is AbsTaskClassification._undersample_data:  # regression has its own, which needs more
        changed._undersample_data = partial(_undersample, kind._undersample_data, task)
    if kind._calculate_scores is AbsTaskClassification._calculate_scores:  # so have regression and several labels
        changed._calculate_scores = classification_scores
    changed._run_experiment = partial(_run, kind._run_experiment, task)


def _undersample(original: Any, task: Any, dataset: Any, *rest: Any, **named: Any) -> Any:
    return original(task, ReadColumns(dataset), *rest, **named)


def _run(original: Any, task: Any, train_split: Any, eval_split: Any, *rest: Any, **named: Any) -> Any:
    return original(task, ReadColumns(train_split), ReadColumns(eval_split), *rest, **named)


def classification_scores(y_test: Any, y_pred: Any) -> dict[str, float | None]:
    """What mteb's ``_calculate_scores`` returns, from one call of scikit-learn's measures instead of seven.

    Args:
        y_test: True labels, (n,).
        y_pred: Predicted ones, (n,).

    Returns:
        Accuracy; precision, recall and F1 as means over the labels (0 where undefined) and weighted by their true
        number; with two true labels the average precision of the predictions, else None.
    """
    true, predicted = np.asarray(y_test), np.asarray(y_pred)
    undefined_is: Any = 0  # scikit-learn takes numbers here; type checkers see only the "warn" of its default
    *measures, of_true = precision_recall_fscore_support(true, predicted, average=None, zero_division=undefined_is)
    scores: dict[str, float | None] = {"accuracy": float(np.mean(true == predicted))}
    for name, values in zip(("precision", "recall", "f1"), measures, strict=True):  # each by label
        scores[name] = float(np.mean(values))
        scores[f"{name}_weighted"] = float(np.average(values, weights=of_true))
    binary = len(np.unique(true)) == 2
    for name, average in (("ap", "macro"), ("ap_weighted", "weighted")):
        scores[name] = float(average_precision_score(true, predicted, average=average)) if binary else None
    return scores
