"""A training run: recipe -> model, losses and the sentence-transformers trainer -> a saved model.

Knows how the rooms are put together; the loop, checkpoints and schedules are the trainer's.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from transformers import ProgressCallback
from transformers.trainer_utils import sort_checkpoints

from gircse.errors import GircseError, MissingExtraError, UsageError
from gircse.hardware import is_out_of_memory
from gircse.losses import CachedICRLoss, ICRLoss
from gircse.model import DEFAULT_INSTRUCTION, GIRCSE
from gircse.train.callbacks import (
    OwnIntervals,
    RandomSteps,
    Report,
    SaveEvaluated,
    Speed,
    StepLosses,
    TimeLimit,
    random_state_kept,
)
from gircse.train.data import SameSourceBatches, load_training_data, steps_an_epoch
from gircse.train.facts import check_facts, note_facts, start_facts, training_facts
from gircse.train.fused_lora import fused_lora
from gircse.train.recipe import (
    Recipe,
    check_positions,
    check_trackers,
    check_widths,
    chosen_trackers,
    warm_up_advice,
)
from gircse.train.same_texts import KeysBesideTexts
from gircse.train.start import check_fit, saved_model
from gircse.train.teacher import keep_vectors, load_teacher

try:
    from accelerate import PartialState  # the trainer imports it only when it starts
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
except ImportError as error:
    raise MissingExtraError("training", "train") from error

if TYPE_CHECKING:
    from datasets import DatasetDict

    from gircse.train.evaluation import TaskFolderEvaluator

logger = logging.getLogger(__name__)

LOADERS = 4
"""Processes that tokenise batches for a GPU."""


def train(recipe: Recipe, output: Path, *, resume: bool = False, report: Report | None = None) -> GIRCSE:
    """Run a recipe and save the model to `output`.

    Args:
        recipe: What to do.
        output: Folder of the finished model; checkpoints go to ``output/checkpoints``.
        resume: Go on from the last checkpoint, if there is one.
        report: Called with every log entry.

    Returns:
        The trained model.

    Raises:
        UsageError: `output` is a file, holds an earlier run and `resume` is False, or a run that was begun with another
            recipe or other data.
        MissingExtraError: The recipe asks for an evaluation and the extra ``eval`` is missing.
        GircseError: Data or backbone are not to be had, the run diverged, or memory ran out.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; name a folder for the trained model")
    checkpoints = output / "checkpoints"
    last = _last_checkpoint(checkpoints)
    if not resume and output.exists() and any(output.iterdir()):
        raise UsageError(f"{output} holds an earlier run; continue it with --resume or choose another folder")
    if last is None and (output / "gircse_config.json").is_file():
        raise UsageError(
            f"{output} holds a finished model and no checkpoint to go on from, and would be replaced; choose another "
            "folder"
        )
    check_trackers(recipe)
    torch.manual_seed(recipe.seed)  # LoRA's initial weights
    # At τ = 0.02 the softmax of easy negatives, and so their gradients, underflow to denormal numbers, which CPUs
    # compute slowly and which contribute nothing.
    torch.set_flush_denormal(True)
    evaluator = make_evaluator(recipe)  # first of all: what it lacks should not come to light after hours
    model = make_model(recipe)  # before the teacher reads all texts for minutes: a wrong start_from is told at once
    facts = model.encoder.training_facts | training_facts(recipe)
    begun_with = facts | {"backbone_sha256": model.encoder.reference.sha256}
    if last is not None:
        check_facts(begun_with, checkpoints)
    teacher = None
    if (name := recipe.loss.teacher) is not None:
        teacher = keep_vectors(load_teacher(name), name, checkpoints / "teacher")
    data = load_training_data(recipe, teacher, tokenizer=model.tokenizer)
    del teacher  # and its memory
    model.encoder.training_facts = facts | {"examples": sum(len(rows) for rows in data.values())}
    model.max_seq_length = recipe.data.max_seq_length
    trainer = _make_trainer(recipe, model, data, checkpoints, evaluator, report)
    model.model_card_data.train_datasets = []  # the card has the recipe's sources
    if last is None and trainer.is_world_process_zero():  # by now all processes have seen that the folder was empty
        note_facts(begun_with, checkpoints)
    try:
        with fused_lora(model, model.encoder.packed_weights):
            trainer.train(resume_from_checkpoint=last if resume else None)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise GircseError(
            f"out of memory with batches of {recipe.training.batch_size} rows of up to {recipe.data.max_seq_length} "
            "tokens; go on with --resume and training.micro_batch_size (the same gradients, a second forward pass), or "
            "start again with a lower training.batch_size or data.max_seq_length"
        ) from error
    model.encoder.packed_weights.drop()  # half of them served gradients
    model.encoder.step_graphs.drop()
    model.encoder.training_facts["steps"] = trainer.state.global_step  # fewer than planned where time was short
    if evaluator is not None:
        best = {"step": trainer.state.best_global_step, "mean": trainer.state.best_metric}
        model.encoder.training_facts["best"] = best
    model.max_seq_length = recipe.model.max_seq_length
    if trainer.is_world_process_zero():
        model.save_pretrained(str(output))
        shutil.rmtree(checkpoints / "teacher", ignore_errors=True)
    return model


