"""Iterative Contrastive Refinement, the training loss of generative embeddings.

Knows embeddings after every step; knows nothing of data files or trainers, nor which candidates are false negatives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.distributed import all_gather, all_gather_with_grad, get_rank
from torch import Tensor, nn
from torch.nn import functional as F

from gircse.errors import UsageError
from gircse.gradient_chain import check_soft_token_gradients
from gircse.losses.answer import answer_loss, answer_tokens
from gircse.losses.candidates import allowed_candidates

StepWeights = Literal["uniform", "linear"]
"""How the losses of the steps are averaged: all alike (the paper), or L_k in proportion to k."""

TeacherPairs = Literal["anchors", "all"]
"""What a teacher ranks: the candidates for each anchor, or also the texts of all other rows for each text."""

_NEVER = -1e4
"""A log probability that counts as 0 and, other than −∞, has differences."""


class ICRLoss(nn.Module):
    """A contrastive loss at every refinement step, plus a penalty where a step makes it worse.

    With L_k the InfoNCE loss between z_k of the queries and z_k of the passages,

        ``loss = mean_k L_k + λ · mean_{k<K} max(0, log L_{k+1} − log L_k)``

    (GIRCSE, section 3.3: stepwise contrastive loss and iterative refinement regularisation.) With ``num_steps`` of 0,
    or 1, it is plain InfoNCE: the encoder-only baseline is trained by the same code.

    Args:
        model: A GIRCSE model, or any SentenceTransformer whose features hold ``step_embeddings``.
        temperature: τ of the cosine similarities; the paper's 0.02.
        refinement_weight: λ >= 0, weight of the penalty; 0 leaves the stepwise loss alone.
        in_batch_negatives: Whether the other rows' positives and negatives are negatives too. False where rows of a
            batch share labels: then only a row's own negatives count, and every row needs at least one.
        stepwise: A loss at every step; False is the paper's ablation with L_K alone, which knows no penalty.
        step_weights: One of `StepWeights`: the weights of L_1..L_K in their mean. The penalty is the same for both.
        prompt_step: Whether the prompt's own state is a step too, which the paper's is not: L_0, of z_0 = h_0, counts
            like the others in the mean, and the penalty compares L_1 with it.
        detach_reference: No gradient to L_k in the penalty: it then pulls the later step down only, and does not also
            push the earlier one up.
        soft_token_gradients: What goes from a soft token back to the state that wrote it, one of
            `gircse.gradient_chain.SOFT_TOKEN_GRADIENTS`. ``full`` is the paper's; but in a backbone that has not been
            trained yet these gradients are many times larger than all others, and say little (docs/experiments.md).
            ``bounded`` keeps them as small as the others. With ``none`` every step learns to make the best of the
            tokens there are, and none to write others.
        false_negative_margin: Leave out candidates whose cosine to the anchor after the last step exceeds the
            positive's by more than this; None keeps them. A row's positive always stays.
        matryoshka_dims: Average L_k over embeddings cut to these widths, so that shortened vectors work as well. The
            whole width is always one of them.
        gather_across_devices: Candidates of all processes, and step losses averaged over them: the gradients are
            those of one process with the whole batch.
        teacher_weight: Share, 0 to 1, of the teacher in every L_k where the labels hold a teacher's embeddings:
            ``L_k = (1 − w) InfoNCE_k + w KL(teacher ‖ z_k)``, both over the candidates of the batch. The teacher's
            softmax knows no masks: it says itself which other candidates are as good.
        teacher_temperature: Of the teacher's cosine similarities.
        teacher_pairs: One of `TeacherPairs`. With ``all`` the divergence is the mean of two: of the candidates for each
            anchor, where a row's own positive outshines the rest, and of the texts of all other rows for each text,
            passages too, which tells how near texts are that are no pair.
        answer_weight: Weight of the `answer_loss` that is added. Above 0 the last column holds the answers to the
            anchors' instructions, which the anchors' soft tokens shall spell and which are not embedded.

    References:
        - Let LLMs Speak Embedding Languages: https://arxiv.org/abs/2509.24291
        - InfoNCE: https://arxiv.org/abs/1807.03748
        - Matryoshka Representation Learning: https://arxiv.org/abs/2205.13147
        - Distilling the Knowledge in a Neural Network: https://arxiv.org/abs/1503.02531
        - Answer is All You Need (instructions followed by answering them): https://arxiv.org/abs/2402.09642

    Inputs:
        +-------------------------------------------------+--------------------------------------------------------+
        | Texts                                           | Labels                                                 |
        +=================================================+========================================================+
        | (anchor, positive)                              | none, a class of each row, or a teacher's embeddings   |
        +-------------------------------------------------+--------------------------------------------------------+
        | (anchor, positive, negative_1, ..., negative_n) | of each row's texts: (B, columns, width)               |
        +-------------------------------------------------+--------------------------------------------------------+
        | either of these and, with an answer's weight,   |                                                        |
        | an answer                                       | the same; answers have no labels                       |
        +-------------------------------------------------+--------------------------------------------------------+

        A candidate with the same tokens as a row's positive, or as its anchor, is not a negative of that row, nor is
        the positive of another row with the same anchor or of the same class. Where features have a ``text_key``,
        (B,) int64, texts of equal keys are the same too.

    Relations:
        - ``MultipleNegativesRankingLoss`` is the case of a single step (and keeps identical positives as negatives).
        - `gircse.CachedICRLoss` is the same loss for batches that do not fit into memory.

    Raises:
        UsageError: A temperature of 0 or less, a negative λ or answer's weight, widths below 1, a teacher's weight
            outside 0 to 1, nothing to contrast with, or an answer without tokens.

    Example:
        >>> from gircse import GIRCSE, ICRLoss
        >>> from peft import LoraConfig
        >>> from sentence_transformers import SentenceTransformerTrainer
        >>> lora = LoraConfig(r=16, lora_alpha=64, target_modules="all-linear")
        >>> model = GIRCSE.from_backbone("smollm2-135m", lora=lora)
        >>> trainer = SentenceTransformerTrainer(model, train_dataset=dataset, loss=ICRLoss(model))
        >>> trainer.train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float = 0.02,
        refinement_weight: float = 1.0,
        in_batch_negatives: bool = True,
        *,
        stepwise: bool = True,
        step_weights: str = "uniform",
        prompt_step: bool = False,
        detach_reference: bool = False,
        soft_token_gradients: str = "full",
        false_negative_margin: float | None = None,
        matryoshka_dims: Sequence[int] | None = None,
        gather_across_devices: bool = False,
        teacher_weight: float = 0.5,
        teacher_temperature: float = 0.05,
        teacher_pairs: str = "anchors",
        answer_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if min(temperature, teacher_temperature) <= 0:
            raise UsageError(f"the loss temperature must be above 0, not {min(temperature, teacher_temperature)}")
        if not 0 <= teacher_weight <= 1:
            raise UsageError(f"teacher_weight must be between 0 and 1, not {teacher_weight}")
        if teacher_pairs not in get_args(TeacherPairs):
            raise UsageError(f"teacher_pairs must be one of {', '.join(get_args(TeacherPairs))}, not {teacher_pairs!r}")
        if refinement_weight < 0:
            raise UsageError(f"refinement_weight must be 0 or more, not {refinement_weight}")
        if answer_weight < 0:
            raise UsageError(f"answer_weight must be 0 or more, not {answer_weight}")
        if step_weights not in get_args(StepWeights):
            raise UsageError(f"step_weights must be one of {', '.join(get_args(StepWeights))}, not {step_weights!r}")
        check_soft_token_gradients(soft_token_gradients)
        if prompt_step and (not stepwise or step_weights == "linear"):
            raise UsageError(
                "prompt_step is one of the steps, and stepwise=False or step_weights='linear' leave it out"
            )
        if matryoshka_dims is not None and (not matryoshka_dims or min(matryoshka_dims) < 1):
            raise UsageError(f"matryoshka_dims must be widths of 1 or more, not {list(matryoshka_dims)}")
        self.model = model
        self.temperature = temperature
        self.refinement_weight = refinement_weight
        self.in_batch_negatives = in_batch_negatives
        self.stepwise = stepwise
        self.step_weights = step_weights
        self.prompt_step = prompt_step
        self.detach_reference = detach_reference
        self.false_negative_margin = false_negative_margin
        self.matryoshka_dims = None if matryoshka_dims is None else tuple(matryoshka_dims)
        self.gather_across_devices = gather_across_devices
        self.teacher_weight = teacher_weight
        self.teacher_temperature = teacher_temperature
        self.teacher_pairs = teacher_pairs
        self.answer_weight = answer_weight
        self.soft_token_gradients = soft_token_gradients
        self.last_step_losses: list[float] = []
        """L_1..L_K of the latest forward pass, for whoever reports progress."""
        self.last_prompt_loss: float | None = None
        """L_0 of that pass; None without `prompt_step`, and at K = 0, where it is the only one."""
        self.last_answer_loss: float | None = None
        """The answer loss of that pass, before its weight; None without answers."""
        self.last_mean_cosine = 0.0
        """Mean cosine similarity between the texts of that pass after the last step; near 1 they have collapsed."""

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            sentence_features: One batch a column: anchor, positive, negatives.
            labels: A class of each row, (B,), where rows of the same class are no negatives of each other; or of
                each row's texts, (B, columns), where no candidate of the anchor's class is a negative; or a teacher's
                embeddings of each row's texts, (B, columns, width); or None.

        Returns:
            A scalar.

        Raises:
            UsageError: The model is in training and nothing of it is trainable.
        """
        self._check_trainable()
        columns, answers = self._split_answers(sentence_features)
        allowed = self.allowed_candidates(columns, labels)
        # All columns in one pass: the soft tokens of queries and passages are written together.
        written = self._write(join_columns(columns))
        return self._combine(written, allowed, self.teacher_scores(labels), answers)

    def _check_trainable(self) -> None:
        wanted = self.model.training and torch.is_grad_enabled()
        if wanted and not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UsageError(
                "nothing of this model is trainable: call model.encoder.unfreeze(), or make it with "
                "GIRCSE.from_backbone(..., lora=...) or full_finetune=True"
            )

    def _split_answers(
        self, sentence_features: Iterable[dict[str, Tensor]]
    ) -> tuple[list[dict[str, Tensor]], list[list[int]] | None]:
        """The columns to embed, and the tokens of each row's answer where there are answers."""
        columns = [dict(features) for features in sentence_features]
        answers = None
        if self.answer_weight and columns:
            answers = answer_tokens(columns.pop(), self._encoder.tokenizer)
        if len(columns) < 2:
            raise UsageError("ICRLoss needs an anchor and a positive column, and optionally negatives")
        return columns, answers

    @property
    def _encoder(self) -> Any:
        """The module that writes soft tokens."""
        return self.model[0]

    def _write(self, features: dict[str, Tensor]) -> Tensor:
        """The embeddings after every step, (rows, K, d), or K + 1 with z_0; with answers followed by as many states."""
        if self.soft_token_gradients != "full":
            features = features | {"soft_token_gradients": self.soft_token_gradients}  # type: ignore[dict-item]
        features = self.model(features)
        embeddings = features["step_embeddings"]
        if self.prompt_step and features["refinement_states"].shape[1] > 1:  # at K = 0 it is there already
            embeddings = torch.cat([features["refinement_states"][:, :1].float(), embeddings], dim=1)
        if not self.answer_weight:
            return embeddings
        return torch.cat([embeddings, features["refinement_states"][:, : embeddings.shape[1]]], dim=1)

    def _combine(
        self, written: Tensor, allowed: Tensor, teacher: list[Tensor] | None, answers: list[list[int]] | None
    ) -> Tensor:
        """The contrastive loss, and the answer loss where there are answers, of what `_write` returns."""
        if answers is None:
            self.last_answer_loss = None
            return self.contrast(written, allowed, teacher)
        embeddings, states = written.chunk(2, dim=1)
        if self._has_prompt_step(embeddings):
            states = states[:, :-1]  # from h_K no token was written
        encoder = self._encoder
        loss = answer_loss(states[: len(answers)], answers, encoder.decoder.vocabulary, encoder.refinement.temperature)
        self.last_answer_loss = float(loss.detach())
        return self.contrast(embeddings, allowed, teacher) + self.answer_weight * loss

    def _has_prompt_step(self, steps: Tensor) -> bool:
        """Whether the first of these steps, which are the second dimension, is z_0 and not the only one."""
        return self.prompt_step and steps.shape[1] > 1

    def contrast(self, embeddings: Tensor, allowed: Tensor, teacher: list[Tensor] | None = None) -> Tensor:
        """The contrastive loss of embeddings.

        Args:
            embeddings: (B · columns, K, d): anchors, positives, then each column of negatives; with `prompt_step`
                K + 1 steps, z_0 first.
            allowed: (B, C) bool as `allowed_candidates` gives it.
            teacher: As `teacher_scores` gives it.

        Returns:
            A scalar.
        """
        size = len(allowed)
        columns = list(embeddings.split(size))
        if self.gather_across_devices:
            first = [_gather(columns[0])] if teacher is not None and len(teacher) > 1 else columns[:1]
            columns = first + [_gather(column) for column in columns[1:]]
        anchors, candidates = embeddings[:size], torch.cat(columns[1:])
        losses = self.step_losses(anchors, candidates, allowed.to(embeddings.device))
        if teacher is not None:
            taught = [(anchors, candidates), (embeddings, torch.cat(columns))][: len(teacher)]
            divergences = [self.teacher_divergences(*texts, told) for texts, told in zip(taught, teacher, strict=True)]
            losses = (1 - self.teacher_weight) * losses + self.teacher_weight * torch.stack(divergences).mean(dim=0)
        if self.gather_across_devices:
            losses = _gather(losses.unsqueeze(0)).mean(dim=0)
        values = losses.detach().tolist()
        self.last_mean_cosine = mean_cosine(embeddings[:, -1])
        self.last_prompt_loss = values.pop(0) if self._has_prompt_step(embeddings) else None
        self.last_step_losses = values
        if not self.stepwise:
            return losses[-1]
        return combine_steps(
            losses, self.refinement_weight, step_weights=self.step_weights, detach_reference=self.detach_reference
        )

    def step_losses(self, anchors: Tensor, candidates: Tensor, allowed: Tensor) -> Tensor:
        """InfoNCE after every step.

        Args:
            anchors: (B, K, d).
            candidates: (C, K, d); those of this process's rows stand where `allowed_candidates` puts them.
            allowed: (B, C) bool: which candidates stand in a row's softmax.

        Returns:
            (K,).
        """
        targets = torch.arange(len(anchors), device=anchors.device) + self._first_row(len(anchors))
        if self.false_negative_margin is not None:
            with torch.no_grad():
                cosines = _cosines(anchors[:, -1:], candidates[:, -1:])[0]  # (B, C)
                own = cosines.gather(1, targets.unsqueeze(1))
                allowed = allowed & (cosines <= own + self.false_negative_margin)
                allowed.scatter_(1, targets.unsqueeze(1), True)
        losses = []
        for width in self._widths(anchors.shape[-1]):
            scores = _cosines(anchors[..., :width], candidates[..., :width]) / self.temperature  # (K, B, C)
            log_probabilities = scores.masked_fill(~allowed, float("-inf")).log_softmax(dim=-1)
            rows = torch.arange(len(anchors), device=anchors.device)
            losses.append(-log_probabilities[:, rows, targets].mean(dim=1))  # (K,)
        return torch.stack(losses).mean(dim=0)

    def teacher_divergences(self, texts: Tensor, others: Tensor, teacher: Tensor) -> Tensor:
        """KL(teacher ‖ z_k) after every step, a mean over texts.

        Args:
            texts: (T, K, d), those whose neighbours the teacher ranks.
            others: (C, K, d), among which.
            teacher: (T, C) as `teacher_scores` gives them.

        Returns:
            (K,).
        """
        teacher = teacher.to(texts.device)
        losses = []
        for width in self._widths(texts.shape[-1]):
            scores = _cosines(texts[..., :width], others[..., :width]) / self.temperature  # (K, T, C)
            scores = scores.masked_fill(teacher == _NEVER, _NEVER).log_softmax(dim=-1)
            told = teacher.expand_as(scores)
            losses.append(F.kl_div(scores, told, reduction="none", log_target=True).sum(dim=-1).mean(dim=1))
        return torch.stack(losses).mean(dim=0)

    def _widths(self, whole: int) -> list[int]:
        """The widths that embeddings are compared at."""
        if (widest := max(self.matryoshka_dims or (0,))) > whole:
            raise UsageError(f"matryoshka_dims: vectors of {whole} dimensions cannot be cut to {widest}")
        return sorted({whole, *(self.matryoshka_dims or ())})

    def allowed_candidates(self, columns: Sequence[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Which candidates stand in a row's softmax, (B, C) bool, as `gircse.losses.candidates` says it.

        Args:
            columns: Features of anchors, positives and each column of negatives, B rows each.
            labels: Classes, (B,) of positives or (B, columns) of all texts, or None.
        """
        return allowed_candidates(
            columns,
            labels,
            in_batch_negatives=self.in_batch_negatives,
            gather=all_gather if self.gather_across_devices else None,
            first=self._first_row(len(columns[0]["input_ids"])),
        )

    @torch.no_grad()
    def teacher_scores(self, labels: Tensor | None) -> list[Tensor] | None:
        """Log probabilities of texts by the teacher's similarity to a text.

        Args:
            labels: As in `forward`; anything but (B, columns, width) embeddings holds no teacher.

        Returns:
            None, or for each anchor, (B, C), those of the candidates as in `allowed_candidates`; and, where
            ``teacher_pairs`` is ``all``, for each text by column, (B · columns, N), those of the N texts of all
            processes, the text's own row aside.
        """
        if labels is None or labels.dim() != 3 or not self.teacher_weight:
            return None
        gather = all_gather if self.gather_across_devices else (lambda tensor: tensor)
        columns = labels.unbind(dim=1)
        gathered = [gather(column.contiguous()) for column in columns]
        told = [self._teacher_similarities(columns[0], torch.cat(gathered[1:])).log_softmax(dim=-1)]
        if self.teacher_pairs == "all":
            similarities = self._teacher_similarities(torch.cat(columns), torch.cat(gathered))
            rows = torch.arange(len(columns[0]), device=labels.device).repeat(len(columns)) + self._first_row(
                len(labels)
            )
            others = torch.arange(len(gathered[0]), device=labels.device).repeat(len(columns))
            own = rows.unsqueeze(1) == others
            told.append(similarities.masked_fill(own, _NEVER).log_softmax(dim=-1).masked_fill(own, _NEVER))
        return told

    def _teacher_similarities(self, texts: Tensor, others: Tensor) -> Tensor:
        return _cosines(texts.unsqueeze(1), others.unsqueeze(1))[0] / self.teacher_temperature  # (T, C)

    def _first_row(self, size: int) -> int:
        """Where this process's rows begin among the gathered ones."""
        return get_rank() * size if self.gather_across_devices else 0

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {
            "temperature": self.temperature,
            "refinement_weight": self.refinement_weight,
            "in_batch_negatives": self.in_batch_negatives,
            "stepwise": self.stepwise,
            "step_weights": self.step_weights,
            "prompt_step": self.prompt_step,
            "detach_reference": self.detach_reference,
            "false_negative_margin": self.false_negative_margin,
            "matryoshka_dims": self.matryoshka_dims,
            "gather_across_devices": self.gather_across_devices,
            "teacher_weight": self.teacher_weight,
            "teacher_temperature": self.teacher_temperature,
            "teacher_pairs": self.teacher_pairs,
            "answer_weight": self.answer_weight,
            "soft_token_gradients": self.soft_token_gradients,
        }

    @property
    def citation(self) -> str:
        """For the model card."""
        return """
@article{gircse2025,
    title={Let LLMs Speak Embedding Languages: Generative Text Embeddings via Iterative Contrastive Refinement},
    journal={arXiv preprint arXiv:2509.24291},
    year={2025}
}
"""


def combine_steps(
    losses: Tensor, refinement_weight: float, *, step_weights: str = "uniform", detach_reference: bool = False
) -> Tensor:
    """mean_k L_k + λ · mean_{k<K} max(0, log L_{k+1} − log L_k).

    Args:
        losses: L_1..L_K, (K,).
        refinement_weight: λ.
        step_weights: ``linear`` weighs L_k with k, so the first term is Σ k·L_k / Σ k.
        detach_reference: No gradient to log L_k in the penalty.

    Returns:
        A scalar.
    """
    total = losses.mean()
    if step_weights == "linear":
        weights = torch.arange(1, len(losses) + 1, device=losses.device, dtype=losses.dtype)
        total = losses @ (weights / weights.sum())
    if len(losses) > 1 and refinement_weight:
        logs = losses.clamp_min(1e-8).log()  # a batch that is solved has a loss of 0, and no worse step matters there
        reference = logs[:-1].detach() if detach_reference else logs[:-1]
        total = total + refinement_weight * (logs[1:] - reference).clamp_min(0).mean()
    return total


@torch.no_grad()
def mean_cosine(embeddings: Tensor) -> float:
    """The mean cosine similarity between different texts, (T, d) with T >= 2: 1 where all vectors point one way."""
    count = len(embeddings)
    total = F.normalize(embeddings.float(), dim=-1).sum(dim=0)
    return float((total @ total - count) / (count * (count - 1)))


def join_columns(columns: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The columns of a batch as one batch, padded on the left.

    Args:
        columns: ``input_ids`` and ``attention_mask``, (B, N_c) each.

    Returns:
        The same two, (B · columns, max N_c).
    """
    longest = max(column["input_ids"].shape[1] for column in columns)
    return {
        key: torch.cat([F.pad(column[key], (longest - column[key].shape[1], 0)) for column in columns])
        for key in ("input_ids", "attention_mask")
    }


def _gather(tensor: Tensor) -> Tensor:
    """The tensors of all processes along the first dimension; gradients flow back to each."""
    gathered = all_gather_with_grad(tensor)
    if gathered.requires_grad:
        # gloo's backward writes into buffers with the strides of the incoming gradient as if they were contiguous.
        gathered.register_hook(lambda gradient: gradient.contiguous())
    return gathered


def _cosines(anchors: Tensor, candidates: Tensor) -> Tensor:
    """Cosine similarities at every step: (B, K, d) and (C, K, d) to (K, B, C)."""
    a = F.normalize(anchors.float(), dim=-1).transpose(0, 1)
    c = F.normalize(candidates.float(), dim=-1).transpose(0, 1)
    return a @ c.transpose(1, 2)
