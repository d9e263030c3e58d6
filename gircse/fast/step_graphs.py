"""A refinement step recorded once as a CUDA graph and replayed for every soft token, forward and backward.

Knows a `Decoder` and tensors of keys and values; knows nothing of prompts, losses or texts. A step is one token a row:
hundreds of small operations, whose launching takes many times as long as the GPU takes to compute them. All steps of
all batches of one size are the same operations over the same memory, so they are recorded together.

The backward pass computes its step again and keeps nothing but hidden states, whatever K. Only recording needs a GPU:
elsewhere the same operations can be run one by one, which is how tests compare them with the plain loop.
"""

from __future__ import annotations

import gc
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from gircse.attention import ATTENTION
from gircse.decoders import Decoder
from gircse.gradient_chain import GradientChain
from gircse.hardware import is_out_of_memory

logger = logging.getLogger(__name__)

FEWEST_STEPS = 2
"""Fewer are written without graphs at inference, where batches have many sizes and recording takes as long as two."""

_POSITIONS = 32
"""Positions of the buffers are a multiple of this, so that prompts of similar length share a graph."""

_FEW_ROWS, _ROWS, _MANY_ROWS = 64, 512, 256
"""At inference rows are a multiple of the first, from the second on of the third."""

_GROWTH = 1.5
"""How much more memory is taken than a size asks for: the next sizes are often a little larger."""

_MOST_SIZES = 24
"""Graphs of so many sizes are kept, those used last."""