def _make_trainer(
    recipe: Recipe,
    model: GIRCSE,
    data: DatasetDict,
    checkpoints: Path,
    evaluator: TaskFolderEvaluator | None,
    report: Report | None,
) -> _Trainer:
    losses = make_losses(recipe, model, [str(name) for name in data])
    arguments = _arguments(recipe, checkpoints)
    steps = steps_an_epoch(recipe, {str(name): len(rows) for name, rows in data.items()}, arguments.world_size)
    if advice := warm_up_advice(recipe, math.ceil(steps * recipe.training.epochs)):
        logger.warning(advice)
    in_logs = [Speed(model, losses.values()), StepLosses(losses, report)]
    if (minutes := recipe.training.max_minutes) is not None:
        in_logs.insert(1, TimeLimit(minutes))
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        loss=losses,
        evaluator=evaluator,
        callbacks=[*in_logs, OwnIntervals(), SaveEvaluated()],
    )
    trainer.max_seq_length = recipe.model.max_seq_length
    trainer.remove_callback(ProgressCallback)  # it writes the losses to standard output, where results belong
    trainer.add_callback(_Progress())
    if bounds := recipe.training.random_steps:
        trainer.add_callback(RandomSteps(model, bounds, recipe.seed, recipe.training.steps_distribution))
    # What adds to the logs comes first: the trackers are in the list already, and would not see it.
    trainer.callback_handler.callbacks.sort(key=lambda callback: callback not in in_logs)
    return trainer


def is_first_process() -> bool:
    """Whether this process, of those that train together, is the one that speaks for all."""
    return PartialState().is_main_process


def leave_processes() -> None:
    """End the process group, where there is one: its threads abort a process that ends while they run."""
    PartialState().destroy_process_group()


def last_step(output: Path) -> int:
    """The step of the checkpoint that a run in `output` would go on from; 0 where there is none."""
    last = _last_checkpoint(output / "checkpoints")
    return 0 if last is None else int(last.rsplit("-", 1)[-1])


