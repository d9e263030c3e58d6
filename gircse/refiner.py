"""The refinement loop: a prompt pass, then K one-token passes over a key-value cache.

Knows a `Decoder` and token ids; knows nothing of tokenisation, losses or files. Sections are those of the GIRCSE
paper (arXiv 2509.24291).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from gircse.attention import attention_dtype
from gircse.cache import JoinedPrompts, cache_tensors, expand_cache, join_caches, new_cache, select_rows
from gircse.decoders import PARITY_TESTED, Decoder
from gircse.errors import UnsupportedBackboneError, UsageError
from gircse.fast.grouped_steps import DecodeGroup, GroupedSteps, ProductsDecodeGroup, takes_groups
from gircse.fast.kernel_prompts import prompt_states
from gircse.fast.kernel_steps import KernelGroup, KernelSteps, takes_kernels
from gircse.fast.step_graphs import StepGraphs
from gircse.fast.trained_steps import TrainedGroup
from gircse.gradient_chain import GradientChain
from gircse.prompts import PromptGroup, align_right, join_groups, plan_prompts

Attention = Literal["causal", "bidirectional"]
"""What a prompt token sees: the tokens before it, or all tokens of the prompt. A soft token sees all before it."""

ATTENTIONS: tuple[str, ...] = get_args(Attention)

GPU_WORTH_SHARING = 32_768
"""Tokens that a GPU computes in about the time that it takes to launch one more pass (docs/experiments.md)."""

DECODE_PADDING = 512
"""Padded tokens that cost a CPU's attention over one group about as much as a group of their own would."""

COPIED_PREFIX = 2**19
"""Numbers of a layer's keys up to which a copy of the prefix for every row costs the attention of soft tokens less than
products of its own (docs/experiments.md): 2,730 tokens of SmolLM2-135M's."""

FEW_ROWS = {torch.bfloat16: 32}
"""Rows of a group, by the dtype of its keys, up to which PyTorch's attention beats products (docs/experiments.md)."""


@dataclass(frozen=True)
class PromptReading:
    """How a prompt is read.

    Attributes:
        attention: One of `ATTENTIONS`. Under ``bidirectional`` a layer with a sliding window keeps it, both ways.
        mean: Whether h_0 is the mean of the states of all prompt tokens, the instruction's included, instead of the
            state of the last.
    """

    attention: str = "causal"
    mean: bool = False

    @property
    def shares_prefix(self) -> bool:
        """Whether what rows begin with can be computed once for all: its states know no text, and count in none."""
        return self.attention == "causal" and not self.mean


CAUSAL = PromptReading()
"""The paper's."""


_told_of_states: ContextVar[Callable[[int], None]] = ContextVar("told_of_states", default=lambda step: None)


@contextmanager
def told_of_states(function: Callable[[int], None]) -> Iterator[None]:
    """Have a function called with k as soon as h_k of a batch is computed (on a GPU: asked for), without gradients."""
    before = _told_of_states.set(function)
    try:
        yield
    finally:
        _told_of_states.reset(before)


