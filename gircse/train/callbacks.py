"""What happens beside the training loop: step losses and speed in the logs, divergence stopped, K drawn at random.

Knows the trainer's events and the losses' latest values; knows nothing of data, recipes or how models are built.
"""

from __future__ import annotations

import json
import logging
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
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, sort_checkpoints

from gircse.errors import GircseError
from gircse.losses import ICRLoss
from gircse.model import GIRCSE

Report = Callable[[dict[str, float]], None]
"""Called with the trainer's logs: loss, gradient norm, learning rate, ``step_loss_1`` ... ``step_loss_K``, the mean of
these for every data set that had a batch as ``loss_of/NAME``, the answer loss of those that have one as
``answer_loss_of/NAME``, the mean cosine between the texts of its batches as ``cosine_of/NAME``, ``tokens_per_second``
and ``seconds_left``; after an evaluation ``eval_TASK`` and ``eval_mean``."""

EXPLODED = 10.0
"""A loss of this many times the running median of its data set is out of bounds."""

SMALL = 0.1
"""A median below this counts as this: where a data set is solved, a loss ten times as large means nothing."""

PATIENCE = 5
"""So many steps in a row out of bounds are a divergence, and so many batches of a data set a collapse; one or two are
hard batches."""

COLLAPSED = 0.99
"""A mean cosine between the texts of a batch above this is a collapse. An untrained SmolLM2-135M, whose vectors are
much alike, has up to 0.97 (docs/experiments.md)."""

WINDOW = 50
"""Batches of a data set that its running median is taken over."""

logger = logging.getLogger("gircse.train")


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


class Collapse:
    """Tells, once for every data set, that all its vectors have become alike.

    Where wrong answers cost more than right ones gain (a low temperature over noisy labels), none at all is the fastest
    way down: the same vector for every text, and a loss at chance. It does not explode, so nothing else tells.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, name: str, cosine: float) -> bool:
        """Take in a batch.

        Args:
            name: Of its data set.
            cosine: Mean between its texts.

        Returns:
            Whether it is the `PATIENCE`-th in a row above `COLLAPSED`, for the first time.
        """
        count = self._counts.get(name, 0)
        if count == PATIENCE:
            return False
        self._counts[name] = count + 1 if cosine > COLLAPSED else 0
        return self._counts[name] == PATIENCE


class StepLosses(TrainerCallback):
    """Adds L_1..L_K, L_0 and the loss of every data set to the logs, warns of a collapse, stops a run that diverges.

    It stops before the optimiser takes the step.

    Args:
        losses: By the name of their data set.
        report: Called with every log entry, in the first process only.
    """

    def __init__(self, losses: dict[str, ICRLoss], report: Report | None) -> None:
        self.losses, self.report = losses, report
        self.divergence, self.collapse = Divergence(), Collapse()
        self.values: dict[str, list[float]] = {}  # since the last log, by their names there
        self._begun_at = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun_at = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        for name, loss in self.losses.items():
            if loss.last_step_losses:
                measured = _measured(name, loss)
                loss.last_step_losses = []
                self._check(name, measured, step, args.output_dir, told=state.is_world_process_zero)
                for key, value in measured.items():  # K may differ from batch to batch: every step has its own mean
                    self.values.setdefault(key, []).append(value)
        if not _finite_gradients(kwargs["model"].parameters()):
            raise _diverged(f"the gradient at step {step} is not finite", args.output_dir, step - 1)

    def _check(self, name: str, measured: dict[str, float], step: int, output: str, *, told: bool) -> None:
        """Stop or warn, as a batch of a data set asks for."""
        if not all(map(math.isfinite, measured.values())):
            # The step before was still good, and its weights are those of the checkpoint before that.
            raise _diverged(f"the loss at step {step} is not a number", output, step - 2)
        since = self.divergence.add(name, measured[f"loss_of/{name}"], step)
        if since is not None:
            problem = f"the loss exploded: from step {since} on it is more than {EXPLODED:g} times its median"
            raise _diverged(problem, output, since - 2)
        cosine = measured[f"cosine_of/{name}"]
        if self.collapse.add(name, cosine) and told:
            logger.warning(
                "%s: its vectors have become alike (mean cosine %.3f at step %d), so it is not learned any more; "
                "give it a higher temperature (0.1), more negatives, or leave it out",
                name,
                cosine,
                step,
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None:
            return
        if "loss" in logs:
            means = {key: round(sum(values) / len(values), 4) for key, values in self.values.items()}
            logs |= dict(sorted(means.items(), key=_order_in_logs))
            self.values = {}
        if "train_runtime" in logs and self._begun_at:
            return  # the trainer's summary divides what was done since a run went on by all of its steps
        if self.report is not None and state.is_world_process_zero:
            self.report({**logs, "step": state.global_step, "max_steps": state.max_steps})


def _measured(name: str, loss: ICRLoss) -> dict[str, float]:
    """What a loss has to say of its latest batch, by the names of the logs."""
    steps = loss.last_step_losses
    measured = {f"step_loss_{k}": value for k, value in enumerate(steps, start=1)}
    measured |= {f"loss_of/{name}": sum(steps) / len(steps), f"cosine_of/{name}": loss.last_mean_cosine}
    if loss.last_prompt_loss is not None:
        measured["step_loss_0"] = loss.last_prompt_loss
    if loss.last_answer_loss is not None:
        measured[f"answer_loss_of/{name}"] = loss.last_answer_loss
    return measured


def _order_in_logs(item: tuple[str, float]) -> tuple[int, int]:
    """Step losses first, in the order of the steps; the rest keeps its own."""
    kind, _, step = item[0].rpartition("_")
    return (0, int(step)) if kind == "step_loss" else (1, 0)


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
        distribution: ``uniform``, or ``log_uniform``: each K in proportion to 1/K.
    """

    def __init__(self, model: GIRCSE, bounds: tuple[int, int], seed: int, distribution: str = "uniform") -> None:
        self.model, self.bounds, self.seed, self.own = model, bounds, seed, model.num_steps
        self.distribution = distribution

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        generator, (least, most) = random.Random(f"{self.seed}/{state.global_step}"), self.bounds
        if self.distribution == "uniform":
            self.model.num_steps = generator.randint(least, most)
        else:
            choices = range(least, most + 1)
            self.model.num_steps = generator.choices(choices, [1 / steps for steps in choices])[0]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.num_steps = self.own


