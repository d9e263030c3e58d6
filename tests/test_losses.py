"""ICRLoss against its formula written out, its masks, and its gradients."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional as F

from gircse.errors import UsageError
from gircse.losses import CachedICRLoss, ICRLoss
from gircse.losses.icr import TeacherPairs, combine_steps, join_columns
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


def test_it_tells_how_alike_the_texts_of_a_batch_are(model: GIRCSE) -> None:
    last = torch.tensor(model.encode_steps([*ANCHORS, *POSITIVES]))[:, -1]
    pairs = [float(F.cosine_similarity(last[i], last[j], dim=0)) for i in range(6) for j in range(6) if i != j]
    for loss in (ICRLoss(model), CachedICRLoss(model, mini_batch_size=2)):
        loss(columns(model, ANCHORS, POSITIVES))
        assert loss.last_mean_cosine == pytest.approx(sum(pairs) / len(pairs), abs=1e-4)


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


@pytest.mark.parametrize("pooling", ["mean", "mean_with_prompt", "last"])
def test_the_prompts_state_may_be_a_step(model: GIRCSE, pooling: str) -> None:
    model.encoder.configure(pooling=pooling)
    batch = columns(model, ANCHORS, POSITIVES, NEGATIVES)
    keep = [[row, *(j for j in range(6) if j != row)] for row in range(3)]
    _, steps = by_hand(model, [ANCHORS, POSITIVES, NEGATIVES], 0.5, 2.0, keep)
    loss = ICRLoss(model, temperature=0.5, refinement_weight=2.0, prompt_step=True)
    with torch.no_grad():
        value = float(loss(batch))
        assert loss.last_prompt_loss is not None
        model.num_steps = 0
        encoder_only = float(loss(batch))
    assert loss.last_prompt_loss is None, "the only step is reported as L_1"
    every = [encoder_only, *steps]
    penalty = [max(0.0, math.log(b) - math.log(a)) for a, b in pairwise(every)]
    assert value == pytest.approx(sum(every) / len(every) + 2 * sum(penalty) / len(penalty), rel=1e-4)


@pytest.mark.parametrize("answers", [False, True])
def test_cached_gradients_equal_plain_ones_with_the_prompts_step(model: GIRCSE, answers: bool) -> None:
    batch = columns(model, ANCHORS, POSITIVES, *([["author", "animal", "italy"]] if answers else []))
    options: dict[str, Any] = {"answer_weight": 0.8} if answers else {}
    value = assert_cached_equals_plain(model, batch, 2, temperature=0.5, prompt_step=True, **options)
    if answers:  # a (K + 1)-th soft token, which was not written, is told nothing
        loss = ICRLoss(model, temperature=0.5, answer_weight=0.8)
        loss(batch)
        told = ICRLoss(model, temperature=0.5, answer_weight=0.8, prompt_step=True)
        assert float(told(batch).detach()) == pytest.approx(value, rel=1e-5)
        assert loss.last_answer_loss is not None
        assert told.last_answer_loss == pytest.approx(loss.last_answer_loss, rel=1e-5)


def test_gradients_of_soft_tokens_are_the_losses_to_choose(model: GIRCSE) -> None:
    batch = columns(model, ANCHORS, POSITIVES)
    head, weight = (model.get_parameter(f"0.backbone.{name}.weight") for name in ("lm_head", "model.norm"))
    gradients, values = [], []
    for kind in ("full", "bounded", "none"):
        options: dict[str, Any] = {"temperature": 0.5, "soft_token_gradients": kind}
        values.append(assert_cached_equals_plain(model, batch, 2, **options))
        model.zero_grad()
        ICRLoss(model, **options)(batch).backward()
        assert (head.grad is None) == (kind == "none"), "nothing teaches it what to write"
        assert weight.grad is not None
        gradients.append(weight.grad.clone())
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    for gradient in gradients[1:]:
        assert float((gradients[0] - gradient).norm()) > 0.05 * float(gradients[0].norm())


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


def test_positives_of_the_same_anchor_are_not_negatives(model: GIRCSE) -> None:
    """Rows 0 and 2 have one anchor, say with two translations; the one's hard negative stays the other's negative."""
    texts = [[ANCHORS[0], ANCHORS[1], ANCHORS[0]], POSITIVES, NEGATIVES]
    keep = [[0, 1, 3, 4, 5], [1, 0, 2, 3, 4, 5], [2, 1, 3, 4, 5]]
    expected, _ = by_hand(model, texts, 0.5, 1.0, keep)
    with torch.no_grad():
        assert float(ICRLoss(model, 0.5)(columns(model, *texts))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_texts_of_equal_keys_are_the_same_under_two_wordings(model: GIRCSE, cached: bool) -> None:
    """Rows 0 and 2 ask the same, rows 1 and 2 have one answer; their tokens say nothing of it."""
    texts = [["a: x", "b: y", "c: x"], ["a: one", "b: two", "c: two"], NEGATIVES]
    batch = columns(model, *texts)
    keys = [[1, 2, 1], [3, 4, 4], [5, 6, 7]]
    keyed = [{**column, "text_key": torch.tensor(own)} for column, own in zip(batch, keys, strict=True)]
    keep = [[0, 1, 3, 4, 5], [1, 0, 3, 4, 5], [2, 3, 4, 5]]
    expected, _ = by_hand(model, texts, 0.5, 1.0, keep)
    loss = CachedICRLoss(model, temperature=0.5, mini_batch_size=2) if cached else ICRLoss(model, 0.5)
    with torch.no_grad():
        assert float(loss.allowed_candidates(batch).sum()) == 18, "without keys nothing is known"
        assert float(ICRLoss(model, 0.5)(keyed)) == pytest.approx(expected, rel=1e-4)
    assert float(loss(keyed).detach()) == pytest.approx(expected, rel=1e-4)
    alike = columns(model, ANCHORS, [POSITIVES[0]] * 3)
    alike = [{**column, "text_key": torch.arange(3) + 3 * place} for place, column in enumerate(alike)]
    assert int(loss.allowed_candidates(alike).sum()) == 3, "what has the same tokens is the same, whatever its key"


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
    direction = torch.randn_like(parameter) / parameter.numel() ** 0.5
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


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 0.0}, {"refinement_weight": -1.0}, {"prompt_step": True, "step_weights": "linear"}],
)
def test_wrong_settings_are_refused(model: GIRCSE, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ICRLoss(model, **wrong)  # type: ignore[arg-type]


def test_the_last_step_alone(model: GIRCSE) -> None:
    """The paper's ablation: neither the earlier steps nor the penalty count."""
    loss = ICRLoss(model, 0.5, refinement_weight=9.0, stepwise=False)
    with torch.no_grad():
        assert float(loss(columns(model, ANCHORS, POSITIVES))) == pytest.approx(loss.last_step_losses[-1])


