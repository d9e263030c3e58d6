"""`ICRLoss` for batches that do not fit into memory.

Knows how a batch is cut into micro-batches; what is computed of them is the loss's.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext
from torch import Tensor

from gircse.errors import UsageError
from gircse.losses.icr import ICRLoss, join_columns


class CachedICRLoss(CachedLossMixin, ICRLoss):
    """`ICRLoss` at the memory of a micro-batch, whatever the batch: gradients are cached (GradCache).

    The batch is embedded without a graph, the loss is differentiated down to the embeddings of all K steps, and each
    micro-batch is embedded again with a graph, the same random numbers (dropout) replayed. The gradients are those of
    `ICRLoss`, at the price of a second forward pass.

    Args:
        model: As in `ICRLoss`.
        mini_batch_size: Texts embedded at a time, anchors and passages alike.
        show_progress_bar: Of the micro-batches.
        **options: As in `ICRLoss`.

    References:
        - Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup: https://arxiv.org/abs/2101.06983

    Raises:
        UsageError: As `ICRLoss`, and a micro-batch below 1.
    """

    def __init__(
        self, model: SentenceTransformer, *, mini_batch_size: int = 32, show_progress_bar: bool = False, **options: Any
    ) -> None:
        super().__init__(model, **options)
        if mini_batch_size < 1:
            raise UsageError(f"mini_batch_size must be 1 or more, not {mini_batch_size}")
        self.mini_batch_size = mini_batch_size
        self.show_progress_bar = show_progress_bar
        self._allowed: Tensor | None = None
        self._teacher: list[Tensor] | None = None
        self._answers: list[list[int]] | None = None

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch; its ``backward`` embeds the micro-batches again. Arguments as in `ICRLoss.forward`."""
        self._check_trainable()
        columns, self._answers = self._split_answers(sentence_features)
        self._allowed, self._teacher = self.allowed_candidates(columns, labels), self.teacher_scores(labels)
        # One joined column: a micro-batch may hold anchors and passages, and shares their decode.
        return self.forward_cached([join_columns(columns)])

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Tensor],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """What the loss is computed from, for a micro-batch: (end − begin, K, d), and as many states with answers."""
        part = {key: value[begin:end] for key, value in sentence_feature.items()}
        with random_state or nullcontext(), nullcontext() if with_grad else torch.no_grad():
            state = RandContext(*part.values()) if copy_random_state else None
            written = self._write(part)
        return written, state

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of the whole batch from its micro-batches' embeddings; see `CachedLossMixin`."""
        assert self._allowed is not None, "forward sets the candidates before any embedding"
        loss = self._combine(torch.cat(reps[0]), self._allowed, self._teacher, self._answers)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {**super().get_config_dict(), "mini_batch_size": self.mini_batch_size}
