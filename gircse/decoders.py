"""Which decoders the refinement loop can serve exactly, and how their parts are found.

Knows Hugging Face causal language models; knows nothing of texts, pooling or training. A model family is served when it
is on the list that the parity tests cover, or when a probe of the actual weights finds that the loop equals the model's
own forward pass. Everything else is refused: an embedding that is slightly wrong is worse than none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gircse.errors import UnsupportedBackboneError
from gircse.soft_tokens import Vocabulary

PARITY_TESTED = frozenset(
    {
        "cohere", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "phi",
        "phi3", "qwen2", "qwen3", "smollm3",
    }
)  # fmt: skip
"""``config.model_type`` of the families for which tests/test_parity.py compares states and gradients."""


@dataclass(frozen=True)
class Decoder:
    """A causal language model taken apart into what one refinement step needs.

    Attributes:
        transformer: The layers with the final norm: input embeddings -> last hidden states.
        vocabulary: LM head and embedding table.
        max_positions: Longest sequence (prompt and soft tokens) that the position encoding admits.
        window: Columns that attention reaches back over (sliding windows, chunks), where the family limits it. It is
            counted in columns, not in position ids: padding must not stand between tokens that are further apart.
    """

    transformer: nn.Module
    vocabulary: Vocabulary
    max_positions: int
    window: int | None = None

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Decoder:
        """Take a causal LM apart.

        Raises:
            UnsupportedBackboneError: The model has no LM head, is an encoder-decoder, or has state that is not a
                key-value cache.
        """
        config = model.config
        kind = str(getattr(config, "model_type", "unknown"))
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedBackboneError(f"{kind} is an encoder-decoder; GIRCSE needs a decoder-only language model")
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None or not isinstance(embedding, nn.Embedding):
            raise UnsupportedBackboneError(
                f"{kind} has no LM head over a token vocabulary; use a causal language model"
            )
        if getattr(config, "is_stateful", False) or getattr(model, "_is_stateful", False):
            raise UnsupportedBackboneError(
                f"{kind} keeps a recurrent state instead of a key-value cache; not supported"
            )
        transformer = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        if transformer is model or transformer is None:
            transformer = model.base_model
        vocabulary = Vocabulary(
            head=head,
            embedding=embedding,
            state_scale=_state_scale(config, kind),
            logit_scale=_logit_scale(config, kind),
            logit_cap=getattr(config, "final_logit_softcapping", None),
            embedding_scale=float(getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))),
        )
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        return cls(
            transformer,
            vocabulary,
            max_positions=int(getattr(config, "max_position_embeddings", 0) or 2**31 - 1),
            window=min((int(window) for window in windows if window is not None), default=None),
        )


def _logit_scale(config: object, kind: str) -> float:
    if kind.startswith("cohere"):
        return float(getattr(config, "logit_scale", 1.0))
    if kind.startswith("granite"):
        return 1.0 / float(getattr(config, "logits_scaling", 1.0))
    return 1.0


def _state_scale(config: object, kind: str) -> float:
    return 1.0 / float(getattr(config, "logits_scaling", 1.0)) if kind.startswith("minicpm") else 1.0


def require_exact(model: PreTrainedModel, decoder: Decoder) -> None:
    """Refuse a model that the refinement loop would not reproduce exactly.

    Families in `PARITY_TESTED` pass at once. Others are probed on their own weights with a short random prompt:
    logits from the taken-apart head, cached steps on soft tokens, and a padded row must each agree with the model's
    own uncached forward pass.

    Raises:
        UnsupportedBackboneError: Naming the check that failed.
    """
    kind = str(getattr(model.config, "model_type", "unknown"))
    if kind in PARITY_TESTED:
        return
    try:
        failed = _failed_check(model, decoder)
    except Exception as error:
        raise UnsupportedBackboneError(f"{kind} cannot be run as a generative encoder ({error})") from error
    if failed:
        raise UnsupportedBackboneError(
            f"{kind} is not supported: {failed} differ from the model's own forward pass, so embeddings would be wrong"
        )


@torch.no_grad()
def _failed_check(model: PreTrainedModel, decoder: Decoder) -> str | None:
    from gircse.refiner import recompute_states, refine  # imported here: refiner is one room above this one

    device = decoder.vocabulary.embedding.weight.device
    size = decoder.vocabulary.embedding.num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size, (2, 9), generator=generator).to(device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    tolerance = 1e-3 if decoder.vocabulary.embedding.weight.dtype == torch.float32 else 5e-2
    own = model(input_ids=ids[:1], use_cache=False)
    hidden = decoder.transformer(input_ids=ids[:1], use_cache=False).last_hidden_state
    if not _close(decoder.vocabulary.logits(hidden), own.logits, tolerance):
        return "the logits"
    embedded = decoder.transformer(inputs_embeds=decoder.vocabulary.embedding(ids[:1]), use_cache=False)
    if not _close(embedded.last_hidden_state, hidden, tolerance):
        return "the states of embedded inputs"
    states = refine(decoder, ids, mask, num_steps=3)
    if not _close(states[:1], recompute_states(decoder, ids[:1], mask[:1], num_steps=3), tolerance):
        return "the states over a key-value cache"
    alone = refine(decoder, ids[1:, 4:], mask[1:, 4:], num_steps=3)
    if not _close(states[1:], alone, tolerance):
        return "the states of padded rows"
    return None


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    scale = b.float().abs().max().clamp_min(1e-6)
    return bool(torch.isfinite(a).all()) and float((a.float() - b.float()).abs().max() / scale) <= tolerance