def test_rows_of_a_class_are_no_negatives_of_each_other(model: GIRCSE) -> None:
    keep = [[0, 2, 3, 4, 5], [1, 2, 3, 4, 5], [2, 0, 1, 3, 4, 5]]  # hard negatives have no class and stay
    expected, _ = by_hand(model, [ANCHORS, POSITIVES, NEGATIVES], 0.5, 1.0, keep)
    with torch.no_grad():
        batch = columns(model, ANCHORS, POSITIVES, NEGATIVES)
        assert float(ICRLoss(model, 0.5)(batch, torch.tensor([7, 7, 8]))) == pytest.approx(expected, rel=1e-4)


def test_classes_of_all_texts_leave_out_hard_negatives_too(model: GIRCSE) -> None:
    labels = torch.tensor([[7, 7, 8], [9, 7, 9], [8, 7, 7]])
    keep = [[0, 3, 4], [1, 0, 2, 3, 5], [2, 0, 1, 4, 5]]  # a row's own positive stays, whatever its class
    expected, _ = by_hand(model, [ANCHORS, POSITIVES, NEGATIVES], 0.5, 1.0, keep)
    with torch.no_grad():
        batch = columns(model, ANCHORS, POSITIVES, NEGATIVES)
        assert float(ICRLoss(model, 0.5)(batch, labels)) == pytest.approx(expected, rel=1e-4)
        assert float(ICRLoss(model, 0.5)(batch)) != pytest.approx(expected, rel=1e-3)