def refine(
    decoder: Decoder,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    num_steps: int | Sequence[int],
    temperature: float = 1.0,
    prompt_tokens: int | None = None,
    graphs: StepGraphs | None = None,
    soft_token_gradients: str = "full",
    reading: PromptReading = CAUSAL,
) -> Tensor:
    """Run the prompt once and then `num_steps` soft tokens over its cache.

    The same text gives the same states whatever the padding side or the batch, up to rounding. Differentiable through
    the cache and through the soft tokens. The soft token after the last state is never computed, nor are logits at any
    position but the last.

    Args:
        decoder: The backbone, taken apart.
        input_ids: (B, N) token ids, padded on either side.
        attention_mask: (B, N), 1 for tokens and 0 for padding; every row has at least one token.
        num_steps: K >= 0, of all rows or of each. A row that has taken its K leaves the batch.
        temperature: Soft-token temperature T > 0.
        prompt_tokens: Split the prompt pass into groups of rows of similar length, of about this many padded tokens,
            and compute what all rows begin with (an instruction) once; the soft tokens of all rows are still written
            together. The result is the same. One plain pass where not given.
        graphs: Recorded steps to replay on a GPU, where they serve this decoder and all rows have the same K.
        soft_token_gradients: What goes from a soft token back to the state that wrote it, one of
            `gircse.gradient_chain.SOFT_TOKEN_GRADIENTS`. The states are the same.
        reading: How the prompt is read.

    Returns:
        (B, K + 1, d): h_0 (the prompt's last state, or the mean of all), h_1, ..., h_K of the largest K; zeros after a
        row's own K.

    Raises:
        UsageError: Prompt and soft tokens are together longer than the backbone's positions, or gradient checkpointing
            is on (it disables the cache that the loop lives on).
        UnsupportedBackboneError: Bidirectional attention over a family that no test covers.
    """
    own_steps = [num_steps] * len(input_ids) if isinstance(num_steps, int) else list(num_steps)
    num_steps = max(own_steps)
    _check(decoder, attention_mask, own_steps, temperature, reading)
    shares = reading.shares_prefix and (decoder.window is None or input_ids.shape[1] + num_steps <= decoder.window)
    worth = 0 if input_ids.device.type == "cpu" else GPU_WORTH_SHARING
    prompts = plan_prompts(input_ids, attention_mask, prompt_tokens, share_prefix=shares, worth=worth)
    table = decoder.vocabulary.embedding.weight  # of the dtype and on the device of the states
    dtype = attention_dtype(decoder.transformer, table)
    if min(own_steps) < num_steps or (graphs is not None and not graphs.serve(decoder, table, num_steps)):
        graphs = None
    chain = GradientChain(soft_token_gradients)
    if num_steps and graphs is None and takes_groups(decoder):
        if not (decoder.transformer.training or torch.is_grad_enabled()):
            return _refine_in_groups(decoder, prompts, own_steps, temperature, dtype, reading)
        # Gradient caching takes a pass without gradients first, which must round as the one with them.
        if min(own_steps) == num_steps:
            return _refine_in_training(decoder, prompts, num_steps, temperature, dtype, chain, reading)
    return _refine_over_one_cache(decoder, prompts, own_steps, temperature, dtype, chain, reading, graphs)


def _refine_over_one_cache(
    decoder: Decoder,
    prompts: Sequence[PromptGroup],
    own_steps: Sequence[int],
    temperature: float,
    dtype: torch.dtype,
    chain: GradientChain,
    reading: PromptReading,
    graphs: StepGraphs | None,
) -> Tensor:
    """As `refine`: the caches of all prompts are joined to one, padded to the longest."""
    num_steps, tell = max(own_steps), _told_of_states.get()
    order = [row for prompt in prompts for row in prompt.rows]
    longest = max(prompt.mask.shape[1] for prompt in prompts)
    joined = None
    if num_steps and graphs is None and not torch.is_grad_enabled():
        joined = JoinedPrompts(len(order), longest, num_steps, dtype, _count_layers(decoder))
    prefixes = _run_prefixes(decoder, prompts)
    first, caches = _run_prompts(decoder, prompts, prefixes, joined, reading, keep=num_steps > 0)
    tell(0)
    if num_steps == 0:
        return _restore(first.unsqueeze(1), order)  # (B, 1, d)

    mask = torch.cat([F.pad(prompt.mask, (longest - prompt.mask.shape[1], 0)) for prompt in prompts])  # (B, longest)
    if graphs is not None:
        own = {"length": longest, "num_steps": num_steps, "temperature": temperature, "detach": chain.detached}
        if (steps := graphs.prepare(decoder, first, cache_tensors(caches[0]), dtype, **own)) is not None:
            tensors = cache_tensors(join_caches(caches, longest, room=0, dtype=dtype))
            written = graphs.write(steps, first, mask, tensors, num_steps=num_steps, chain=chain, tell=tell)
            return _restore(torch.stack([first, *written], dim=1), order)
    cache = joined.cache() if joined else join_caches(caches, longest, room=num_steps, dtype=dtype)
    if min(own_steps) < num_steps:  # those with the most steps first: rows then leave at the end, and nothing is copied
        by_steps = sorted(range(len(order)), key=lambda place: -own_steps[order[place]])
        order, places = [order[place] for place in by_steps], torch.tensor(by_steps, device=first.device)
        first, mask = first[places], mask[places]
        select_rows(cache, places)
    states = _take_steps(decoder, first, mask, cache, own_steps, temperature, chain)
    return _restore(torch.stack(states, dim=1), order)