class StepGraphs:
    """Recorded steps of one decoder, by size. A copy or pickle of this holds none.

    Attributes:
        enabled: False leaves all steps to the plain loop.
        anywhere: Run without a GPU too, unrecorded: for tests.
    """

    def __init__(self) -> None:
        self.enabled, self.anywhere = True, False
        self._lock = threading.Lock()  # several threads may encode, and share the buffers
        self._steps: OrderedDict[tuple[Any, ...], Steps] = OrderedDict()
        self._stamp: tuple[Any, ...] = ()
        self._pool: Any = None
        self._storage: dict[bool, Tensor] = {}  # of keys and values, and of their gradients
        self._turn = _Turn()

    def __reduce__(self) -> tuple[type[StepGraphs], tuple[()], dict[str, bool]]:
        return StepGraphs, (), {"enabled": self.enabled, "anywhere": self.anywhere}

    def serve(self, decoder: Decoder, state: Tensor, num_steps: int) -> bool:
        """Whether steps of this decoder are replayed.

        Args:
            decoder: The backbone, taken apart.
            state: h_0, (B, d).
            num_steps: K of all rows.
        """
        transformer = decoder.transformer
        return (
            self.enabled
            and (num_steps >= FEWEST_STEPS or torch.is_grad_enabled())
            and (state.is_cuda or self.anywhere)
            and decoder.window is None
            and getattr(transformer.config, "_attn_implementation", None) in ("sdpa", ATTENTION)
            and not (transformer.training and _drops(transformer))
            and not torch.is_autocast_enabled(state.device.type)
            and all(_is_whole(weight) and weight.device == state.device for weight in _weights(decoder))
        )

    def prepare(
        self,
        decoder: Decoder,
        state: Tensor,
        cache: Sequence[tuple[Tensor, Tensor]],
        dtype: torch.dtype,
        *,
        length: int,
        num_steps: int,
        temperature: float,
        detach: bool = False,
    ) -> Steps | None:
        """The recorded steps of a batch's size, recorded now if need be.

        Args:
            decoder: The backbone, taken apart.
            state: h_0, (B, d).
            cache: Keys and values of every layer, (rows, heads, positions, head_dim) each, of any rows and positions.
            dtype: That they will have in `write`.
            length: Positions of the longest prompt.
            num_steps: K of all rows.
            temperature: Of the soft tokens.
            detach: No gradient goes back through them.

        Returns:
            None where steps are not replayed, or cannot be recorded here, which is warned of once.
        """
        if not self.serve(decoder, state, num_steps):
            return None
        trained, rows = torch.is_grad_enabled(), len(state)
        unit = 1 if trained else _FEW_ROWS if rows < _ROWS else _MANY_ROWS
        size = -(-rows // unit) * unit, -(-(length + num_steps) // _POSITIONS) * _POSITIONS
        shapes = [(size[0], tensor.shape[1], size[1], tensor.shape[3]) for pair in cache for tensor in pair]
        with self._lock:
            if (stamp := _stamp(decoder)) != self._stamp:  # other weights, or weights in other places
                self._forget()
                self._stamp = stamp
            key = (*size, state.dtype, state.device, dtype, temperature, detach, trained)
            try:
                if key not in self._steps:
                    self._steps[key] = self._record(decoder, shapes, state, dtype, temperature, detach, trained)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise  # a smaller batch may do
                reason = str(error).splitlines()[0][:200]
                logger.warning(
                    "steps cannot be recorded here and are computed one by one, which is slower (%s)", reason
                )
                self.enabled = False
                self._forget()
                return None
            self._steps.move_to_end(key)
            return self._steps[key]

    def write(
        self,
        steps: Steps,
        state: Tensor,
        mask: Tensor,
        cache: Sequence[tuple[Tensor, Tensor]],
        *,
        num_steps: int,
        chain: GradientChain,
        tell: Callable[[int], None],
    ) -> list[Tensor]:
        """The states of K soft tokens. Differentiable; the backward pass of one call must come before the next call.

        Args:
            steps: As `prepare` gives them.
            state: h_0, (B, d).
            mask: (B, N), 1 for tokens and 0 for padding on the left.
            cache: Keys and values of every layer, (B, heads, N, head_dim) each.
            num_steps: K.
            chain: Where gradients go between the states.
            tell: Called with k when h_k has been asked for.

        Returns:
            K tensors, (B, d).
        """
        length = mask.shape[1]
        tensors = [tensor for pair in cache for tensor in pair]
        states: list[Any] = [state]
        with self._lock:
            steps.begin(mask)
            if steps.trained:
                states = [_Enter.apply(steps, state, *tensors, *steps.parameters)]
            else:
                steps.fill(tensors)
            for place in range(length, length + num_steps):
                last = chain.source(states[-1])
                state = _Step.apply(last, steps, place) if steps.trained else steps.forward(last, place)
                states.append(chain.written(state))
                tell(place - length + 1)
        return states[1:]

    def _record(
        self,
        decoder: Decoder,
        shapes: list[tuple[int, ...]],
        state: Tensor,
        dtype: torch.dtype,
        temperature: float,
        detach: bool,
        trained: bool,
    ) -> Steps:
        while len(self._steps) >= _MOST_SIZES:
            self._steps.popitem(last=False)
        buffers = [self._buffers(shapes, state, dtype, of_gradients) for of_gradients in (False, True)[: 1 + trained]]
        if state.is_cuda and self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()  # shared: nothing in it outlives a replay
        return Steps(_Parts(decoder, temperature, detach), buffers, state, self._turn, self._pool)

    def drop(self) -> None:
        """Give recordings and their memory back."""
        if not self._storage:
            return
        with self._lock:
            self._forget()
            self._storage.clear()

    def _forget(self) -> None:
        self._steps.clear()
        self._pool = None  # a pool ends with its last graph

    def _buffers(
        self, shapes: list[tuple[int, ...]], state: Tensor, dtype: torch.dtype, of_gradients: bool
    ) -> list[Tensor]:
        """Zeros for keys and values of all layers; all sizes share one piece of memory, as one is used at a time."""
        self._turn.number += 1  # what an earlier call has left there goes
        sizes = [math.prod(shape) for shape in shapes]
        storage = self._storage.get(of_gradients)
        fits = storage is not None and (storage.dtype, storage.device) == (dtype, state.device)
        if storage is None or not fits or len(storage) < sum(sizes):
            self._forget()  # they were recorded over memory that goes
            self._storage.pop(of_gradients, None)
            with torch.inference_mode(mode=False):
                storage = torch.zeros(int(_GROWTH * sum(sizes)), dtype=dtype, device=state.device)
            self._storage[of_gradients] = storage
        parts = storage[: sum(sizes)].zero_().split(sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _drops(transformer: nn.Module) -> bool:
    """Whether training draws random numbers, which a replayed step would not draw anew."""
    own = getattr(getattr(transformer, "config", None), "attention_dropout", None) or 0
    return own > 0 or any(isinstance(module, nn.Dropout) and module.p > 0 for module in transformer.modules())


def _is_whole(weight: nn.Parameter) -> bool:
    """Whether this process holds it: FSDP's and DeepSpeed's parts come together for a while only."""
    return type(weight.data) is Tensor and not hasattr(weight, "ds_id")


def _stamp(decoder: Decoder) -> tuple[Any, ...]:
    """What recorded operations depend on: where the weights lie, and which way their layers compute."""
    modules = [*decoder.transformer.modules(), decoder.vocabulary.head]
    ways = [
        (vars(module).get("forward"), getattr(module, "merged", None), getattr(module, "disable_adapters", None))
        for module in modules
    ]
    places = [weight.data_ptr() for weight in _weights(decoder)]
    trained = [weight.requires_grad for weight in _weights(decoder)]
    return ways, places, trained, decoder.transformer.training


def _weights(decoder: Decoder) -> list[nn.Parameter]:
    """Of layers, head and table, each once."""
    found = [*decoder.transformer.parameters(), *decoder.vocabulary.head.parameters()]
    return list(dict.fromkeys(found))


@dataclass
class _Turn:
    """Number of the call whose keys and values the buffers hold, of whatever size."""

    number: int = 0


class _StaticLayer(DynamicLayer):
    """Keys and values of one layer over all positions of the buffers, of which the mask shows some."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor, *, in_place: bool) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys, values
        self._place, self._in_place = place, in_place
        self.new: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put the new position in its place."""
        assert self.keys is not None
        assert self.values is not None
        self.new = key_states.to(self.dtype), value_states.to(self.dtype)
        if self._in_place:
            self.keys.index_copy_(2, self._place, self.new[0])
            self.values.index_copy_(2, self._place, self.new[1])
            return self.keys, self.values
        return self.keys.index_copy(2, self._place, self.new[0]), self.values.index_copy(2, self._place, self.new[1])


class _Parts(nn.Module):
    """What a step computes, with all weights that it takes."""

    def __init__(self, decoder: Decoder, temperature: float, detach: bool) -> None:
        super().__init__()
        self.transformer, self.head = decoder.transformer, decoder.vocabulary.head
        self.vocabulary, self.temperature, self.detach = decoder.vocabulary, temperature, detach

    def forward(self, hidden: Tensor, layers: list[_StaticLayer], mask: Tensor, positions: Tensor) -> Tensor:
        """From h_{k-1}, (B, d), to h_k."""
        cache = DynamicCache()
        cache.layers.extend(layers)
        token = self.vocabulary.soft_token(hidden, self.temperature, detach=self.detach)  # (B, d)
        out = self.transformer(
            inputs_embeds=token.unsqueeze(1),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state[:, -1]


class Steps:
    """Buffers of one size, and the recorded step over them.

    `hidden`, `place` and, backward, `out_grad` go in; `out`, and `hidden_grad` come out. Gradients of keys, values and
    parameters add up in their buffers from the last step to the first.
    """

    def __init__(
        self,
        parts: _Parts,
        buffers: list[list[Tensor]],
        state: Tensor,
        turn: _Turn,
        pool: Any,
    ) -> None:
        self.trained = trained = len(buffers) > 1  # with gradients of keys and values
        rows, _, capacity, _ = buffers[0][0].shape
        self.parts = parts
        trainable = {name: weight for name, weight in self.parts.named_parameters() if weight.requires_grad and trained}
        self.names, self.parameters = list(trainable), list(trainable.values())
        self.turn = turn
        device = state.device
        with torch.inference_mode(mode=False), torch.no_grad():
            self.hidden, self.out, self.out_grad, self.hidden_grad = (
                state.new_zeros(rows, state.shape[1]) for _ in range(4)
            )
            self.cache, self.cache_grads = buffers[0], buffers[1] if trained else []
            self.parameter_grads = [torch.zeros_like(weight) for weight in self.parameters]
            self.place = torch.zeros(1, dtype=torch.long, device=device)  # column of the step
            self.columns = torch.arange(capacity, device=device)
            self.seen = torch.ones(rows, capacity, dtype=torch.bool, device=device)  # columns that are no padding
            self.padding = torch.zeros(rows, 1, dtype=torch.long, device=device)  # how many are
            self._replay_forward = _recorded(self._forward, device, pool)
            self._replay_backward = _recorded(self._backward, device, pool) if trained else None

    def begin(self, mask: Tensor) -> None:
        """A new batch of prompts, (B, N) of 0 and 1."""
        self.turn.number += 1
        rows, length = mask.shape
        self.seen[:rows, :length] = mask != 0
        self.seen[:, length:] = True
        self.padding[:rows] = length - mask.sum(dim=1, keepdim=True)
        self.padding[rows:] = 0  # an earlier batch's could place these rows before the first position

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """The prompts' keys and values."""
        rows, _, length, _ = tensors[0].shape
        shown = [buffer[:rows, :, :length] for buffer in self.cache]
        torch._foreach_copy_(shown, list(tensors))  # type: ignore[attr-defined]  # torch's own lists leave it out

    def forward(self, hidden: Tensor, place: int) -> Tensor:
        """From h_{k-1}, (B, d), to h_k, whose token stands in column `place`; its keys and values are kept."""
        rows = len(hidden)
        self.hidden[:rows] = hidden
        self.place.fill_(place)
        self._replay_forward()
        return self.out[:rows].clone()

    def backward(self, hidden: Tensor, place: int, grad: Tensor) -> Tensor:
        """From the gradient of h_k to that of h_{k-1}."""
        assert self._replay_backward is not None, "these steps were made without gradients"
        self.hidden.copy_(hidden)
        self.place.fill_(place)
        self.out_grad.copy_(grad)
        self._replay_backward()
        return self.hidden_grad.clone()

    def _inputs(self, hidden: Tensor, cache: list[Tensor], *, in_place: bool) -> tuple[Any, ...]:
        """Of `_Parts`, for the step in `place`."""
        pairs = zip(cache[::2], cache[1::2], strict=True)
        layers = [_StaticLayer(keys, values, self.place, in_place=in_place) for keys, values in pairs]
        mask = self.seen & (self.columns <= self.place)  # (B, positions)
        return hidden, layers, mask[:, None, None, :], self.place - self.padding

    @torch.no_grad()
    def _forward(self) -> None:
        self.out.copy_(self.parts(*self._inputs(self.hidden, self.cache, in_place=True)))

    def _backward(self) -> None:
        with torch.enable_grad():
            hidden = self.hidden.detach().requires_grad_()
            cache = [tensor.detach().requires_grad_() for tensor in self.cache]
            # Other names of the same weights: autograd would have their own gradients wait for the prompts' stream.
            weights = [weight.detach().requires_grad_() for weight in self.parameters]
            inputs = self._inputs(hidden, cache, in_place=False)
            state = functional_call(self.parts, dict(zip(self.names, weights, strict=True)), inputs)
            new = [tensor for layer in inputs[1] for tensor in layer.new]
        with torch.no_grad():
            from_later = [gradient.index_select(2, self.place) for gradient in self.cache_grads]
            grads = torch.autograd.grad(
                [state, *new],
                [hidden, *cache, *weights],
                [self.out_grad, *from_later],
                allow_unused=True,
            )
            self.hidden_grad.zero_() if grads[0] is None else self.hidden_grad.copy_(grads[0])
            totals = [*self.cache_grads, *self.parameter_grads]
            found = [(total, grad) for total, grad in zip(totals, grads[1:], strict=True) if grad is not None]
            into, what = zip(*found, strict=True)
            torch._foreach_add_(into, what)  # type: ignore[attr-defined]


def _recorded(work: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
    """The work as a CUDA graph; without a GPU as it is."""
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()  # what libraries prepare at their first call cannot be recorded
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.disable()  # an older graph that is destroyed while another is recorded spoils it
    try:
        # Other threads may pin memory for batches to come meanwhile.
        options: dict[str, Any] = {"pool": pool, "stream": _recording_stream(device)}
        with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
            work()
    finally:
        if collecting:
            gc.enable()
    return graph.replay


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings of a device, which share memory only so; PyTorch's own may be of another device."""
    return torch.cuda.Stream(device)


class _Enter(torch.autograd.Function):
    """The prompts' keys and values go into the buffers; backward, what the steps have added up comes out."""

    @staticmethod
    def forward(ctx: Any, steps: Steps, state: Tensor, *tensors: Tensor) -> Tensor:
        cache = tensors[: len(steps.cache)]
        steps.fill(cache)
        for total in (steps.cache_grads, steps.parameter_grads):
            if total:
                torch._foreach_zero_(total)  # type: ignore[attr-defined]
        ctx.steps, ctx.turn, ctx.length = steps, steps.turn.number, cache[0].shape[2]
        return state.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _check_turn(ctx)
        # The buffers themselves: autograd changes no gradient that somebody else holds.
        cache = [total[:, :, : ctx.length] for total in ctx.steps.cache_grads]
        return None, gradients[0], *cache, *ctx.steps.parameter_grads


class _Step(torch.autograd.Function):
    """One soft token. A step's backward pass comes after the next one's, which its result feeds."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, steps: Steps, place: int) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.steps, ctx.turn, ctx.place = steps, steps.turn.number, place
        return steps.forward(hidden, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _check_turn(ctx)
        return ctx.steps.backward(*ctx.saved_tensors, ctx.place, gradients[0]), None, None


def _check_turn(ctx: Any) -> None:
    if ctx.turn != ctx.steps.turn.number:
        raise RuntimeError(
            "another batch has been embedded before this one's backward pass; run backward after every forward pass, "
            "or switch the recorded steps off (model.encoder.step_graphs.enabled = False)"
        )
