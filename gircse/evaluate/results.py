"""Reading what an evaluation left behind, as the report and the terminal table want it.

Knows the details files; knows neither mteb nor models, so a report needs no model and no task data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gircse.errors import GircseError
from gircse.evaluate.statistics import DRAWS, Comparison, Items, compare

CONTROL = ".other-instruction"  # ends the name of a facet task's control; see gircse.evaluate.tasks


@dataclass(frozen=True)
class Result:
    """One task scored at one step of one model.

    Attributes:
        facts: The details file.
        label: The model as headings name it.
    """

    facts: Mapping[str, Any]
    label: str

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.facts["task"]

    @property
    def num_steps(self) -> int | None:
        """K; None for a model without steps."""
        return self.facts["num_steps"]

    @property
    def score(self) -> float:
        """Mteb's main score × 100."""
        return 100 * self.facts["score"]

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval × 100; None where the metric allows none."""
        found = self.facts["interval"]
        return None if found is None else (100 * found[0], 100 * found[1])

    @property
    def column(self) -> str:
        """Model and step, as a heading: ``smollm2-135m K=5``."""
        return self.label if self.num_steps is None else f"{self.label} K={self.num_steps}"

    @property
    def is_plain(self) -> bool:
        """Clean texts under the task's own instruction, and not a control."""
        facts = self.facts
        changed = facts["perturbation"] is not None or facts["paraphrase"] is not None
        return not changed and not self.task.endswith(CONTROL)

    @cached_property
    def items(self) -> list[Items] | None:
        """Per subset; None where a subset has none."""
        found = [unpack_items(entry["items"]) for entry in self.facts["subsets"]]
        known = [items for items in found if items is not None]
        return known if known and len(known) == len(found) else None

    @cached_property
    def samples(self) -> np.ndarray | None:
        """Bootstrap samples of the score × 100, (draws,)."""
        if self.items is None:
            return None
        return 100 * np.mean([items.samples(DRAWS) for items in self.items], axis=0)


def unpack_items(values: Mapping[str, Any] | None) -> Items | None:
    """Items as a details file holds them."""
    if values is None:
        return None
    gold = values["gold"]
    return Items(values["statistic"], np.array(values["values"]), None if gold is None else np.array(gold))


@dataclass
class Results:
    """Everything in a folder of results.

    Attributes:
        all: Every result.
        soft_tokens: Model to what its soft tokens spell.
    """

    all: list[Result]
    soft_tokens: dict[str, list[dict[str, Any]]]

    @property
    def plain(self) -> list[Result]:
        """Results of clean texts under the tasks' own instructions."""
        return [result for result in self.all if result.is_plain]

    @cached_property
    def tasks(self) -> list[tuple[str, str]]:
        """Kind and name of every task, sorted."""
        return sorted({(result.facts["kind"], result.task) for result in self.plain})

    @cached_property
    def columns(self) -> list[str]:
        """Every model and step, sorted: models by name, steps by number."""
        found = {(r.num_steps is None, r.label, -1 if r.num_steps is None else r.num_steps): r for r in self.plain}
        return [found[key].column for key in sorted(found)]

    @cached_property
    def by_cell(self) -> dict[tuple[str, str], Result]:
        """Task and column to result."""
        return {(result.task, result.column): result for result in self.plain}

    def models(self) -> list[str]:
        """Labels of models, those with steps first."""
        return sorted({r.label for r in self.plain}, key=lambda m: (all(k is None for k in self.steps(m)), m))

    def steps(self, model: str) -> list[int | None]:
        """Steps of a model, ascending."""
        return sorted({r.num_steps for r in self.plain if r.label == model}, key=lambda k: -1 if k is None else k)

    def common_tasks(self, columns: Sequence[str]) -> list[str]:
        """Tasks that every one of the columns was scored on: the only ones to average over."""
        return [task for _, task in self.tasks if all((task, column) in self.by_cell for column in columns)]

    def mean(self, column: str, tasks: Sequence[str]) -> tuple[float, tuple[float, float] | None]:
        """Mean score over tasks, and its bootstrap interval where every task has one."""
        cells = [self.by_cell[task, column] for task in tasks]
        samples = [cell.samples for cell in cells if cell.samples is not None]
        low_high = None
        if samples and len(samples) == len(cells):
            low, high = np.percentile(np.mean(samples, axis=0), [2.5, 97.5])
            low_high = (float(low), float(high))
        return float(np.mean([cell.score for cell in cells])), low_high

    def comparison(self, task: str, a: str, b: str) -> Comparison | None:
        """Paired test of two columns on a task; None where their items do not pair."""
        first, second = self.by_cell.get((task, a)), self.by_cell.get((task, b))
        if first is None or second is None or first.items is None or second.items is None:
            return None
        if first.facts["sample"] != second.facts["sample"]:
            return None
        return compare(first.items, second.items)


def read_results(folder: Path) -> Results:
    """All results of a folder that `gircse evaluate -o` wrote.

    Raises:
        GircseError: There are none.
    """
    paths = sorted((folder / "details").rglob("*.json"))
    spelled = [path for path in paths if path.name == "soft_tokens.json"]
    read = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path not in spelled]
    if not read:
        raise GircseError(f"{folder} holds no results; gircse evaluate --suite dev --data DIR -o {folder} makes some")
    largest: dict[str, dict[str, Any]] = {}
    for facts in read:  # a folder may hold several samples of a task; the largest is shown
        wording = facts["instructions"] if facts["paraphrase"] else None
        key = [facts[name] for name in ("model", "revision", "num_steps", "dtype", "task", "perturbation")]
        known = largest.setdefault(json.dumps([*key, wording]), facts)
        if (facts["limit"] or float("inf")) > (known["limit"] or float("inf")):
            largest[json.dumps([*key, wording])] = facts
    label = _labels(read)
    soft_tokens = {}
    for path in spelled:
        revision, name = path.parent.name, path.parent.parent.name
        labels = [
            text for (model, rev, _), text in label.items() if (model.replace("/", "__"), rev) == (name, revision)
        ]
        soft_tokens[labels[0] if labels else name] = json.loads(path.read_text(encoding="utf-8"))["texts"]
    return Results([Result(facts, label[_identity(facts)]) for facts in largest.values()], soft_tokens)


def _identity(facts: Mapping[str, Any]) -> tuple[str, str, str]:
    return facts["model"], facts["revision"], facts["dtype"]


def _labels(read: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], str]:
    """Short names of models; with revision or dtype where a name alone would be two models."""
    identities = {_identity(facts) for facts in read}
    labels = {}
    for model, revision, dtype in identities:
        label = model.split("/")[-1]
        same = [other for other in identities if other[0].split("/")[-1] == label]
        label += f"@{revision[:6]}" if len({other[:2] for other in same}) > 1 else ""
        label += f" {dtype}" if len({other[2] for other in same}) > 1 else ""
        labels[model, revision, dtype] = label
    return labels