def _take_steps(
    decoder: Decoder,
    first: Tensor,
    mask: Tensor,
    cache: DynamicCache,
    own_steps: Sequence[int],
    temperature: float,
    chain: GradientChain,
) -> list[Tensor]:
    """The refinement loop over transformers' own passes.

    Args:
        decoder: The backbone, taken apart.
        first: h_0 of all rows, those with the most steps first, (B, d).
        mask: Of their prompts, (B, N).
        cache: Of their prompts, with room for all soft tokens.
        own_steps: K of every row, in any order.
        temperature: Soft-token temperature.
        chain: Where gradients go between the states.

    Returns:
        h_0, ..., h_K of the largest K, (B, d) each; zeros after a row's own K.
    """
    num_steps, tell = max(own_steps), _told_of_states.get()
    compiled = not (decoder.transformer.training or torch.is_grad_enabled())
    longest, length = mask.shape[1], mask.sum(dim=1, keepdim=True)  # (B, 1)
    mask = F.pad(mask, (0, num_steps), value=1)
    states = [first]
    for step in range(num_steps):
        rows = sum(steps > step for steps in own_steps)
        if rows < len(states[-1]):
            select_rows(cache, slice(rows))
        token = decoder.vocabulary.soft_token(
            chain.source(states[-1][:rows]), temperature, detach=chain.detached, compiled=compiled
        )  # (rows, d)
        out = decoder.transformer(
            inputs_embeds=token.unsqueeze(1),
            attention_mask=mask[:rows, : longest + step + 1],
            position_ids=length[:rows] + step,
            past_key_values=cache,
            use_cache=True,
        )
        states.append(chain.written(out.last_hidden_state[:, -1]))
        tell(step + 1)
    return [F.pad(state, (0, 0, 0, len(first) - len(state))) for state in states]


def _refine_in_groups(
    decoder: Decoder,
    prompts: Sequence[PromptGroup],
    own_steps: Sequence[int],
    temperature: float,
    dtype: torch.dtype,
    reading: PromptReading,
) -> Tensor:
    """As `refine`: every group of prompts keeps a cache of its own length."""
    num_steps, prefixes = max(own_steps), _run_prefixes(decoder, prompts)
    kernels = takes_kernels(decoder)
    dtype = decoder.vocabulary.embedding.weight.dtype if kernels else dtype
    if min(own_steps) == num_steps:
        joined = join_groups(prompts, DECODE_PADDING)
    else:  # those with the most steps first: rows then leave at the end of their group, and nothing is copied
        joined = [[prompt.ordered_by(lambda row: -own_steps[row])] for prompt in prompts]
    order = [[row for prompt in group for row in prompt.rows] for group in joined]
    made = [_decode_group(decoder, group, prefixes, num_steps, dtype, reading, kernels=kernels) for group in joined]
    groups, state = [group for _, group in made], torch.cat([first for first, _ in made])
    steps = KernelSteps(decoder, cast("list[KernelGroup]", groups)) if kernels else GroupedSteps(decoder, groups)
    rows = torch.tensor([row for members in order for row in members])
    states = state.new_zeros(len(rows), num_steps + 1, state.shape[1])
    states[rows, 0] = state
    tell = _told_of_states.get()
    tell(0)
    for step in range(num_steps):
        counts = [sum(own_steps[row] > step for row in members) for members in order]
        if sum(counts) < len(rows):
            kept = steps.keep(counts)
            rows, state = rows[kept], state[kept]
        state = steps.next_states(decoder.vocabulary.soft_token(state, temperature, compiled=True))
        states[rows, step + 1] = state
        tell(step + 1)
    return states


def _decode_group(
    decoder: Decoder,
    prompts: Sequence[PromptGroup],
    prefixes: Mapping[tuple[int, ...], DynamicCache],
    num_steps: int,
    dtype: torch.dtype,
    reading: PromptReading,
    *,
    kernels: bool,
) -> tuple[Tensor, DecodeGroup | KernelGroup]:
    """h_0 of the prompts of one group, (b, d), and what their soft tokens attend to."""
    count, prefix = sum(len(prompt.rows) for prompt in prompts), cache_tensors(prefixes[prompts[0].prefix])
    apart = bool(prefix) and (kernels or count * prefix[0][0].numel() > COPIED_PREFIX)
    products = not kernels and (apart or count > FEW_ROWS.get(dtype, 0))
    masks = [prompt.own_mask if apart else prompt.mask for prompt in prompts]
    longest, layers = masks[0].shape[1], _count_layers(decoder)
    room = JoinedPrompts(count, longest, num_steps, dtype, layers, for_products=products, prefix_apart=apart)
    first, _ = _run_prompts(decoder, prompts, prefixes, room, reading, keep=True)
    mask = torch.cat([F.pad(mask, (longest - mask.shape[1], 0)) for mask in masks])
    if kernels:
        whole = [(keys[0].contiguous(), values[0].contiguous()) for keys, values in prefix]
        return first, KernelGroup(room.buffers(), mask, whole)
    if not products:
        return first, DecodeGroup(room.buffers(), mask)
    shared = [(keys[0].mT.to(dtype).contiguous(), values[0].to(dtype)) for keys, values in prefix if apart]
    return first, ProductsDecodeGroup(room.buffers(), mask, shared)


