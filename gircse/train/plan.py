"""What a recipe would do, before it does it: examples, steps, token lengths, memory and time.

Knows arithmetic and the tokenizer; loads no weights and trains nothing. Memory and time are estimates: they count
matrix products and the tensors that the backward pass keeps, nothing else.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gircse.backbones import resolve_backbone
from gircse.train.data import load_training_data
from gircse.train.recipe import Recipe, check_trackers

SAMPLE = 500
"""Rows tokenised of every source: enough for a histogram."""

BUCKETS = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class TrainingPlan:
    """What a recipe would do.

    Attributes:
        examples: Rows of each source, by ``file/task``.
        steps: Optimiser steps.
        columns: Texts of a row, the largest number of any source.
        histogram: Share of texts by token length: (upper bound, or None for longer; share).
        longest_share: Share of texts that `data.max_seq_length` cuts.
        mean_tokens: Mean length of a text after cutting.
        parameters: Of the backbone.
        trained_parameters: Of them, or of the LoRA layers, those that are trained.
        flops_per_step: Multiplications and additions of one step.
        memory_bytes: Estimated peak: weights, optimiser, gradients, and what one micro-batch keeps for its backward.
        seconds_per_step: At this machine's measured matrix rate; a lower bound.
        matrix_flops: That rate, operations a second.
        evaluation: What is scored during training and when, as `describe_evaluation` says it; None for nothing.
    """

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


def plan_training(recipe: Recipe) -> TrainingPlan:
    """Read the data, tokenise a sample, and estimate.

    Raises:
        MissingExtraError: The recipe asks for an evaluation and the extra ``eval`` is missing.
        GircseError: As `gircse.train.run.train` for data, evaluation tasks and backbone.
    """
    check_trackers(recipe)
    evaluation = None
    if recipe.evaluation is not None:
        from gircse.train.evaluation import describe_evaluation

        evaluation = describe_evaluation(recipe.evaluation)
    data = load_training_data(recipe)
    place = resolve_backbone(recipe.backbone).path
    tokenizer = AutoTokenizer.from_pretrained(place)
    limit = recipe.data.max_seq_length
    lengths: list[int] = []
    for rows in data.values():
        sample = rows[:SAMPLE]
        for column in rows.column_names:
            lengths += [len(ids) for ids in tokenizer(sample[column], verbose=False).input_ids]
    cut = [min(length, limit) for length in lengths]
    columns = max(len(rows.column_names) for rows in data.values())
    steps = sum(len(rows) // recipe.training.batch_size for rows in data.values())

    config = AutoConfig.from_pretrained(place)
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    head = backbone.get_input_embeddings().weight.numel()  # type: ignore[union-attr]
    linears = [module for module in backbone.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    layers = sum(module.weight.numel() for module in linears)
    lora = recipe.lora
    trained = parameters
    if lora is not None:
        trained = sum(lora.r * (module.in_features + module.out_features) for module in linears)

    mean_tokens = sum(cut) / len(cut)
    texts = columns * recipe.training.batch_size
    num_steps = recipe.model.num_steps
    least, most = recipe.training.random_steps or (num_steps, num_steps)
    flops = texts * step_flops(mean_tokens, (least + most) / 2, layers, head, frozen=lora is not None)
    if recipe.training.micro_batch_size is not None:
        flops *= 4 / 3 if lora is None else 3 / 2  # one forward pass more
    rate = matrix_rate()
    element = 2 if recipe.training.dtype == "bfloat16" else 4
    group = min(recipe.training.micro_batch_size or texts, texts)
    kept = sum(module.in_features + module.out_features for module in linears) * element
    memory = (
        parameters * element
        + trained * 4 * (4 if lora is None else 3)
        + group * (mean_tokens + most) * kept
        + group * most * (head / config.hidden_size) * 3 * 4  # logits and softmax of every soft token
    )
    return TrainingPlan(
        examples={str(name): len(rows) for name, rows in data.items()},
        steps=math.ceil(steps * recipe.training.epochs),
        columns=columns,
        histogram=_histogram(lengths),
        longest_share=sum(length > limit for length in lengths) / len(lengths),
        mean_tokens=mean_tokens,
        parameters=parameters,
        trained_parameters=trained,
        flops_per_step=flops,
        memory_bytes=memory,
        seconds_per_step=flops / rate,
        matrix_flops=rate,
        evaluation=evaluation,
    )


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


def matrix_rate(size: int = 1024, repeats: int = 5) -> float:
    """Operations a second of a float32 matrix product here, the best of a few."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, b)
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
