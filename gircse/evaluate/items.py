"""What mteb's scores are made of: per-item scores out of mteb's predictions, for intervals and paired tests.

Knows mteb's predictions and main scores; knows nothing of models or files. mteb's own score stays the score:
items that do not reproduce it are thrown away.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskMultilabelClassification,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.abstask import AbsTask

from gircse.evaluate.statistics import Items

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-4
_RETRIEVAL_METRICS = {"ndcg": "ndcg_cut_{}", "map": "map_cut_{}", "precision": "P_{}", "recall": "recall_{}"}


def items_of(
    task: AbsTask, subset: str, split: str, scores: Mapping[str, Any], predictions: Any, per_query: Any
) -> Items | None:
    """The items of one subset's main score; None where it is not made of items, or they do not reproduce it.

    Args:
        task: With its data loaded.
        subset: hf_subset.
        split: Of the data.
        scores: mteb's scores of the subset.
        predictions: What mteb saved as the task's predictions for subset and split; None for retrieval.
        per_query: Query id to trec_eval measures, for retrieval.
    """
    try:
        items = _items(task, subset, split, scores, predictions, per_query)
        same = items is not None and abs(items.score() - scores["main_score"]) <= _TOLERANCE
    except Exception as error:  # a task of mteb's that is like no other: its score stands all the same
        name, reason = task.metadata.name, f"{type(error).__name__}: {' '.join(str(error).split())}"
        logger.warning("%s %s: no interval, for its predictions cannot be read (%s)", name, subset, reason)
        return None
    return items if same else None


def _items(
    task: AbsTask, subset: str, split: str, scores: Mapping[str, Any], predictions: Any, per_query: Any
) -> Items | None:
    data: Any = task.dataset
    data = data.get(subset, data)
    main = task.metadata.main_score
    items: Items | None = None
    if isinstance(task, AbsTaskMultilabelClassification):  # accuracy of whole sets of labels, or a mean over labels
        return None
    if isinstance(task, AbsTaskSTS) and main == "cosine_spearman":
        items = Items("spearman", np.array(predictions["cosine_scores"]), np.array(data[split]["score"], dtype=float))
    elif isinstance(task, AbsTaskPairClassification) and main.endswith("_ap"):
        items = _pairs(main, predictions, np.array(data[split][task.label_column_name]).ravel())
    elif isinstance(task, AbsTaskClassification) and main == "accuracy" and not task.is_cross_validation:
        gold = np.array(data[split][task.label_column_name])
        items = Items("mean", np.mean([np.array(guess) == gold for guess in predictions], axis=0))
    elif isinstance(task, AbsTaskRetrieval):
        items = _queries(main, per_query)
    elif isinstance(task, AbsTaskBitextMining) and main == "f1" and not task.parallel_subsets:
        items = _bitext([match["corpus_id"] for match in predictions["sentence1-sentence2"]])
    elif isinstance(task, AbsTaskClustering) and main == "v_measure":
        values = [value for level in scores["v_measures"].values() for value in level]
        # mteb clusters bootstrap samples; their spread is a standard error only where they are of the data's size.
        if task.max_documents_per_cluster <= len(data[split]):
            items = Items("resamples", np.array(values))
    return items


def _pairs(main: str, predictions: Mapping[str, Any], labels: np.ndarray) -> Items | None:
    series = {
        "similarity": np.array(predictions["similarity_scores"]),
        "cosine": np.array(predictions["cosine_scores"]),
        "manhattan": -np.array(predictions["manhattan_distances"]),
        "euclidean": -np.array(predictions["euclidean_distances"]),
        "dot": np.array(predictions["dot_scores"]),
    }
    candidates = [Items("ap", values, labels) for name, values in series.items() if main in (f"{name}_ap", "max_ap")]
    return max(candidates, key=Items.score, default=None)


def _queries(main: str, per_query: Mapping[str, Mapping[str, float]] | None) -> Items | None:
    found = re.fullmatch(r"(\w+?)_at_(\d+)", main)
    if per_query is None or found is None or found[1] not in _RETRIEVAL_METRICS:
        return None
    measure = _RETRIEVAL_METRICS[found[1]].format(found[2])
    return Items("mean", np.array([per_query[query][measure] for query in sorted(per_query)]))


def _bitext(guesses: list[int]) -> Items:
    """Weighted F1 where every sentence is a class of its own: item i counts 2·hit / (1 + how often i was guessed)."""
    times = Counter(guesses)
    return Items("mean", np.array([2.0 * (guess == i) / (1 + times[i]) for i, guess in enumerate(guesses)]))
