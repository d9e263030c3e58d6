"""mteb's tasks with less work around the same numbers: every step of a K-curve pays for it again.

mteb hands its loaders, samplers and scikit-learn lazy columns of the data set, which are read row by row, again in
every experiment of every step; seven measures of a classification then each check and count the same labels anew; and
scikit-learn shares out products that are too small for it among threads. That is most of such a task's time without the
encoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from datasets.fingerprint import generate_random_fingerprint
from mteb.abstasks import AbsTaskClassification
from mteb.abstasks.abstask import AbsTask
from sklearn.metrics import average_precision_score, precision_recall_fscore_support
from threadpoolctl import threadpool_limits


class ListColumns(Dataset):
    """A data set whose columns are lists, read once; those of a plain one are views that read row by row."""

    @classmethod
    def of(cls, dataset: Dataset) -> ListColumns:
        """The same rows; takes the data set over."""
        dataset.__class__ = cls  # its constructor is no interface, and copying rows would cost what is to be saved
        assert isinstance(dataset, ListColumns)
        return dataset

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)
        read: dict[str, list[Any]] = self.__dict__.setdefault("_read", {})
        if key not in read:
            read[key] = super().__getitem__(key)[:]
        return list(read[key])

    def select(self, *indices: Any, **named: Any) -> Dataset:
        """Rows of it, with lists for columns as well; no hash over their numbers, by which nothing is looked up."""
        named.setdefault("new_fingerprint", generate_random_fingerprint())
        return ListColumns.of(super().select(*indices, **named))


def spare_work(task: AbsTask) -> None:
    """Make a task that has its data read its columns and count its labels once; on the object alone.

    Scores stay the same. Retrieval, whose data are of another form, is left as it is.
    """
    changed: Any = task
    for splits in changed.dataset.values():
        if isinstance(splits, DatasetDict):
            for name, rows in splits.items():
                splits[name] = ListColumns.of(rows)
    # regression and several labels have measures of their own
    if isinstance(task, AbsTaskClassification) and (
        type(task)._calculate_scores is AbsTaskClassification._calculate_scores
    ):
        changed._calculate_scores = classification_scores


@contextmanager
def one_thread() -> Iterator[int]:
    """Products on one thread, which small ones are faster on; yields how many torch had, for `threadpool_limits`."""
    threads = torch.get_num_threads()
    with threadpool_limits(1):
        yield threads


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