def _last_checkpoint(checkpoints: Path) -> str | None:
    """The last whole one: the trainer writes its state last, and a kill or a full disk may have come before."""
    found = sort_checkpoints(str(checkpoints)) if checkpoints.is_dir() else []
    for path in reversed(found):
        try:
            json.loads((Path(path) / "trainer_state.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            logger.warning("%s is damaged; the checkpoint before it counts", path)
        else:
            return path
    return None


class _Progress(ProgressCallback):
    """The trainer's progress bar, with the losses on standard error too."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {key: round(value, 4) for key, value in (logs or {}).items() if isinstance(value, float)}
            self.training_bar.write(str(shown), file=sys.stderr)


class _Trainer(SentenceTransformerTrainer):
    """The trainer, whose evaluations do not change the random numbers of training."""

    data_collator_class = KeysBesideTexts
    max_seq_length: int  # of a saved model; training may cut texts earlier

    def _save(self, *args: Any, **kwargs: Any) -> None:
        if not self.args.should_save:  # as in transformers' trainer: else all processes would write the same files
            return
        model: Any = self.model
        trained, model.max_seq_length = model.max_seq_length, self.max_seq_length
        try:
            super()._save(*args, **kwargs)
        finally:
            model.max_seq_length = trained

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with random_state_kept():  # even an empty data loader draws from them
            return super().evaluate(*args, **kwargs)


def make_evaluator(recipe: Recipe) -> TaskFolderEvaluator | None:
    """What scores the model during training; None where the recipe asks for nothing.

    Raises:
        MissingExtraError: The extra ``eval`` is missing.
        GircseError: A task is not to be had.
    """
    if recipe.evaluation is None:
        return None
    from gircse.train.evaluation import TaskFolderEvaluator

    return TaskFolderEvaluator(recipe.evaluation, seed=recipe.seed, max_seq_length=recipe.model.max_seq_length)


def make_model(recipe: Recipe) -> GIRCSE:
    """The recipe's model before training.

    Raises:
        GircseError: The backbone, or the model to start from, is not to be had or does not fit the recipe.
    """
    model = _untrained(recipe) if recipe.start_from is None else _trained_before(recipe, recipe.start_from)
    check_widths(recipe, model.encoder.get_embedding_dimension())
    check_positions(recipe, model.encoder.decoder.max_positions)
    model.encoder.configure(**asdict(recipe.refinement()))
    model.prompts["query"] = model.format_instruction(recipe.query_instruction or DEFAULT_INSTRUCTION)
    return model


def _untrained(recipe: Recipe) -> GIRCSE:
    """The recipe's backbone, with fresh LoRA layers where it asks for some."""
    config = recipe.refinement()
    lora = recipe.lora and LoraConfig(
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",  # peft then leaves the LM head alone
    )
    return GIRCSE.from_backbone(
        recipe.backbone,
        num_steps=config.num_steps,
        pooling=config.pooling,
        temperature=config.temperature,
        max_seq_length=config.max_seq_length,
        lora=lora,
        full_finetune=lora is None,
        dtype=getattr(torch, recipe.training.dtype),
    )


def _trained_before(recipe: Recipe, place: str) -> GIRCSE:
    """The model to start from, its adapter or weights trainable again."""
    model = GIRCSE(saved_model(place), dtype=getattr(torch, recipe.training.dtype))
    encoder, backbone = model.encoder, model.encoder.backbone
    configs: Any = backbone.peft_config.values() if encoder.has_adapter else ()
    check_fit(recipe, place, encoder.reference, [(own.r, own.lora_alpha, own.lora_dropout) for own in configs])
    encoder.training_facts = {"start": start_facts(place, model)}
    encoder.unfreeze()
    return model


def make_losses(recipe: Recipe, model: GIRCSE, names: list[str]) -> dict[str, ICRLoss]:
    """The loss of every data set, by its name ``file/task``."""
    settings, micro_batch = recipe.loss, recipe.training.micro_batch_size
    options: dict[str, Any] = settings.model_dump(exclude={"teacher"})
    options["gather_across_devices"] = recipe.training.gather_across_devices
    if micro_batch is not None:
        options["mini_batch_size"] = micro_batch
    kind = ICRLoss if micro_batch is None else CachedICRLoss
    losses = {}
    for name in names:
        source = recipe.data.source_of(name)
        temperature = source.temperature or settings.temperature
        options |= {"in_batch_negatives": source.in_batch_negatives, "temperature": temperature}
        options["answer_weight"] = 0.0 if source.answer is None else settings.answer_weight
        losses[name] = kind(model, **options)
    return losses


def _arguments(recipe: Recipe, checkpoints: Path) -> SentenceTransformerTrainingArguments:
    settings = recipe.training
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=settings.schedule,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is no number must stop the run, not be averaged away
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=2,
        dataloader_drop_last=True,
        multi_dataset_batch_sampler="proportional",
        seed=recipe.seed,
        data_seed=recipe.seed,
        # Texts are tokenised beside the steps; on a CPU the steps would wait for the cores.
        dataloader_num_workers=LOADERS if torch.cuda.is_available() else 0,
        # Said aloud, or the processes of torchrun would not find each other on CPUs, and train one model each.
        use_cpu=not torch.accelerator.is_available(),
        report_to=chosen_trackers(recipe) or "none",
        disable_tqdm=False,
    )
    if settings.gather_across_devices:  # candidates are shared column by column, which sources may differ in
        arguments.multi_dataset_batch_sampler = partial(SameSourceBatches, processes=arguments.world_size)
    if recipe.evaluation is not None:
        # Set afterwards: the constructor would tie `every` to `save_every`, but every evaluation saves a checkpoint.
        arguments.set_evaluate(strategy="steps", steps=recipe.evaluation.every, delay=0)
        arguments.load_best_model_at_end = True
        arguments.metric_for_best_model, arguments.greater_is_better = "eval_mean", True
    return arguments
