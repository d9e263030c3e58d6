"""ICRLoss against its formula written out, its masks, and its gradients."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from gircse.errors import UsageError
from gircse.losses import ICRLoss, combine_steps
from gircse.model import GIRCSE

ANCHORS = ["who wrote it", "what is a cat", "where is rome"]
POSITIVES = ["an author did", "an animal", "in italy"]
NEGATIVES = ["nobody did", "a machine", "on the moon"]
MORE = ["he sang it", "a stone", "in peru"]


def columns(model: GIRCSE, *texts: list[str]) -> list[dict[str, torch.Tensor]]:
    return [model.preprocess(column) for column in texts]


def by_hand(
    model: GIRCSE, texts: list[list[str]], tau: float, weight: float, keep: list[list[int]]
) -> tuple[float, list[float]]:
    """The paper's formula, in plain loops. `keep` lists the candidates of each row, its own positive first."""
    steps = [torch.tensor(model.encode_steps(column)) for column in texts]
    candidates = torch.cat(steps[1:])
    losses = []
    for k in range(steps[0].shape[1]):
        total = 0.0
        for row, indices in enumerate(keep):
            scores = [float(F.cosine_similarity(steps[0][row, k], candidates[j, k], dim=0)) / tau for j in indices]
            total += math.log(sum(math.exp(score - scores[0]) for score in scores))
        losses.append(total / len(keep))
    penalty = [max(0.0, math.log(b) - math.log(a)) for a, b in pairwise(losses)]
    return sum(losses) / len(losses) + weight * sum(penalty) / len(penalty), losses


@pytest.mark.parametrize("weight", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("extra", [[], [NEGATIVES], [NEGATIVES, MORE]])
def test_it_is_the_papers_formula(model: GIRCSE, weight: float, extra: list[list[str]]) -> None:
    texts = [ANCHORS, POSITIVES, *extra]
    loss = ICRLoss(model, temperature=0.5, refinement_weight=weight)
    count = 3 * (1 + len(extra))
    keep = [[row, *(j for j in range(count) if j != row)] for row in range(3)]
    expected, steps = by_hand(model, texts, 0.5, weight, keep)
    with torch.no_grad():
        assert float(loss(columns(model, *texts))) == pytest.approx(expected, rel=1e-4)
    assert loss.last_step_losses == pytest.approx(steps, rel=1e-4)


def test_temperature_and_penalty_are_honoured() -> None:
    losses = torch.tensor([1.0, 2.0, 0.5])
    assert float(combine_steps(losses, 0.0)) == pytest.approx(3.5 / 3)
    assert float(combine_steps(losses, 2.0)) == pytest.approx(3.5 / 3 + 2 * math.log(2) / 2)
    assert float(combine_steps(torch.tensor([1.0]), 9.0)) == 1.0
    assert float(combine_steps(torch.tensor([0.0, 0.0]), 1.0)) == 0.0, "a solved batch has no penalty and no NaN"


def test_identical_positives_are_not_negatives(model: GIRCSE) -> None:
    """Rows 0 and 1 share their positive; row 2's negative is row 0's anchor."""
    texts = [ANCHORS, ["an author did", "an author did", "in italy"], ["nobody did", "a machine", ANCHORS[0]]]
    keep = [[0, 2, 3, 4], [1, 2, 3, 4, 5], [2, 0, 1, 3, 4, 5]]
    expected, _ = by_hand(model, texts, 0.5, 1.0, keep)
    with torch.no_grad():
        assert float(ICRLoss(model, 0.5)(columns(model, *texts))) == pytest.approx(expected, rel=1e-4)


def test_without_in_batch_negatives_only_the_rows_own_count(model: GIRCSE) -> None:
    texts = [ANCHORS, POSITIVES, NEGATIVES, MORE]
    keep = [[row, 3 + row, 6 + row] for row in range(3)]
    expected, _ = by_hand(model, texts, 0.5, 1.0, keep)
    loss = ICRLoss(model, 0.5, in_batch_negatives=False)
    with torch.no_grad():
        assert float(loss(columns(model, *texts))) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UsageError, match="needs a negative"):
        loss(columns(model, ANCHORS, POSITIVES))


def test_padding_of_the_columns_changes_nothing(model: GIRCSE) -> None:
    loss = ICRLoss(model, 0.5)
    plain = columns(model, ANCHORS, POSITIVES)
    padded = [{key: F.pad(value, (0, 7)) for key, value in column.items()} for column in plain]
    with torch.no_grad():
        assert float(loss(padded)) == pytest.approx(float(loss(plain)), rel=1e-5)


def test_every_step_is_trained(model: GIRCSE) -> None:
    """The gradient through the cache and the soft tokens agrees with a finite difference."""
    model.encoder.backbone.requires_grad_(True)
    loss = ICRLoss(model, 0.5)
    batch = columns(model, ANCHORS, POSITIVES, NEGATIVES)
    loss(batch).backward()
    parameter = model.encoder.backbone.model.layers[0].self_attn.v_proj.weight  # type: ignore[union-attr]
    assert parameter.grad is not None
    direction = torch.randn_like(parameter, generator=None) / parameter.numel() ** 0.5
    slope, step = float((parameter.grad * direction).sum()), 1e-2
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            parameter.add_(direction, alpha=sign * step)
            values.append(float(loss(batch)))
            parameter.add_(direction, alpha=-sign * step)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.05, abs=1e-4)


def test_zero_steps_is_plain_info_nce(model: GIRCSE) -> None:
    model.num_steps = 0
    a, b = (torch.tensor(model.encode(texts)) for texts in (ANCHORS, POSITIVES))
    scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.1
    with torch.no_grad():
        loss = float(ICRLoss(model, 0.1, refinement_weight=7.0)(columns(model, ANCHORS, POSITIVES)))
    assert loss == pytest.approx(float(F.cross_entropy(scores, torch.arange(3))), rel=1e-4)


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"refinement_weight": -1.0}])
def test_wrong_settings_are_refused(model: GIRCSE, wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        ICRLoss(model, **wrong)  # type: ignore[arg-type]
