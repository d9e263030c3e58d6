"""Scores while a model trains: tasks of local folders, as `gircse evaluate` scores them, as the trainer's evaluator.

Knows task folders and the model's K; knows nothing of the training loop, which calls the evaluator and keeps the best
checkpoint.
"""

from __future__ import annotations

import random
from contextlib import closing
from dataclasses import replace
from typing import Any, cast

import numpy as np
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

from gircse.errors import GircseError
from gircse.evaluate.encoder import GenerativeSource, StepEncoder, StepStore, model_meta
from gircse.evaluate.suites import parse_tasks, plan
from gircse.evaluate.tasks import OTHER_INSTRUCTION, PlannedTask
from gircse.model import GIRCSE
from gircse.train.callbacks import random_state_kept
from gircse.train.recipe import EvaluationSection

DEVELOPMENT_FILES = ("dev.jsonl", "validation.jsonl")
"""What development data are called in a task folder, the first that is there."""


def plan_evaluation(section: EvaluationSection) -> list[PlannedTask]:
    """The tasks of a recipe, their data not loaded yet.

    A facet task's control, the same labels under the other facets' instructions, is no goal and left out.

    Raises:
        GircseError: The folder, a task or a subset is not there, or does not say what it is.
    """
    if not section.folder.is_dir():
        raise GircseError(f"{section.folder}: no such folder; name that of the evaluation tasks with --eval-data")
    requests = parse_tasks(",".join(section.tasks))
    with random_state_kept():  # mteb's tasks set the seeds of everything
        tasks = [task for request in requests for task in plan(request, section.folder, section.limit)]
    tasks = [task for task in tasks if not task.name.endswith(OTHER_INSTRUCTION)]
    for task in tasks if section.split == "dev" else ():
        local = cast(Any, task.task)
        name = next((n for n in DEVELOPMENT_FILES if all((f / n).is_file() for f in local.folders.values())), None)
        if name is not None:
            local.description = replace(local.description, files=(name,))
    return tasks


def describe_evaluation(section: EvaluationSection) -> dict[str, Any]:
    """What will be scored and when, for people: task names with their files, limit, steps between two evaluations."""
    tasks = {}
    for task in plan_evaluation(section):
        description = cast(Any, task.task).description
        whole = description.kind == "Retrieval"
        tasks[task.name] = "all queries" if whole else ", ".join(description.files)
    return {"tasks": tasks, "limit": section.limit, "every": section.every}


class TaskFolderEvaluator(SentenceEvaluator):
    """Main scores of tasks at the model's own K, and their mean, 0 to 1.

    An evaluation changes nothing that training depends on: random states and the model's settings are put back.

    Args:
        section: Which tasks.
        seed: Of the samples.
        max_seq_length: Tokens read of a text, as at inference; training may read less.

    Raises:
        GircseError: As `plan_evaluation`, and a bad row of the data, which are all loaded here.
    """

    def __init__(self, section: EvaluationSection, *, seed: int, max_seq_length: int) -> None:
        import datasets

        super().__init__()
        self.primary_metric = "mean"
        self.max_seq_length = max_seq_length
        self.tasks = plan_evaluation(section)
        datasets.disable_progress_bars()
        with random_state_kept():
            for task in self.tasks:
                task.load(seed)

    def __call__(  # type: ignore[override]
        self, model: GIRCSE, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """The scores by task, and ``mean``. Arguments as sentence-transformers passes them."""
        trained_length, training = model.max_seq_length, model.training
        model.max_seq_length = self.max_seq_length
        try:
            with random_state_kept():
                source = GenerativeSource(model, [model.num_steps], "local/in-training", str(steps))
                scores = {task.name: _score(task, source) for task in self.tasks}
        finally:
            model.max_seq_length = trained_length
            model.train(training)
        return {**scores, "mean": sum(scores.values()) / len(scores)}


def _score(planned: PlannedTask, source: GenerativeSource) -> float:
    import mteb

    task, step = cast(Any, planned.task), source.steps[0]
    task.rng_state, task.np_rng = random.Random(task.seed), np.random.default_rng(task.seed)  # the same clusters always
    with closing(StepStore(source)) as store:
        encoder = StepEncoder(store, step, model_meta(source, step, {}), planned.instructions)
        found = mteb.evaluate(
            cast(Any, encoder),
            task,
            cache=None,
            encode_kwargs=cast(Any, {"batch_size": 32, "show_progress_bar": False}),
            show_progress_bar=False,
            co2_tracker=False,
        )
    return float(found.task_results[0].get_score())
