"""What happens beside the training loop: step losses and speed in the logs, divergence stopped, K drawn at random.

Knows the trainer's events and the losses' latest values; knows nothing of data, recipes or how models are built.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import sort_checkpoints

from gircse.errors import GircseError
from gircse.losses import ICRLoss
from gircse.model import GIRCSE

Report = Callable[[dict[str, float]], None]
"""Called with the trainer's logs: loss, gradient norm, learning rate, ``step_loss_1`` ... ``step_loss_K``, the mean of
these for every data set that had a batch as ``loss_of/NAME``, the answer loss of those that have one as
``answer_loss_of/NAME``, ``tokens_per_second`` and ``seconds_left``; after an evaluation ``eval_TASK`` and
``eval_mean``."""

EXPLODED = 10.0
"""A loss of this many times the running median of its data set is out of bounds."""

SMALL = 0.1
"""A median below this counts as this: where a data set is solved, a loss ten times as large means nothing."""

PATIENCE = 5
"""So many steps in a row out of bounds are a divergence; one or two are a hard batch."""

WINDOW = 50
"""Batches of a data set that its running median is taken over."""


class Divergence:
    """Tells when the losses have exploded.

    Data sets differ in how hard they are, so a loss is compared with those of its own. A data set's first `PATIENCE`
    batches are compared with nothing.
    """

    def __init__(self) -> None:
        self._recent: dict[str, deque[float]] = {}
        self._since: int | None = None
        self._count = 0

    def add(self, name: str, loss: float, step: int) -> int | None:
        """Take in the loss of a step.

        Args:
            name: Of the batch's data set.
            loss: Finite.
            step: Counted from 1.

        Returns:
            The first step that was out of bounds, once `PATIENCE` were in a row; else None.
        """
        recent = self._recent.setdefault(name, deque(maxlen=WINDOW))
        if len(recent) >= PATIENCE:
            if loss <= EXPLODED * max(median(recent), SMALL):
                self._since, self._count = None, 0
            else:
                self._since, self._count = self._since or step, self._count + 1
                return self._since if self._count >= PATIENCE else None  # and the median stays what it was
        recent.append(loss)
        return None


class StepLosses(TrainerCallback):
    """Adds L_1..L_K, L_0 and the loss of every data set to the logs, and stops a run that diverges.

    It stops before the optimiser takes the step.

    Args:
        losses: By the name of their data set.
        report: Called with every log entry, in the first process only.
    """

    def __init__(self, losses: dict[str, ICRLoss], report: Report | None) -> None:
        self.losses, self.report = losses, report
        self.divergence = Divergence()
        self.sums: list[float] = []
        self.counts: list[int] = []
        self.by_name: dict[str, list[float]] = {}
        self.answers: dict[str, list[float]] = {}
        self.prompts: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        for name, loss in self.losses.items():
            if values := loss.last_step_losses:
                self._add(values)
                loss.last_step_losses = []
                if loss.last_answer_loss is not None:
                    self.answers.setdefault(name, []).append(loss.last_answer_loss)
                if loss.last_prompt_loss is not None:
                    self.prompts.append(loss.last_prompt_loss)
                besides = (loss.last_prompt_loss or 0.0, loss.last_answer_loss or 0.0)
                if not all(map(math.isfinite, (*values, *besides))):
                    # The step before was still good, and its weights are those of the checkpoint before that.
                    raise _diverged(f"the loss at step {step} is not a number", args.output_dir, step - 2)
                mean = sum(values) / len(values)
                self.by_name.setdefault(name, []).append(mean)
                since = self.divergence.add(name, mean, step)
                if since is not None:
                    problem = f"the loss exploded: from step {since} on it is more than {EXPLODED:g} times its median"
                    raise _diverged(problem, args.output_dir, since - 2)
        if not _finite_gradients(kwargs["model"].parameters()):
            raise _diverged(f"the gradient at step {step} is not finite", args.output_dir, step - 1)

    def _add(self, values: list[float]) -> None:
        """K may differ from batch to batch: every step has a mean of its own."""
        missing = max(0, len(values) - len(self.sums))
        self.sums, self.counts = self.sums + [0.0] * missing, self.counts + [0] * missing
        for index, value in enumerate(values):
            self.sums[index] += value
            self.counts[index] += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None:
            return
        if "loss" in logs:
            means = (total / count for total, count in zip(self.sums, self.counts, strict=True))
            if self.prompts:
                logs["step_loss_0"] = round(sum(self.prompts) / len(self.prompts), 4)
            logs |= {f"step_loss_{k}": round(mean, 4) for k, mean in enumerate(means, start=1)}
            logs |= {f"loss_of/{name}": round(sum(own) / len(own), 4) for name, own in self.by_name.items()}
            logs |= {f"answer_loss_of/{name}": round(sum(own) / len(own), 4) for name, own in self.answers.items()}
            self.sums, self.counts, self.by_name, self.answers, self.prompts = [], [], {}, {}, []
        if self.report is not None and state.is_world_process_zero:
            self.report({**logs, "step": state.global_step, "max_steps": state.max_steps})


class Speed(TrainerCallback):
    """Adds ``tokens_per_second`` and ``seconds_left`` to the logs.

    A text counts as its prompt's tokens, cut as training cuts them, and K soft tokens. The speed is that of training
    steps, of all processes together; the time left is the run's pace so far, evaluations and checkpoints included.

    Args:
        model: The model that is trained; its K is read at every batch.
        losses: Whose batches are counted.
    """

    def __init__(self, model: GIRCSE, losses: Iterable[ICRLoss]) -> None:
        self.model = model
        self.tokens, self.seconds = 0, 0.0
        self.first: tuple[int, float] | None = None
        """Step and time at which this process began."""
        self.step_began = 0.0
        for loss in losses:
            loss.register_forward_pre_hook(self._count)

    def _count(self, loss: nn.Module, arguments: tuple[Any, ...]) -> None:
        columns = list(arguments[0])
        embedded = columns[:-1] if isinstance(loss, ICRLoss) and loss.answer_weight else columns
        masks = [column["attention_mask"] for column in embedded]  # (B, N) each
        self.tokens += sum(int(mask.sum()) + len(mask) * self.model.num_steps for mask in masks)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_began = time.perf_counter()
        self.first = self.first or (state.global_step, self.step_began)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.step_began

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or self.first is None:
            return
        step, began = self.first
        pace = (time.perf_counter() - began) / max(1, state.global_step - step)
        logs["tokens_per_second"] = round(self.tokens * args.world_size / max(self.seconds, 1e-9), 1)
        logs["seconds_left"] = round(pace * (state.max_steps - state.global_step), 1)
        self.tokens, self.seconds = 0, 0.0


class RunLog:
    """A `Report` that appends to a file, one JSON object a line.

    A killed run may have logged steps beyond its last checkpoint, which the resumed run takes again: with the first new
    entry those are dropped, and so is a line that the kill cut off.

    Args:
        path: The file; its folder is made with the first entry.
        step: Of the checkpoint that the run goes on from; 0 for a new one.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path, self.step, self._begun = path, step, False

    def __call__(self, entry: dict[str, float]) -> None:
        if not self._begun:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._drop_later()
            self._begun = True
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _drop_later(self) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if self._is_before(line)]
        if kept != lines:
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            os.replace(partial, self.path)  # whole or not at all

    def _is_before(self, line: str) -> bool:
        try:
            return line.endswith("\n") and json.loads(line)["step"] <= self.step
        except (ValueError, KeyError, TypeError):
            return False


