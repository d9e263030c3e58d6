"""What a recipe would do, before it does it: settings, examples, steps, token lengths, memory and time.

Knows arithmetic, the tokenizer and what a run needs to find; loads no weights and trains nothing. Memory and time are
estimates: they count matrix products, and weights and the tensors that the backward pass keeps; nothing else.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gircse.backbones import resolve_backbone
from gircse.decoders import Decoder
from gircse.errors import GircseError
from gircse.fast.packed_weights import SHARE_OF_MEMORY, PackedWeights, packing_library
from gircse.hardware import free_memory
from gircse.other_models import MINILM, is_on_hub, minilm_folder
from gircse.train.data import load_training_data, steps_an_epoch, text_columns
from gircse.train.recipe import (
    Recipe,
    check_positions,
    check_trackers,
    check_widths,
    chosen_trackers,
    largest_num_steps,
)
from gircse.train.start import check_saved_model, saved_model

SAMPLE = 500
"""Rows tokenised of every source: enough for a histogram."""

BUCKETS = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class TrainingPlan:
    """What a recipe would do.

    Attributes:
        settings: K or its bounds, λ, τ, gradients of soft tokens, learning rate, schedule, LoRA sizes and trackers.
        examples: Rows of each source, by ``file/task``.
        steps: Optimiser steps.
        columns: Texts of a row, the largest number of any source.
        histogram: Share of texts by token length: (upper bound, or None for longer; share).
        longest_share: Share of texts that `data.max_seq_length` cuts.
        mean_tokens: Mean length of a text of a batch after cutting.
        parameters: Of the backbone.
        trained_parameters: Of them, or of the LoRA layers, those that are trained.
        flops_per_step: Multiplications and additions of one step.
        memory_bytes: Estimated peak: weights and their packed copies, optimiser, gradients, and what the longest
            micro-batch, padded, keeps for its backward pass.
        seconds_per_step: At this machine's measured matrix rate; a lower bound.
        matrix_flops: That rate, operations a second.
        evaluation: What is scored during training and when, as `describe_evaluation` says it; None for nothing.
    """

    settings: dict[str, Any]
    examples: dict[str, int]
    steps: int
    columns: int
    histogram: list[tuple[int | None, float]]
    longest_share: float
    mean_tokens: float
    parameters: int
    trained_parameters: int
    flops_per_step: float
    memory_bytes: float
    seconds_per_step: float
    matrix_flops: float
    evaluation: dict[str, Any] | None


@dataclass(frozen=True)
class DryRun:
    """What could be told of a recipe without running it.

    Attributes:
        settings: As `TrainingPlan.settings`.
        checked: What the run needs and will find: trackers, start_from, teacher, evaluation, backbone, data.
        problems: What it will not find, and why.
        plan: None where backbone or data are missing.
    """

    settings: dict[str, Any]
    checked: list[str]
    problems: dict[str, GircseError]
    plan: TrainingPlan | None


def plan_training(recipe: Recipe) -> TrainingPlan:
    """Read the data, tokenise a sample, and estimate.

    Raises:
        MissingExtraError: The recipe asks for an evaluation and the extra ``eval`` is missing.
        GircseError: Something that the run needs is missing: data, evaluation tasks, backbone, trackers, the model to
            start from, the teacher.
    """
    result = try_recipe(recipe)
    for error in result.problems.values():
        raise error
    assert result.plan is not None, "without problems there is a plan"
    return result.plan


def try_recipe(recipe: Recipe) -> DryRun:
    """Look for all that a run needs; where backbone and data are there, estimate what it would do. Raises nothing."""
    needs: dict[str, Callable[[], Any]] = {"trackers": partial(check_trackers, recipe)}
    if recipe.start_from is not None:
        needs["start_from"] = partial(_find_start, recipe, recipe.start_from)
    if recipe.loss.teacher is not None:
        needs["teacher"] = partial(_find_teacher, recipe.loss.teacher)
    if recipe.evaluation is not None:
        needs["evaluation"] = partial(_describe_evaluation, recipe)
    found: dict[str, Any] = {}
    problems: dict[str, GircseError] = {}
    needs |= {
        "backbone": partial(_find_backbone, recipe),
        "data": lambda: _find_data(recipe, found.get("backbone")),
    }
    for name, look in needs.items():
        try:
            found[name] = look()
        except GircseError as error:
            problems[name] = error
    plan = None
    if "backbone" in found and "data" in found:
        plan = _estimate(recipe, found["backbone"], found["data"], found.get("evaluation"))
    return DryRun(describe_settings(recipe), list(found), problems, plan)


def describe_settings(recipe: Recipe) -> dict[str, Any]:
    """What people look at first: K or its bounds, λ, τ, how gradients go back, the optimiser, trackers."""
    training, lora = recipe.training, recipe.lora
    return {
        "num_steps": recipe.model.num_steps if training.random_steps is None else list(training.random_steps),
        **({"steps_distribution": training.steps_distribution} if training.random_steps else {}),
        "refinement_weight": recipe.loss.refinement_weight if recipe.loss.stepwise else 0.0,
        "temperature": recipe.loss.temperature,
        **({"soft_token_gradients": recipe.loss.soft_token_gradients} if recipe.model.num_steps else {}),
        "learning_rate": training.learning_rate,
        "schedule": training.schedule,
        "warmup_steps": training.warmup_steps,
        **({"max_minutes": training.max_minutes} if training.max_minutes else {}),
        "lora": None if lora is None else lora.model_dump(),
        "trackers": chosen_trackers(recipe),
    }


def _find_start(recipe: Recipe, place: str) -> None:
    found = saved_model(place)
    if found is not None and not _is_there(found):
        raise GircseError(f"{place} is no saved model, in a folder or on the hub; train it first, or correct the name")
    try:
        resolve_backbone(recipe.backbone)
    except GircseError:
        return  # which is told of as the backbone's
    check_saved_model(recipe, place)


def _find_teacher(name: str) -> None:
    if name.lower() == MINILM:
        minilm_folder()
    elif not _is_there(name):
        raise GircseError(f"{name} is no SentenceTransformer, in a folder or on the hub; correct the name")


def _is_there(place: str) -> bool:
    if Path(place).is_dir():
        return any((Path(place) / name).is_file() for name in ("modules.json", "config.json"))
    return bool(is_on_hub(place))


def _describe_evaluation(recipe: Recipe) -> dict[str, Any]:
    from gircse.train.evaluation import describe_evaluation

    assert recipe.evaluation is not None
    return describe_evaluation(recipe.evaluation)


@dataclass(frozen=True)
class _Backbone:
    """A backbone without its weights.

    Attributes:
        path: Of its files.
        model: On the meta device.
    """

    path: Path
    model: Any


def _find_backbone(recipe: Recipe) -> _Backbone:
    path = resolve_backbone(recipe.backbone).path
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    check_widths(recipe, config.hidden_size)
    check_positions(recipe, Decoder.from_model(model).max_positions)
    return _Backbone(path, model)


def _find_data(recipe: Recipe, backbone: _Backbone | None) -> Any:
    tokenizer = None if backbone is None else AutoTokenizer.from_pretrained(backbone.path)
    data = load_training_data(recipe, tokenizer=tokenizer)
    _steps_an_epoch(recipe, data)
    return data


def _steps_an_epoch(recipe: Recipe, data: Any) -> int:
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # as `accelerate launch` sets it
    return steps_an_epoch(recipe, {str(name): len(rows) for name, rows in data.items()}, processes)


@dataclass(frozen=True)
class _SourceLengths:
    """What a batch of one source is made of.

    Attributes:
        rows: Of the source.
        columns: Texts of a row.
        lengths: Tokens of a sample of the texts, as they are.
        cut: The same, cut to what training reads.
    """

    rows: int
    columns: int
    lengths: list[int]
    cut: list[int]


def _measure_lengths(recipe: Recipe, place: Path, data: Any) -> list[_SourceLengths]:
    tokenizer = AutoTokenizer.from_pretrained(place)
    sources = []
    for rows in data.values():
        sample, columns = rows[:SAMPLE], text_columns(rows)
        lengths = [len(ids) for name in columns for ids in tokenizer(sample[name], verbose=False).input_ids]
        cut = [min(length, recipe.data.max_seq_length) for length in lengths]
        sources.append(_SourceLengths(len(rows), len(columns), lengths, cut))
    return sources


def _estimate(recipe: Recipe, found: _Backbone, data: Any, evaluation: dict[str, Any] | None) -> TrainingPlan:
    sources = _measure_lengths(recipe, found.path, data)
    lengths = [length for source in sources for length in source.lengths]
    steps = _steps_an_epoch(recipe, data)

    backbone, config = found.model, found.model.config
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    head = backbone.get_input_embeddings().weight.numel()  # type: ignore[union-attr]
    linears = [module for module in backbone.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    layers = sum(module.weight.numel() for module in linears)
    lora = recipe.lora
    trained = parameters
    if lora is not None:
        trained = sum(lora.r * (module.in_features + module.out_features) for module in linears)

    rows = sum(source.rows for source in sources)
    texts = recipe.training.batch_size * sum(source.rows * source.columns for source in sources) / rows
    tokens = recipe.training.batch_size / rows * sum(
        source.rows * source.columns * sum(source.cut) / len(source.cut) for source in sources
    )  # fmt: skip
    flops = texts * step_flops(tokens / texts, _mean_steps(recipe), layers, head, frozen=lora is not None)
    if recipe.training.micro_batch_size is not None:
        flops *= 4 / 3 if lora is None else 3 / 2  # one forward pass more
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rate = matrix_rate(dtype=getattr(torch, recipe.training.dtype), device=device)
    element = 2 if recipe.training.dtype == "bfloat16" else 4
    of_a_token = sum(module.in_features + module.out_features for module in linears) * element
    if element < 4 and device == "cpu":  # attention keeps what it computes in float32
        of_a_token += config.num_hidden_layers * config.hidden_size * 6 * 4
    packed = 2 * element * (layers + head) if _packs_weights(recipe) else 0  # as they are, and transposed for gradients
    memory = (
        parameters * element
        + min(packed, SHARE_OF_MEMORY * free_memory())
        + trained * 4 * (4 if lora is None else 3)
        + max(_kept_bytes(recipe, source, of_a_token, head // config.hidden_size) for source in sources)
    )
    return TrainingPlan(
        settings=describe_settings(recipe),
        examples={str(name): len(rows) for name, rows in data.items()},
        steps=math.ceil(steps * recipe.training.epochs),
        columns=max(source.columns for source in sources),
        histogram=_histogram(lengths),
        longest_share=sum(length > recipe.data.max_seq_length for length in lengths) / len(lengths),
        mean_tokens=tokens / texts,
        parameters=parameters,
        trained_parameters=trained,
        flops_per_step=flops,
        memory_bytes=memory,
        seconds_per_step=flops / rate,
        matrix_flops=rate,
        evaluation=evaluation,
    )


def _bounds_of_steps(recipe: Recipe) -> tuple[int, int]:
    return recipe.training.random_steps or (recipe.model.num_steps, recipe.model.num_steps)


def _mean_steps(recipe: Recipe) -> float:
    least, most = _bounds_of_steps(recipe)
    if recipe.training.steps_distribution == "uniform":
        return (least + most) / 2
    return (most - least + 1) / sum(1 / steps for steps in range(least, most + 1))


def _packs_weights(recipe: Recipe) -> bool:
    """Whether training keeps packed copies of frozen weights, as it does on a CPU for the products that they serve."""
    library = packing_library(getattr(torch, recipe.training.dtype))
    return (
        not torch.cuda.is_available()
        and library is not None
        and PackedWeights().enabled
        and recipe.lora is not None
        and (largest_num_steps(recipe) > 0 or library.most == sys.maxsize)
    )


def _kept_bytes(recipe: Recipe, source: _SourceLengths, of_a_token: int, vocabulary: int) -> float:
    """What a micro-batch of a source's longest texts keeps for its backward pass: inputs and outputs of the layers of
    every token, padding included, logits and softmax of every soft token.
    """
    texts = source.columns * recipe.training.batch_size
    texts = min(recipe.training.micro_batch_size or texts, texts)
    most = largest_num_steps(recipe)
    return texts * ((max(source.cut) + most) * of_a_token + most * vocabulary * 3 * 4)


def step_flops(tokens: float, num_steps: float, layers: int, head: int, *, frozen: bool) -> float:
    """Operations of one text in a training step: 2 a weight and token forward, the same backward per gradient kept.

    Args:
        tokens: Of the prompt.
        num_steps: K, or its mean; each soft token passes the layers once and the vocabulary twice (head and embedding
            table).
        layers: Weights of the linear layers.
        head: Weights of the LM head.
        frozen: With frozen weights the backward pass computes gradients of the inputs only.
    """
    forward = 2 * layers * (tokens + num_steps) + 4 * head * num_steps
    return forward * (2 if frozen else 3)


def matrix_rate(
    size: int | None = None, repeats: int = 5, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> float:
    """Operations a second of a matrix product, by packed weights where they serve it, the best of a few.

    Args:
        size: Rows and columns; 1,024 on a CPU and 8,192 on a GPU where not given.
        repeats: Products.
        dtype: Of both matrices.
        device: Where.
    """
    on_gpu = torch.device(device).type == "cuda"
    size = size or (8192 if on_gpu else 1024)
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    library = packing_library(dtype)
    multiply = partial(torch.mm, a, b)
    if library is not None and library.most >= size and not on_gpu:
        multiply = partial(library.multiply, a, library.reorder(b, size), b, None)
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        multiply()
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _histogram(lengths: list[int]) -> list[tuple[int | None, float]]:
    shares: list[tuple[int | None, float]] = []
    below = 0
    for bound in BUCKETS:
        count = sum(length <= bound for length in lengths)
        shares.append((bound, (count - below) / len(lengths)))
        below = count
    return [*shares, (None, 1 - below / len(lengths))]