def test_too_similar_negatives_are_left_out(model: GIRCSE) -> None:
    texts = [ANCHORS, POSITIVES, NEGATIVES]
    last = [F.normalize(torch.tensor(model.encode_steps(column))[:, -1], dim=1) for column in texts]
    cosines = last[0] @ torch.cat(last[1:]).T  # (3, 6)
    margin = 0.05
    keep = [
        [row, *(j for j in range(6) if j != row and cosines[row, j] <= cosines[row, row] + margin)] for row in range(3)
    ]
    assert any(len(indices) < 6 for indices in keep), "the case must leave something out"
    expected, _ = by_hand(model, texts, 0.5, 1.0, keep)
    with torch.no_grad():
        loss = ICRLoss(model, 0.5, false_negative_margin=margin)
        assert float(loss(columns(model, *texts))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("widths", [[8], [8, 32]])
def test_matryoshka_averages_over_widths_the_whole_one_included(model: GIRCSE, widths: list[int]) -> None:
    torch.manual_seed(0)
    anchors, candidates = torch.randn(3, 2, 32), torch.randn(3, 2, 32)
    allowed = torch.ones(3, 3, dtype=torch.bool)
    plain, loss = ICRLoss(model, 0.5), ICRLoss(model, 0.5, matryoshka_dims=widths)
    parts = [plain.step_losses(anchors[..., :width], candidates[..., :width], allowed) for width in (8, 32)]
    assert not torch.allclose(parts[0], parts[1])
    torch.testing.assert_close(loss.step_losses(anchors, candidates, allowed), (parts[0] + parts[1]) / 2)
    with pytest.raises(UsageError, match="32 dimensions cannot be cut to 33"):
        ICRLoss(model, 0.5, matryoshka_dims=[33]).step_losses(anchors, candidates, allowed)


def test_later_steps_may_count_more() -> None:
    losses = torch.tensor([1.0, 2.0, 0.5])
    expected = (1 * 1.0 + 2 * 2.0 + 3 * 0.5) / 6
    assert float(combine_steps(losses, 0.0, step_weights="linear")) == pytest.approx(expected)
    assert float(combine_steps(losses, 1.0, step_weights="linear")) == pytest.approx(expected + math.log(2) / 2)
    assert float(combine_steps(losses[:1], 1.0, step_weights="linear")) == 1.0


def test_a_detached_reference_gets_no_gradient_of_the_penalty() -> None:
    """The value is the same. L_1 is the reference of a step that is worse, and would be pushed up."""
    gradients = []
    for detach in (False, True):
        losses = torch.tensor([1.0, 2.0, 0.5], requires_grad=True)
        total = combine_steps(losses, 3.0, detach_reference=detach)
        assert total.item() == pytest.approx(3.5 / 3 + 3 * math.log(2) / 2)
        total.backward()
        assert losses.grad is not None
        gradients.append(losses.grad.tolist())
    assert gradients[0] == pytest.approx([1 / 3 - 3 / 2 / 1.0, 1 / 3 + 3 / 2 / 2.0, 1 / 3])
    assert gradients[1] == pytest.approx([1 / 3, 1 / 3 + 3 / 2 / 2.0, 1 / 3])


@pytest.mark.parametrize("options", [{"step_weights": "linear"}, {"detach_reference": True}])
def test_the_loss_honours_both(model: GIRCSE, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    embeddings = torch.randn(9, 3, 32)
    embeddings[3:6, 0] = embeddings[:3, 0]  # the first step is the best, so that there is a penalty
    embeddings.requires_grad_(True)
    plain, switched = ICRLoss(model, 0.5), ICRLoss(model, 0.5, **options)
    allowed = plain.allowed_candidates(columns(model, ANCHORS, POSITIVES, NEGATIVES))
    (a,) = torch.autograd.grad(plain.contrast(embeddings, allowed), embeddings)
    (b,) = torch.autograd.grad(switched.contrast(embeddings, allowed), embeddings)
    assert not torch.allclose(a, b, rtol=1e-3)
    with pytest.raises(UsageError, match="uniform, linear"):
        ICRLoss(model, step_weights="square")


def teacher_by_hand(
    model: GIRCSE, texts: list[list[str]], labels: torch.Tensor, tau: float, warmth: float, pairs: str
) -> list[float]:
    """KL(teacher ‖ student) at every step, in plain loops."""
    steps = torch.cat([torch.tensor(model.encode_steps(column)) for column in texts])
    taught = torch.cat(labels.unbind(dim=1))
    size = len(texts[0])

    def log_softmax(scores: list[float]) -> list[float]:
        total = math.log(sum(map(math.exp, scores)))
        return [score - total for score in scores]

    def divergence(k: int, text: int, others: list[int]) -> float:
        student = [float(F.cosine_similarity(steps[text, k], steps[other, k], dim=0)) / tau for other in others]
        teacher = [float(F.cosine_similarity(taught[text], taught[other], dim=0)) / warmth for other in others]
        return sum(math.exp(p) * (p - q) for p, q in zip(log_softmax(teacher), log_softmax(student), strict=True))

    every = range(len(steps))
    divergences = []
    for k in range(steps.shape[1]):
        found = [divergence(k, text, list(every[size:])) for text in range(size)]
        mean = sum(found) / size
        if pairs == "all":
            found = [divergence(k, text, [j for j in every if j % size != text % size]) for text in every]
            mean = (mean + sum(found) / len(every)) / 2
        divergences.append(mean)
    return divergences


@pytest.mark.parametrize("pairs", get_args(TeacherPairs))
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_teacher_has_its_share_of_every_step(model: GIRCSE, share: float, pairs: str) -> None:
    texts = [ANCHORS, POSITIVES, NEGATIVES]
    labels = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0))
    keep = [[row, *(j for j in range(6) if j != row)] for row in range(3)]
    _, contrasts = by_hand(model, texts, 0.5, 0.0, keep)
    divergences = teacher_by_hand(model, texts, labels, 0.5, 0.2, pairs)
    expected = [(1 - share) * a + share * b for a, b in zip(contrasts, divergences, strict=True)]
    loss = ICRLoss(model, 0.5, teacher_weight=share, teacher_temperature=0.2, teacher_pairs=pairs)
    with torch.no_grad():
        total = float(loss(columns(model, *texts), labels))
    assert loss.last_step_losses == pytest.approx(expected, rel=1e-4)
    assert total == pytest.approx(float(combine_steps(torch.tensor(expected), 1.0)), rel=1e-4)