def _refine_in_training(
    decoder: Decoder,
    prompts: Sequence[PromptGroup],
    num_steps: int,
    temperature: float,
    dtype: torch.dtype,
    chain: GradientChain,
    reading: PromptReading,
) -> Tensor:
    """As `_refine_in_groups`, differentiable; all rows have the same K."""
    prefixes = _run_prefixes(decoder, prompts)
    firsts, groups = [], []
    for group in join_groups(prompts, DECODE_PADDING):
        first, caches = _run_prompts(decoder, group, prefixes, None, reading, keep=True)
        longest = max(prompt.mask.shape[1] for prompt in group)
        mask = torch.cat([F.pad(prompt.mask, (longest - prompt.mask.shape[1], 0)) for prompt in group])
        groups.append(TrainedGroup([cache_tensors(cache) for cache in caches], mask, dtype))
        firsts.append(first)
    steps, states = GroupedSteps(decoder, groups), [torch.cat(firsts)]
    for _ in range(num_steps):
        token = decoder.vocabulary.soft_token(chain.source(states[-1]), temperature, detach=chain.detached)
        states.append(chain.written(steps.next_states(token)))
    return _restore(torch.stack(states, dim=1), [row for prompt in prompts for row in prompt.rows])


def _run_prefixes(decoder: Decoder, prompts: Sequence[PromptGroup]) -> dict[tuple[int, ...], DynamicCache]:
    """Keys and values of what the rows of groups begin with, computed once for all groups that have it."""
    prefixes: dict[tuple[int, ...], DynamicCache] = {}
    for prompt in prompts:
        if prompt.prefix not in prefixes:
            prefixes[prompt.prefix] = new_cache()
            if prompt.prefix:
                ids = torch.tensor([prompt.prefix], device=prompt.ids.device)
                decoder.transformer(input_ids=ids, past_key_values=prefixes[prompt.prefix], use_cache=True)
    return prefixes


def _run_prompts(
    decoder: Decoder,
    prompts: Sequence[PromptGroup],
    prefixes: Mapping[tuple[int, ...], DynamicCache],
    joined: JoinedPrompts | None,
    reading: PromptReading,
    *,
    keep: bool,
) -> tuple[Tensor, list[DynamicCache]]:
    """The prompt passes of groups.

    Args:
        decoder: The backbone, taken apart.
        prompts: The groups.
        prefixes: Of `_run_prefixes`.
        joined: Where keys and values go, if all of them have their place already.
        reading: How prompts are read.
        keep: Whether they are wanted at all.

    Returns:
        h_0 of the rows in the groups' order, (B, d), and each group's cache, if they are wanted and have no place.
    """
    firsts, caches = [], []
    for prompt in prompts:
        prefix = prefixes[prompt.prefix] if prompt.prefix else None
        if joined is not None:
            cache = joined.next_group(len(prompt.rows), prefix)
        else:
            cache = new_cache() if prefix is None else expand_cache(prefix, len(prompt.rows), keep=keep)
        firsts.append(_prompt_pass(decoder, prompt, cache, reading, keep=keep))
        if keep and joined is None:
            caches.append(cache)
    return torch.cat(firsts), caches


def _prompt_pass(
    decoder: Decoder, prompt: PromptGroup, cache: DynamicCache, reading: PromptReading, *, keep: bool
) -> Tensor:
    """h_0 of a group's rows, (b, d); fills the cache."""
    use_cache = keep or bool(prompt.prefix)
    if takes_groups(decoder) and takes_kernels(decoder):
        two_sided = reading.attention == "bidirectional"
        options = {"two_sided": two_sided, "last_alone": not reading.mean}
        states = prompt_states(decoder, prompt.ids, prompt.mask, cache if use_cache else None, **options)
        return _first_state(states, prompt.own_mask, reading)
    positions = (prompt.mask.cumsum(dim=1) - 1).clamp_min(0)  # counted from each row's first token
    out = decoder.transformer(
        input_ids=prompt.ids,
        attention_mask=prompt.mask,
        position_ids=positions[:, len(prompt.prefix) :],
        past_key_values=cache if use_cache else None,
        use_cache=use_cache,
        # transformers then makes the masks of all layers, and attention itself, two-sided
        **({"is_causal": False} if reading.attention == "bidirectional" else {}),
    )
    return _first_state(out.last_hidden_state, prompt.own_mask, reading)


