"""The soft token: softmax over the vocabulary times the embedding matrix, and what it is made of.

Knows the output head and the embedding table of a decoder; knows nothing of layers, caches, texts or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gircse.fast import step_kernels
from gircse.fast.fused_soft_token import faster, fused_soft_token, is_possible

ROWS_AT_A_TIME = 128
"""Of soft tokens on a CPU; a row of SmolLM2's takes 0.6 MB on the way."""


@dataclass(frozen=True)
class Vocabulary:
    """Both ends of a decoder's vocabulary: how hidden states become logits, and how tokens become inputs.

    The fields cover what the supported families do between the last hidden state and the logits:
    ``logits = cap · tanh((head(h · state_scale) · logit_scale) / cap)`` (the cap only where the family has one).

    Attributes:
        head: The LM head, d -> V, with a bias in some families.
        embedding: The module that turns token ids into input embeddings; families that scale embeddings inside it
            (Gemma 3) carry the factor in ``embedding_scale``.
        state_scale: Factor on the hidden state before the head (MiniCPM).
        logit_scale: Factor on the logits (Granite, Cohere).
        logit_cap: Soft cap on the logits (Gemma 2), or None.
        embedding_scale: Factor that the embedding module applies to its table.
    """

    head: nn.Module
    embedding: nn.Embedding
    state_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    embedding_scale: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the next token.

        Args:
            hidden: Last hidden states after the final norm, (..., d).

        Returns:
            (..., V), in the dtype of the head.
        """
        if self.state_scale != 1.0:
            hidden = hidden * self.state_scale
        logits = self.head(hidden)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_cap is not None:
            logits = self.logit_cap * torch.tanh(logits / self.logit_cap)
        return logits

    def probabilities(self, hidden: Tensor, temperature: float) -> Tensor:
        """P = softmax(logits / T), computed in float32.

        Args:
            hidden: (..., d).
            temperature: T > 0.

        Returns:
            (..., V) float32; each row sums to 1.
        """
        logits = self.logits(hidden).float()
        return F.softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)

    def soft_token(
        self, hidden: Tensor, temperature: float = 1.0, *, detach: bool = False, compiled: bool = False
    ) -> Tensor:
        """E = p · E: the next input embedding (GIRCSE, section 3.1).

        A one-hot p gives exactly the input embedding of that token. On a GPU the probabilities are never stored where
        that measures faster.

        Args:
            hidden: The hidden state that predicts the soft token, (B, d).
            temperature: T > 0; small values approach the greedy token, large ones the mean embedding.
            detach: No gradient goes back through it.
            compiled: Whether few rows may be computed by compiled kernels, without gradients. They round otherwise, so
                training leaves them out.

        Returns:
            (B, d), in the dtype of the embedding table.
        """
        if detach:
            with torch.no_grad():
                return self.soft_token(hidden, temperature)
        table = self.embedding.weight  # (V, d)
        compute = partial(self.by_products, temperature=temperature)
        scale = self.state_scale * self.logit_scale / temperature
        if compiled and self._is_read_once(hidden):
            compute = partial(step_kernels.soft_tokens, table=table, scale=scale)
        elif self.logit_cap is None and is_possible(self.head, table, hidden):
            fused = partial(fused_soft_token, head=self.head.weight, table=table, scale=scale)
            if faster(fused, compute, hidden, len(table)):
                compute = fused
        mixed = compute(hidden)
        return mixed * self.embedding_scale if self.embedding_scale != 1.0 else mixed

    def _is_read_once(self, hidden: Tensor) -> bool:
        """Whether head and embedding are one table, and the compiled pass over it is faster for so few rows."""
        table, head = self.embedding.weight, self.head
        return (
            hidden.device.type == "cpu"
            and hidden.dtype == table.dtype
            and isinstance(head, nn.Linear)
            and head.weight is table
            and head.bias is None
            and self.logit_cap is None
            and table.is_contiguous()
            and step_kernels.serves(hidden.dtype, hidden.shape[-1])
            and len(hidden) <= step_kernels.most_soft_tokens(hidden.dtype, hidden.shape[-1])
        )

    def by_products(self, hidden: Tensor, temperature: float) -> Tensor:
        """P · E by two products and a softmax, as `soft_token` takes and gives them, without the embedding's scale.

        On a CPU without gradients some rows at a time: all their probabilities together would take more memory than
        the batch itself.
        """
        if len(hidden) > ROWS_AT_A_TIME and hidden.device.type == "cpu" and not torch.is_grad_enabled():
            return torch.cat([self.by_products(part, temperature) for part in hidden.split(ROWS_AT_A_TIME)])
        table = self.embedding.weight
        # Heads can be padded beyond the table (or the reverse); both ends agree on the common part.
        if hidden.device.type == "cpu" and not torch.is_grad_enabled():
            # Computed in float32 and rounded at the end all the same, to the bit, without copies in float32 or at all.
            logits = self.logits(hidden)
            logits = logits if temperature == 1.0 else logits.float().div_(temperature)
            probabilities = torch.softmax(logits, dim=-1, out=logits)
        else:
            probabilities = self.probabilities(hidden, temperature)
        common = min(probabilities.shape[-1], table.shape[0])
        return probabilities[..., :common].to(table.dtype) @ table[:common]