def assert_cached_equals_plain(
    model: GIRCSE,
    batch: list[dict[str, torch.Tensor]],
    mini_batch: int,
    labels: torch.Tensor | None = None,
    **options: Any,
) -> float:
    """Values and gradients of all weights; the value is returned."""
    model.encoder.backbone.requires_grad_(True)
    model.encoder.packed_weights.enabled = False  # the pass without gradients would round otherwise than that with them
    found = []
    for loss in (ICRLoss(model, **options), CachedICRLoss(model, mini_batch_size=mini_batch, **options)):
        model.zero_grad()
        value = loss(batch, labels)
        value.backward()
        found.append((value.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert len(found[0][1]) == len(found[1][1]) > 0
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(a.norm()) + 1e-7
    return found[0][0]


@pytest.mark.parametrize("pairs", get_args(TeacherPairs))
def test_cached_gradients_equal_plain_ones_with_a_teacher(model: GIRCSE, pairs: str) -> None:
    batch = columns(model, ANCHORS, POSITIVES, NEGATIVES)
    labels = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"temperature": 0.5, "teacher_weight": 0.6, "teacher_temperature": 0.2}
    options["teacher_pairs"] = pairs
    value = assert_cached_equals_plain(model, batch, 4, labels, **options)
    with torch.no_grad():
        assert ICRLoss(model, **options)(batch).item() != pytest.approx(value, rel=1e-3), "without labels"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("mini_batch", [1, 4, 9])
def test_cached_gradients_equal_plain_ones(backbone: Path, dropout: float, mini_batch: int) -> None:
    """Micro-batches of 1, of a part that mixes columns, and of everything; dropout is replayed."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False)
    model = GIRCSE.from_backbone(str(backbone), num_steps=3, lora=lora, device="cpu")
    model.encoder.packed_weights.enabled = False  # the pass without gradients would round otherwise than that with them
    model.train()
    batch = columns(model, ANCHORS, POSITIVES, NEGATIVES)

    def gradients(value: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        value.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    cached = CachedICRLoss(model, mini_batch_size=mini_batch, temperature=0.5)
    torch.manual_seed(1)
    value = cached(batch)
    found = gradients(value)

    # The plain loss over the same micro-batches, which draw the same random numbers, all graphs kept.
    torch.manual_seed(1)
    joined = join_columns(batch)
    parts = [
        {key: rows[start : start + mini_batch] for key, rows in joined.items()} for start in range(0, 9, mini_batch)
    ]
    embeddings = torch.cat([model(part)["step_embeddings"] for part in parts])
    plain = ICRLoss(model, 0.5)
    same = plain.contrast(embeddings, plain.allowed_candidates(batch))
    expected = gradients(same)
    assert float(value.detach()) == pytest.approx(float(same.detach()), rel=1e-5)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-7


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(backbone: Path, tmp_path: Path) -> None:
    """Negatives gathered across processes: averaged gradients equal those of the whole batch in one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gather_worker", str(backbone), str(tmp_path)]
    running = [
        subprocess.Popen([*command, str(rank)], env={**environment, "RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    for kind, pairs in (("plain", "anchors"), ("plain", "all"), ("cached", "all")):
        expected = torch.load(tmp_path / f"alone-{pairs}.pt")
        found = torch.load(tmp_path / f"{kind}-{pairs}.pt")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert float((found[name] - gradient).norm()) <= 1e-3 * float(gradient.norm()) + 1e-7, (kind, name)