class RandomSteps(TrainerCallback):
    """Draws the K of every batch, with the seed and the step alone.

    So all processes draw the same, and so does a resumed run. Outside of a training step the model has its own K.

    Args:
        model: The model that is trained.
        bounds: The least and the largest K.
        seed: The recipe's.
    """

    def __init__(self, model: GIRCSE, bounds: tuple[int, int], seed: int) -> None:
        self.model, self.bounds, self.seed, self.own = model, bounds, seed, model.num_steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.num_steps = random.Random(f"{self.seed}/{state.global_step}").randint(*self.bounds)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.num_steps = self.own


class SaveEvaluated(TrainerCallback):
    """Saves a checkpoint with every evaluation, so that the best one is there to go back to."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or control.should_evaluate


def _diverged(problem: str, checkpoints: str, step: int) -> GircseError:
    """The error of a run that diverged, with the last checkpoint up to a step.

    A resumed run has the learning rate of its checkpoint, so the way on is a new run from the checkpoint's weights.
    """
    good = [path for path in sort_checkpoints(checkpoints) if int(path.rsplit("-", 1)[-1]) <= step]
    if not good:
        return GircseError(f"{problem}; start again with a lower training.learning_rate (no checkpoint is from before)")
    return GircseError(
        f"{problem}; go on from the last good checkpoint with a lower training.learning_rate, in a new folder: "
        f"--set start_from={good[-1]}"
    )


def _finite_gradients(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether all are numbers. They are clipped by now, which leaves NaN where the norm was none or infinite."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return not gradients or bool(torch.isfinite(nn.utils.get_total_norm(gradients)))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the global random states back at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
