"""Iterative Contrastive Refinement, the training loss of generative embeddings.

Knows embeddings after every step and which candidates are false negatives; knows nothing of data files or trainers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from gircse.errors import UsageError


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

    References:
        - Let LLMs Speak Embedding Languages: https://arxiv.org/abs/2509.24291
        - InfoNCE: https://arxiv.org/abs/1807.03748

    Inputs:
        +-------------------------------------------------+--------+
        | Texts                                           | Labels |
        +=================================================+========+
        | (anchor, positive)                              | none   |
        +-------------------------------------------------+--------+
        | (anchor, positive, negative_1, ..., negative_n) | none   |
        +-------------------------------------------------+--------+

        A candidate with the same tokens as a row's positive, or as its anchor, is not a negative of that row.

    Relations:
        - ``MultipleNegativesRankingLoss`` is the case of a single step (and keeps identical positives as negatives).

    Raises:
        UsageError: A temperature of 0 or less, a negative λ, or nothing to contrast with.

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
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise UsageError(f"the loss temperature must be above 0, not {temperature}")
        if refinement_weight < 0:
            raise UsageError(f"refinement_weight must be 0 or more, not {refinement_weight}")
        self.model = model
        self.temperature = temperature
        self.refinement_weight = refinement_weight
        self.in_batch_negatives = in_batch_negatives
        self.last_step_losses: list[float] = []
        """L_1..L_K of the latest forward pass, for whoever reports progress."""

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            sentence_features: One batch a column: anchor, positive, negatives.
            labels: Ignored.

        Returns:
            A scalar.
        """
        columns = [dict(features) for features in sentence_features]
        if len(columns) < 2:
            raise UsageError("ICRLoss needs an anchor and a positive column, and optionally negatives")
        ids = [_token_rows(column) for column in columns]
        # All columns in one pass: the soft tokens of queries and passages are written together.
        size = len(ids[0])
        embeddings = list(self.model(join_columns(columns))["step_embeddings"].split(size))  # each (B, K, d)
        allowed = self._allowed(ids).to(embeddings[0].device)  # (B, C)
        losses = self.step_losses(embeddings, allowed)
        self.last_step_losses = losses.detach().tolist()
        return combine_steps(losses, self.refinement_weight)

    def step_losses(self, embeddings: list[Tensor], allowed: Tensor) -> Tensor:
        """L_1..L_K.

        Args:
            embeddings: (B, K, d) of anchors, positives and each column of negatives.
            allowed: (B, C) bool, C = B · (columns − 1): which candidates stand in a row's softmax.

        Returns:
            (K,).
        """
        anchors = F.normalize(embeddings[0].float(), dim=-1).transpose(0, 1)  # (K, B, d)
        candidates = F.normalize(torch.cat(embeddings[1:]).float(), dim=-1).transpose(0, 1)  # (K, C, d)
        scores = anchors @ candidates.transpose(1, 2) / self.temperature  # (K, B, C)
        scores = scores.masked_fill(~allowed, float("-inf"))
        targets = torch.arange(scores.shape[1], device=scores.device)
        log_probabilities = scores.log_softmax(dim=-1)
        return -log_probabilities[:, targets, targets].mean(dim=1)

    def _allowed(self, ids: list[list[tuple[int, ...]]]) -> Tensor:
        """Which candidates stand in a row's softmax: its positive, and what is not a false negative. (B, C) bool."""
        anchors, positives = ids[0], ids[1]
        size = len(anchors)
        candidates = [row for column in ids[1:] for row in column]
        if self.in_batch_negatives:
            allowed = torch.ones(size, len(candidates), dtype=torch.bool)
        else:
            if len(ids) < 3:
                raise UsageError("without in-batch negatives every row needs a negative; add a column of negatives")
            own = torch.eye(size, dtype=torch.bool)
            allowed = torch.cat([own] * (len(ids) - 1), dim=1)
        # Compared as token ids: what the model cannot tell apart is no negative.
        same_positive = torch.tensor([[candidate == mine for candidate in candidates] for mine in positives])
        same_anchor = torch.tensor([[candidate == mine for candidate in candidates] for mine in anchors])
        allowed &= ~(same_positive | same_anchor)
        rows = torch.arange(size)
        allowed[rows, rows] = True
        return allowed

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {
            "temperature": self.temperature,
            "refinement_weight": self.refinement_weight,
            "in_batch_negatives": self.in_batch_negatives,
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


def combine_steps(losses: Tensor, refinement_weight: float) -> Tensor:
    """mean_k L_k + λ · mean_{k<K} max(0, log L_{k+1} − log L_k).

    Args:
        losses: L_1..L_K, (K,).
        refinement_weight: λ.

    Returns:
        A scalar.
    """
    total = losses.mean()
    if len(losses) > 1 and refinement_weight:
        logs = losses.clamp_min(1e-8).log()  # a batch that is solved has a loss of 0, and no worse step matters there
        total = total + refinement_weight * (logs[1:] - logs[:-1]).clamp_min(0).mean()
    return total


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


def _token_rows(features: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """The token ids of every row without padding, so that texts compare equal whatever their batch."""
    ids, mask = features["input_ids"].tolist(), features["attention_mask"].tolist()
    return [tuple(t for t, keep in zip(row, kept, strict=True) if keep) for row, kept in zip(ids, mask, strict=True)]
