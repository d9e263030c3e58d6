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
from gircse.evaluate.statistics import DRAWS, Comparison, Items, compare, interval, mean_of

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
        return _column(self.label, self.num_steps)

    @property
    def data(self) -> str | None:
        """Checksum of the task's folder, or revision of the data on the hub."""
        return self.facts["fingerprint"].get("data")

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

    def against(self, other: Result) -> Comparison | None:
        """Paired test of this result against another, as `compare`; None where their items are not the same."""
        same = self.data == other.data and self.facts["sample"] == other.facts["sample"]
        return compare(self.items, other.items) if same and self.items and other.items else None


@dataclass(frozen=True)
class MeanComparison:
    """The mean of one column against that of another.

    Attributes:
        test: Of the mean over `tasks`; its `n` counts the items of all of them.
        tasks: Tasks whose items pair.
        unpaired: Tasks that both columns have and whose items do not pair: no part of the test.
    """

    test: Comparison
    tasks: list[str]
    unpaired: list[str]


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

    def data_of(self, task: str) -> dict[str | None, list[str]]:
        """Checksum of a task's data to the columns that were scored on them: more than one where the data changed."""
        found: dict[str | None, list[str]] = {}
        for column in self.columns:
            if (task, column) in self.by_cell:
                found.setdefault(self.by_cell[task, column].data, []).append(column)
        return found

    def on_different_data(self) -> list[str]:
        """Of each task whose columns were scored on different data a line that says which can be compared."""
        lines = []
        for _, task in self.tasks:
            data = self.data_of(task)
            if len(data) > 1:
                groups = "; ".join(f"{', '.join(columns)} on {checksum}" for checksum, columns in data.items())
                lines.append(f"{task} was scored on different data (checksums), evaluate it again to compare: {groups}")
        return lines

    def common_tasks(self, columns: Sequence[str]) -> list[str]:
        """Tasks that every one of the columns was scored on: the only ones to average over."""
        return [task for _, task in self.tasks if all((task, column) in self.by_cell for column in columns)]

    def mean(self, column: str, tasks: Sequence[str]) -> tuple[float, tuple[float, float] | None]:
        """Mean score over tasks, and its bootstrap interval where every task has one."""
        return self._mean(column, [[task] for task in tasks])

    def mean_of_kinds(self, column: str, tasks: Sequence[str]) -> tuple[float, tuple[float, float] | None]:
        """As `mean`, but every kind of task counts the same, however many of the tasks are of it."""
        return self._mean(column, list(self.kinds(tasks).values()))

    def kinds(self, tasks: Sequence[str]) -> dict[str, list[str]]:
        """The tasks by their kind."""
        kinds: dict[str, list[str]] = {}
        for kind, task in self.tasks:
            if task in tasks:
                kinds.setdefault(kind, []).append(task)
        return kinds

    def _mean(self, column: str, groups: Sequence[Sequence[str]]) -> tuple[float, tuple[float, float] | None]:
        cells = [[self.by_cell[task, column] for task in group] for group in groups]
        score = float(np.mean([np.mean([cell.score for cell in group]) for group in cells]))
        samples = [[cell.samples for cell in group if cell.samples is not None] for group in cells]
        if any(len(known) < len(group) for known, group in zip(samples, cells, strict=True)):
            return score, None
        return score, interval(np.mean([np.mean(group, axis=0) for group in samples], axis=0))

    def costs(self) -> list[dict[str, Any]]:
        """What a text costs in every column, as a mean over the tasks that all columns have; nan where unknown.

        Keys: ``column``, ``score``, ``tokens_per_text``, ``seconds_per_text``, ``flops_per_text``.
        """
        common = self.common_tasks(self.columns)
        if not common:
            return []
        rows = []
        for column in self.columns:
            costs = [self.by_cell[task, column].facts["cost"] for task in common]
            mean = {
                key: float(np.mean([cost[key] or np.nan for cost in costs]))
                for key in ("tokens_per_text", "seconds_per_text", "flops_per_text")
            }
            rows.append({"column": column, "score": self.mean(column, common)[0], **mean})
        return rows

    def own_step(self, model: str) -> int | None:
        """The checkpoint's K where that was scored, else the largest that was; None for a model without steps."""
        steps = self.steps(model)
        own = {r.facts.get("own_steps") for r in self.plain if r.label == model}  # older results do not say
        return next((step for step in steps if step is not None and step in own), steps[-1])

    def compared(self) -> list[tuple[str, str]]:
        """Pairs of columns worth a comparison.

        Every model with steps at its `own_step`, against its own smallest K (0 where that was scored) and against every
        other model.
        """
        pairs = []
        models = self.models()
        own = {model: _column(model, self.own_step(model)) for model in models}
        for at, model in enumerate(models):
            steps = self.steps(model)
            if steps == [None]:
                continue
            smallest = _column(model, steps[0])
            others = [smallest, *(own[other] for other in models[at + 1 :])]
            pairs += [(own[model], other) for other in others if other != own[model]]
        return pairs

    def comparison(self, task: str, a: str, b: str) -> Comparison | None:
        """Paired test of two columns on a task; None where their items do not pair."""
        first, second = self.by_cell.get((task, a)), self.by_cell.get((task, b))
        return None if first is None or second is None else first.against(second)

    def mean_comparison(self, a: str, b: str) -> MeanComparison | None:
        """Paired test of the mean over tasks of two columns; None where no task's items pair."""
        tasks = self.common_tasks([a, b])
        found = {task: self.comparison(task, a, b) for task in tasks}
        tests = {task: test for task, test in found.items() if test is not None}
        if not tests:
            return None
        unpaired = [task for task in tasks if task not in tests]
        return MeanComparison(mean_of(list(tests.values())), list(tests), unpaired)

    def noise(self) -> list[dict[str, Any]]:
        """Scores of perturbed texts beside those of the same texts clean, with a paired test where their items pair.

        Keys: ``task``, ``kind`` and ``seed`` of the perturbation, ``heading`` (both), ``is`` (what it does),
        ``column``, ``clean``, ``noisy``, ``test`` (as `Comparison.as_percent` has it, or None).
        """
        rows = []
        for cell in self.all:
            clean = self.by_cell.get((cell.task, cell.column))
            if cell.facts["perturbation"] and clean is not None:
                kind, seed, test = cell.facts["perturbation"], cell.facts["seed"], cell.against(clean)
                rows.append(
                    {
                        "task": cell.task,
                        "kind": kind,
                        "seed": seed,
                        "heading": f"{kind} (seed {seed})",
                        "is": cell.facts["perturbation_is"],
                        "column": cell.column,
                        "clean": clean.score,
                        "noisy": cell.score,
                        "test": None if test is None else test.as_percent(),
                    }
                )
        place = {column: at for at, column in enumerate(self.columns)}
        return sorted(rows, key=lambda row: (row["heading"], row["task"], place[row["column"]]))

    def comparison_tables(self) -> list[dict[str, Any]]:
        """Of each pair of columns worth a comparison its tests by task, and of the mean where there are several.

        Keys: ``first``, ``second``, ``rows`` (each a ``task`` and its test), ``mean`` (a test and the ``count`` of
        tasks, or None), ``unpaired`` (tasks whose items do not pair). A test is as `Comparison.as_percent` has it.
        """
        tables = []
        for first, second in self.compared():
            overall = self.mean_comparison(first, second)
            if overall is None:
                continue
            found = [(task, self.comparison(task, first, second)) for task in overall.tasks]
            rows = [{"task": task, **test.as_percent()} for task, test in found if test is not None]
            mean = {"count": len(rows), **overall.test.as_percent()} if len(rows) > 1 else None
            tables.append({"first": first, "second": second, "rows": rows, "mean": mean, "unpaired": overall.unpaired})
        return tables


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


def _column(model: str, step: int | None) -> str:
    return model if step is None else f"{model} K={step}"


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
