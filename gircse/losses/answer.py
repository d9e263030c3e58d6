"""The answer loss: soft tokens that spell the answer to an instruction.

Knows hidden states, token ids and the vocabulary; knows nothing of contrastive losses, models or data.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import dropwhile

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from gircse.errors import UsageError
from gircse.soft_tokens import Vocabulary


def answer_loss(states: Tensor, answers: Sequence[Sequence[int]], vocabulary: Vocabulary, temperature: float) -> Tensor:
    """The cross-entropy between soft tokens and the tokens of an answer.

    The soft token that a state writes is a distribution over the vocabulary; that of h_{k-1} shall be the k-th token of
    the answer. The answer is not fed back: each state follows the soft tokens that were really written. What comes
    after the answer is free, and so is what of the answer has no state left.

    A contrastive loss alone learns slowly what an instruction asks for, as all texts becoming alike is the shortest way
    down where vectors say little of it; the vocabulary's targets stand still (docs/experiments.md). The idea that an
    instruction is followed by answering it is InBedder's (arXiv 2402.09642), which reads the states of the words that
    it generates.

    Args:
        states: (B, S, d): h_0, h_1, ... of every row.
        answers: Token ids of every row's answer, one or more.
        vocabulary: Of the decoder that wrote the states.
        temperature: The soft tokens' T.

    Returns:
        A scalar: the mean over rows of the mean over a row's tokens.
    """
    spelled = [list(tokens[: states.shape[1]]) for tokens in answers]
    rows = torch.tensor([row for row, tokens in enumerate(spelled) for _ in tokens], device=states.device)
    steps = torch.tensor([step for tokens in spelled for step in range(len(tokens))], device=states.device)
    targets = torch.tensor([token for tokens in spelled for token in tokens], device=states.device)
    weights = torch.tensor([1 / len(tokens) for tokens in spelled for _ in tokens], device=states.device)
    hidden = states[rows, steps].to(vocabulary.embedding.weight.dtype)  # (T, d), T tokens of all answers
    losses = F.cross_entropy(vocabulary.logits(hidden).float() / temperature, targets, reduction="none")  # (T,)
    return losses @ weights / len(spelled)


def answer_tokens(column: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each answer from its first word on: no padding, no special tokens, no lone space before it.

    Args:
        column: ``input_ids`` and ``attention_mask``, (B, N).
        tokenizer: That made them.

    Raises:
        UsageError: An answer has none.
    """
    special = set(tokenizer.all_special_ids)
    result = []
    for ids, mask in zip(column["input_ids"].tolist(), column["attention_mask"].tolist(), strict=True):
        kept = [token for token, real in zip(ids, mask, strict=True) if real and token not in special]
        result.append(list(dropwhile(lambda token: not str(tokenizer.decode([token])).strip(), kept)))
        if not result[-1]:
            raise UsageError(f"the answer {tokenizer.decode(ids)!r} has no tokens that could be spelled")
    return result