def _first_state(states: Tensor, mask: Tensor, reading: PromptReading) -> Tensor:
    """h_0, (b, d), of a prompt's states, (b, N, d), padded on the left."""
    if not reading.mean:
        return states[:, -1]
    sums = states.float().masked_fill((mask == 0).unsqueeze(-1), 0).sum(dim=1)
    return (sums / mask.sum(dim=1, keepdim=True)).to(states.dtype)


def _count_layers(decoder: Decoder) -> int:
    config: Any = decoder.transformer.config
    return config.get_text_config().num_hidden_layers


def _restore(states: Tensor, order: list[int]) -> Tensor:
    """Undo a reordering of the rows."""
    if order == list(range(len(order))):
        return states
    return states[torch.tensor(order, device=states.device).argsort()]


def recompute_states(
    decoder: Decoder,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    num_steps: int,
    temperature: float = 1.0,
    soft_token_gradients: str = "full",
    reading: PromptReading = CAUSAL,
) -> Tensor:
    """The same states by the plain loop: the whole sequence through the transformer at every step, without a cache.

    The yardstick of the parity check; K + 1 times the prompt's cost. Arguments and result as in `refine`. Under
    bidirectional attention all must fit into a sliding window, as it knows none.
    """
    _check(decoder, attention_mask, [num_steps] * len(input_ids), temperature, reading)
    input_ids, attention_mask = align_right(input_ids, attention_mask)
    embeddings = decoder.vocabulary.embedding(input_ids)  # (B, N, d)
    one, length = attention_mask.new_ones(len(attention_mask), 1), attention_mask.shape[1]
    states: list[Tensor] = []
    chain = GradientChain(soft_token_gradients)
    for step in range(num_steps + 1):
        if step:
            token = decoder.vocabulary.soft_token(chain.source(states[-1]), temperature, detach=chain.detached)
            embeddings = torch.cat([embeddings, token.unsqueeze(1)], dim=1)
            attention_mask = torch.cat([attention_mask, one], dim=1)
        two_sided = reading.attention == "bidirectional"
        out = decoder.transformer(
            inputs_embeds=embeddings,
            attention_mask=_two_sided_mask(attention_mask, length, embeddings.dtype) if two_sided else attention_mask,
            position_ids=(attention_mask.cumsum(dim=1) - 1).clamp_min(0),
            use_cache=False,
        ).last_hidden_state
        states.append(chain.written(out[:, -1] if step else _first_state(out, attention_mask, reading)))
    return torch.stack(states, dim=1)


def _two_sided_mask(mask: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """To be added to scores, (B, 1, M, M): all of the first `length` tokens see each other, later ones those before."""
    places = torch.arange(mask.shape[1], device=mask.device)
    seen = (places <= places.unsqueeze(1)) | (places < length)  # (M, M); no prompt token is after `length`
    seen = seen & mask.bool()[:, None, None, :]
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, torch.finfo(dtype).min)


def _check(
    decoder: Decoder, attention_mask: Tensor, num_steps: Sequence[int], temperature: float, reading: PromptReading
) -> None:
    kind = str(getattr(decoder.transformer.config, "model_type", "unknown"))
    if reading.attention == "bidirectional" and kind not in PARITY_TESTED:
        raise UnsupportedBackboneError(f"bidirectional attention is not tested for {kind}; use attention: causal")
    if len(num_steps) != len(attention_mask):
        raise UsageError(f"num_steps has {len(num_steps)} numbers for {len(attention_mask)} texts; give one K for each")
    if min(num_steps) < 0:
        raise UsageError(f"num_steps must be 0 or more, not {min(num_steps)}")
    if temperature <= 0:
        raise UsageError(f"the soft-token temperature must be above 0, not {temperature}")
    most = max(num_steps)
    longest = int(attention_mask.sum(dim=1).max())
    if longest + most > decoder.max_positions:
        room = decoder.max_positions - most
        raise UsageError(
            f"{longest} prompt and {most} soft tokens exceed the backbone's {decoder.max_positions} positions; lower "
            + (f"max_seq_length to {room} or num_steps" if room > 0 else "num_steps")
        )
    if most and decoder.transformer.training and _checkpointing(decoder):
        raise UsageError("gradient checkpointing switches the key-value cache off; train with smaller batches instead")


def _checkpointing(decoder: Decoder) -> bool:
    name = "is_activation_checkpointing"  # its name since transformers 5.20; the older one warns there
    return bool(
        getattr(decoder.transformer, name, False) or getattr(decoder.transformer, "gradient_checkpointing", False)
    )
