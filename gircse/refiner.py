"""The refinement loop: a prompt pass, then K one-token passes over a key-value cache.

Knows a `Decoder` and token ids; knows nothing of tokenisation, losses or files. Equation numbers are those of the GIRCSE
paper (arXiv 2509.24291, section 3).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from gircse.cache import join_caches, new_cache
from gircse.decoders import Decoder
from gircse.errors import UsageError

Pooling = Literal["mean", "last", "mean_with_prompt"]
"""How hidden states become z_k: the mean of h_1..h_k (the paper), h_k alone, or the mean of h_0..h_k."""

POOLINGS: tuple[str, ...] = get_args(Pooling)


def refine(
    decoder: Decoder,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    num_steps: int,
    temperature: float = 1.0,
    prompt_tokens: int | None = None,
) -> Tensor:
    """Run the prompt once and then `num_steps` soft tokens over its cache.

    The same text gives the same states whatever the padding side or the batch, up to rounding. Differentiable through
    the cache and through the soft tokens. The soft token after the last state is never computed, nor are logits at any
    position but the last.

    Args:
        decoder: The backbone, taken apart.
        input_ids: (B, N) token ids, padded on either side.
        attention_mask: (B, N), 1 for tokens and 0 for padding; every row has at least one token.
        num_steps: K >= 0.
        temperature: Soft-token temperature T > 0.
        prompt_tokens: Split the prompt pass into groups of rows of similar length, of about this many padded tokens;
            the soft tokens of all rows are still written together. One pass where not given.

    Returns:
        (B, K + 1, d): h_0 (the prompt's last state), h_1, ..., h_K.

    Raises:
        UsageError: Prompt and soft tokens are together longer than the backbone's positions, or gradient checkpointing
            is on (it disables the cache that the loop lives on).
    """
    _check(decoder, attention_mask, num_steps, temperature)
    groups = group_rows(attention_mask.sum(dim=1).tolist(), prompt_tokens)
    order = [row for group in groups for row in group]
    prompts = [align_right(input_ids[group], attention_mask[group]) for group in groups]
    if num_steps == 0:
        first = torch.cat([_prompt_pass(decoder, *prompt, cache=None) for prompt in prompts])
        return _restore(first.unsqueeze(1), order)  # (B, 1, d)

    caches = [new_cache() for _ in prompts]
    first = torch.cat([_prompt_pass(decoder, *prompt, cache=cache) for prompt, cache in zip(prompts, caches, strict=True)])
    longest = max(mask.shape[1] for _, mask in prompts)
    cache = join_caches(caches, longest)
    mask = torch.cat([F.pad(mask, (longest - mask.shape[1], 0)) for _, mask in prompts])  # (B, longest)
    length = mask.sum(dim=1, keepdim=True)  # (B, 1)
    mask = F.pad(mask, (0, num_steps), value=1)
    states = [first]  # each (B, d)
    for step in range(num_steps):
        token = decoder.vocabulary.soft_token(states[-1], temperature)  # (B, d)
        out = decoder.transformer(
            inputs_embeds=token.unsqueeze(1),
            attention_mask=mask[:, : longest + step + 1],
            position_ids=length + step,
            past_key_values=cache,
            use_cache=True,
        )
        states.append(out.last_hidden_state[:, -1])
    return _restore(torch.stack(states, dim=1), order)


def _prompt_pass(decoder: Decoder, input_ids: Tensor, attention_mask: Tensor, cache: DynamicCache | None) -> Tensor:
    """h_0 of rows that end in the same column, (B, d); fills the cache."""
    out = decoder.transformer(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(dim=1) - 1).clamp_min(0),  # counted from each row's first token
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return out.last_hidden_state[:, -1]


def _restore(states: Tensor, order: list[int]) -> Tensor:
    """Undo a reordering of the rows."""
    if order == list(range(len(order))):
        return states
    return states[torch.tensor(order, device=states.device).argsort()]


def group_rows(lengths: list[int], tokens: int | None) -> list[list[int]]:
    """Rows of similar length, longest first, for prompt passes with little padding.

    A group ends where it holds `tokens` padded tokens, or where a row is shorter than three quarters of the longest of
    its group and the group is already worth a pass of its own (half of `tokens`).

    Args:
        lengths: Tokens of every row.
        tokens: Padded tokens of one prompt pass; None makes a single group in the given order.

    Returns:
        Indices, every one exactly once.
    """
    if tokens is None:
        return [list(range(len(lengths)))]
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        padded = len(groups[-1]) * longest if groups else 0
        full = padded + longest > tokens
        ragged = lengths[row] < 0.75 * longest and padded >= tokens // 2
        if not groups or full or ragged:
            groups.append([])
            longest = lengths[row]
        groups[-1].append(row)
    return groups


def recompute_states(
    decoder: Decoder, input_ids: Tensor, attention_mask: Tensor, *, num_steps: int, temperature: float = 1.0
) -> Tensor:
    """The same states by the plain loop: the whole sequence through the transformer at every step, without a cache.

    The yardstick of the parity check; K + 1 times the prompt's cost. Arguments and result as in `refine`.
    """
    _check(decoder, attention_mask, num_steps, temperature)
    input_ids, attention_mask = align_right(input_ids, attention_mask)
    embeddings = decoder.vocabulary.embedding(input_ids)  # (B, N, d)
    one = attention_mask.new_ones(len(attention_mask), 1)
    states: list[Tensor] = []
    for step in range(num_steps + 1):
        if step:
            token = decoder.vocabulary.soft_token(states[-1], temperature)
            embeddings = torch.cat([embeddings, token.unsqueeze(1)], dim=1)
            attention_mask = torch.cat([attention_mask, one], dim=1)
        out = decoder.transformer(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(dim=1) - 1).clamp_min(0),
            use_cache=False,
        )
        states.append(out.last_hidden_state[:, -1])
    return torch.stack(states, dim=1)


def pool_steps(states: Tensor, pooling: str) -> Tensor:
    """The embeddings after every step: z_1..z_K, which are prefix means (GIRCSE, section 3.2).

    Args:
        states: (B, K + 1, d) as `refine` returns them; with K = 0 the prompt's state is the embedding.
        pooling: One of `POOLINGS`.

    Returns:
        (B, max(K, 1), d) float32, not normalised.
    """
    states = states.float()
    if states.shape[1] == 1:
        return states
    if pooling == "last":
        return states[:, 1:]
    first = 0 if pooling == "mean_with_prompt" else 1
    sums = states[:, first:].cumsum(dim=1)
    counts = torch.arange(1, sums.shape[1] + 1, device=states.device).view(1, -1, 1)
    return (sums / counts)[:, 1 - first :]


def align_right(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's tokens to the right end, so that all rows take their soft tokens in the same column.

    Sliding windows and causal masks are counted in columns: with padding between prompt and soft tokens they would
    be counted wrongly, so a right-padded batch becomes a left-padded one. Columns that are padding in every row go.

    Args:
        input_ids: (B, N).
        attention_mask: (B, N) of 0 and 1.

    Returns:
        Both, (B, N'), N' the longest row.
    """
    longest = int(attention_mask.sum(dim=1).max())
    if bool(attention_mask[:, -longest:].all()):  # nothing padded inside the window that is kept
        return input_ids[:, -longest:], attention_mask[:, -longest:]
    order = attention_mask.long().argsort(dim=1, stable=True)[:, -longest:]  # padding first, tokens in their order
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def _check(decoder: Decoder, attention_mask: Tensor, num_steps: int, temperature: float) -> None:
    if num_steps < 0:
        raise UsageError(f"num_steps must be 0 or more, not {num_steps}")
    if temperature <= 0:
        raise UsageError(f"the soft-token temperature must be above 0, not {temperature}")
    longest = int(attention_mask.sum(dim=1).max())
    if longest + num_steps > decoder.max_positions:
        raise UsageError(
            f"{longest} prompt tokens and {num_steps} soft tokens exceed the backbone's {decoder.max_positions} positions; "
            f"lower max_seq_length to {decoder.max_positions - num_steps} or num_steps"
        )
    if num_steps and decoder.transformer.training and getattr(decoder.transformer, "is_gradient_checkpointing", False):
        raise UsageError("gradient checkpointing switches the key-value cache off; train with smaller batches instead")