class TimeLimit(TrainerCallback, ExportableState):
    """Ends a run in time, with its learning rate where the schedule has it at the end.

    The schedule goes by whichever is further on, steps or minutes, so a run that has time enough is as it would be
    without. Minutes count from the first step; those before an interruption are kept in the checkpoint.

    Args:
        minutes: Of the whole run.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes, self.spent, self._began = minutes, 0.0, 0.0

    def state(self) -> dict[str, Any]:
        return {"args": {"minutes": self.minutes}, "attributes": {"spent": self.spent}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (kept := state.stateful_callbacks.get(type(self).__name__)) is not None:  # as a list where it is resumed
            self.spent = (kept[0] if isinstance(kept, list) else kept)["attributes"]["spent"]
        else:  # of a checkpoint from before there was a limit; the next is to keep the minutes
            state.stateful_callbacks[type(self).__name__] = self.state()
        self._began = time.perf_counter() - 60 * self.spent
        scheduler = getattr(kwargs["lr_scheduler"], "scheduler", kwargs["lr_scheduler"])
        scheduler.lr_lambdas = [self._hurried(schedule, state.max_steps) for schedule in scheduler.lr_lambdas]

    def _hurried(self, schedule: Callable[[int], float], max_steps: int) -> Callable[[int], float]:
        def by_time(step: int) -> float:
            return schedule(max(step, min(max_steps, math.floor(max_steps * self.spent / self.minutes))))

        return by_time

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Comes before the scheduler's own step."""
        spent = [(time.perf_counter() - self._began) / 60]
        if args.world_size > 1:  # all processes end at the same step
            broadcast_object_list(spent)
        self.spent = spent[0]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.spent >= self.minutes and state.global_step < state.max_steps:
            control.should_log = control.should_save = control.should_training_stop = True
            # As at the end of all steps: else the weights of the steps since the last evaluation were never scored.
            control.should_evaluate = control.should_evaluate or args.eval_strategy != IntervalStrategy.NO
            if state.is_world_process_zero:
                logger.warning(
                    "training.max_minutes: %g minutes are over at step %d of %d",
                    self.minutes,
                    state.global_step,
                    state.max_steps,
                )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and "seconds_left" in logs:
            logs["seconds_left"] = round(min(logs["seconds_left"], max(0.0, 60 * (self.minutes - self.spent))), 1)


class OwnIntervals(TrainerCallback):
    """A resumed run logs, saves and is evaluated as its own recipe says, not as that of the checkpoint did."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


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
