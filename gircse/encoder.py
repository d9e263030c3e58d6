"""The generative encoder as a sentence-transformers module: token ids in, embedding out, saved and loaded whole.

Knows tokenisation, pooling and the checkpoint's layout; knows nothing of losses, token budgets or the command line.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from gircse.adapter import (
    bytes_to_fold,
    can_fold,
    check_lora,
    fold,
    keep_state_dicts_unfolded,
    let_train,
    lora_layers,
    narrow,
    save_adapter,
    unfold,
    widen,
)
from gircse.attention import use_fastest_attention
from gircse.checkpoint import BackboneReference, Checkpoint, RefinementConfig
from gircse.checksum import vectors_checksum
from gircse.decoders import Decoder, require_exact
from gircse.errors import GircseError, UsageError
from gircse.fast.frozen_linear import freeze_linear_layers
from gircse.fast.inference_copy import InferenceCopy
from gircse.fast.int8 import int8_linear
from gircse.fast.norms import use_fused_norms
from gircse.fast.packed_linear import packed_linear, packs_in_place
from gircse.fast.packed_weights import SHARE_OF_MEMORY, PackedWeights
from gircse.fast.step_graphs import StepGraphs
from gircse.hardware import free_memory, prompt_pass_tokens, return_freed_memory
from gircse.pooling import keep_finished, pool_steps
from gircse.refiner import refine
from gircse.texts import as_texts

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

_tokenizing = threading.Lock()
"""Held while a tokenizer works: cutting sets a state of it that all threads share."""


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of texts under one prompt.

    Attributes:
        ids: One list of token ids a text, prompt included, without padding; never empty.
        truncated: Whether the text was cut to fit `max_length`.
    """

    ids: list[list[int]]
    truncated: list[bool]

    def __len__(self) -> int:
        return len(self.ids)


class GenerativeEncoder(InputModule):
    """A decoder that writes K soft tokens about a text; the pooled states are the embedding (GIRCSE, section 3).

    As a sentence-transformers module it adds three features: ``sentence_embedding`` (B, d); ``step_embeddings``
    (B, max(K, 1), d), the embeddings after each step; both float32 and not normalised; and ``refinement_states``
    (B, K + 1, d), the states h_0..h_K that they are pooled from.

    Args:
        backbone: A causal language model.
        tokenizer: Its tokenizer.
        reference: Where the backbone's weights came from.
        config: What else the vectors depend on.
        training: Facts of the run that trained it, kept in the checkpoint.

    Attributes:
        fold_adapter: Whether a frozen LoRA adapter is folded into the weights where no gradient is wanted: the same
            vectors up to rounding, at half the time on a CPU. Of weights in 16 bits, which are folded on a CPU only,
            the originals are kept, where a quarter of the free memory holds them. Set it to False where the weights
            of the backbone must stay as they are, bit by bit.
        packed_weights: Copies of the linear layers' weights that make soft tokens faster on a CPU and take as much
            memory as those weights again, together at most a quarter of what is free at first. Set its ``enabled`` to
            False to keep the memory, of `inference_copy` as well.
        inference_copy: What serves inference instead wherever it can.
        quantized: ``int8`` after `quantize`, else None.

    Raises:
        UnsupportedBackboneError: The loop would not equal the backbone's own forward pass.
    """

    config_file_name = "gircse_config.json"
    tokenizer: PreTrainedTokenizerBase  # type: ignore[assignment]  # the base class also admits bare tokenizers
    forward_kwargs = frozenset({"num_steps"})  # type: ignore[assignment]  # a set that nobody can change by accident

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reference: BackboneReference,
        config: RefinementConfig,
        training: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        decoder = Decoder.from_model(backbone)
        require_exact(backbone, decoder)
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.reference = reference
        self.refinement = config
        self.training_facts = training or {}
        self._finetuned_whole = False  # all weights can, or could once, be trained: they are saved
        self._changed_whole = False  # and may have been: no adapter goes over them
        self.quantized: str | None = None
        self.checksum_before_freezing: str | None = None
        self._parameters_before_freezing: int | None = None
        self.fold_adapter = True
        self._room_to_fold: bool | None = None
        keep_state_dicts_unfolded(backbone)
        self._notice_full_finetuning()
        self.packed_weights = PackedWeights()
        self.inference_copy = InferenceCopy()
        self.step_graphs = StepGraphs()
        # Cutting on the left would cut the instruction; the length is checked here, so the tokenizer need not warn.
        tokenizer.truncation_side = "right"
        tokenizer.model_max_length = int(1e9)

    @property
    def decoder(self) -> Decoder:
        """The backbone taken apart. Looked up anew: adapters replace layers in place."""
        return Decoder.from_model(self.backbone)

    @property
    def has_adapter(self) -> bool:
        """Whether LoRA layers sit in the backbone."""
        return bool(getattr(self.backbone, "_hf_peft_config_loaded", False))

    @property
    def max_seq_length(self) -> int:
        """Longest prompt in tokens."""
        return self.refinement.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.configure(max_seq_length=value)

    def configure(self, **changes: Any) -> None:
        """Replace fields of the `RefinementConfig`; the values are checked."""
        self.refinement = RefinementConfig(**{**asdict(self.refinement), **changes})

    def get_embedding_dimension(self) -> int:
        """d, the width of the backbone's hidden states."""
        return int(self.backbone.get_input_embeddings().embedding_dim)  # type: ignore[union-attr]

    @property
    def weights(self) -> str:
        """What is this model's own, and saved: ``adapter``, ``full``, or ``backbone`` of an untrained one: nothing."""
        self._notice_full_finetuning()
        return "adapter" if self.has_adapter else "full" if self._finetuned_whole else "backbone"

    def _notice_full_finetuning(self) -> None:
        """Weights that could once be trained stay this model's own when they are frozen afterwards."""
        if not self.has_adapter and any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self._finetuned_whole = True

    def add_lora(self, config: LoraConfig) -> None:
        """Put LoRA layers into the backbone and freeze everything else.

        Raises:
            UsageError: The weights under them have been trained: the adapter alone would be saved. Or the adapter is of
                a kind that is not the same once it is saved and loaded.
        """
        check_lora(config, self._changed_whole)
        self.backbone.requires_grad_(False)
        self.backbone.add_adapter(config)
        widen(self.backbone)

    def unfreeze(self) -> None:
        """Let what is this model's own be trained further: its adapter, or all weights of a model without one.

        A loaded model is frozen, as is one that was made with neither an adapter nor ``full_finetune``.

        Raises:
            UsageError: The weights are quantised or packed.
        """
        if self.frozen:
            raise UsageError("packed and 8-bit weights cannot be trained; load the model again")
        let_train(self.backbone, adapter_only=self.has_adapter)

    @property
    def weights_dtype(self) -> str:
        """What products are computed in: ``float32``, ``bfloat16`` ..., or ``int8``."""
        return self.quantized or str(self.backbone.dtype).removeprefix("torch.")

    @property
    def num_parameters(self) -> int:
        """Of the backbone and its adapter; after `quantize` or `pack` what it was before."""
        return self._parameters_before_freezing or sum(parameter.numel() for parameter in self.parameters())

    @property
    def frozen(self) -> bool:
        """Whether `quantize` or `pack` has replaced the weights, which then neither train nor are saved."""
        return self.checksum_before_freezing is not None

    def quantize(self) -> None:
        """Round the weights of all linear layers to 8 bits, the adapter folded in; there is no way back.

        Raises:
            UsageError: The model is not on the CPU, or its weights are packed.
        """
        if self.quantized:
            return
        if self.backbone.device.type != "cpu":
            raise UsageError(f"8-bit weights compute on the CPU, not on {self.backbone.device.type}; choose device cpu")
        if self.frozen:
            raise UsageError("packed weights are not quantised; load the model again and quantise that")
        self._freeze(partial(int8_linear, table=self.decoder.vocabulary.embedding.weight))
        self.quantized = "int8"

    def pack(self) -> None:
        """Keep the weights of all linear layers packed and in no other form, the adapter folded in; no way back.

        An LM head that is tied to the embedding table stays there: soft tokens are made of the table itself.

        Does nothing where packed products are not the fastest, on a GPU, or where `packed_weights` are not enabled.
        """
        dtype = self.backbone.dtype
        on_cpu = self.backbone.device.type == "cpu"
        if not self.frozen and on_cpu and self.packed_weights.enabled and packs_in_place(dtype):
            self._freeze(partial(packed_linear, dtype=dtype, table=self.decoder.vocabulary.embedding.weight))

    def _freeze(self, make: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
        self.checksum_before_freezing, self._parameters_before_freezing = vectors_checksum(self), self.num_parameters
        self.requires_grad_(False)
        freeze_linear_layers(self.backbone, make)
        self.packed_weights.drop()
        self.inference_copy.drop()
        return_freed_memory()
        self.backbone._hf_peft_config_loaded = False

    def settled_decoder(self) -> Decoder:
        """What a pass is computed with: at inference on a CPU the packed copy of the backbone, where there is one.

        Otherwise the backbone itself, its adapter folded in or taken out.
        """
        learns = self.training or torch.is_grad_enabled()
        copies = self.fold_adapter and self.packed_weights.enabled and not torch.is_autocast_enabled("cpu")
        copies = copies and not (learns or self.frozen)
        if copies and (found := self.inference_copy.decoder(self.backbone)) is not None:
            self.packed_weights.drop()  # of weights that were trained until now
            return found
        self.inference_copy.drop()
        self.settle_adapter()
        return self.decoder

    def settle_adapter(self) -> None:
        """Fold the adapter into the weights, or take it out again, as `fold_adapter` and training ask."""
        if not self.has_adapter:
            if torch.is_grad_enabled():
                self._notice_full_finetuning()
                self._changed_whole = self._changed_whole or self._finetuned_whole
            return
        layers = lora_layers(self.backbone)
        if self.fold_adapter and not self.training and can_fold(self.backbone, layers) and self._has_room(layers):
            fold(layers)
        else:
            unfold(layers)
            if not self.training:
                narrow(layers)

    def _has_room(self, layers: list[LoraLayer]) -> bool:
        """Whether the originals of 16-bit weights can be kept. Decided once: vectors should not change by the hour."""
        if self._room_to_fold is None:
            self._room_to_fold = bytes_to_fold(layers) <= SHARE_OF_MEMORY * free_memory(self.backbone.device)
        return self._room_to_fold

    # Text to token ids

    def tokenize_texts(
        self, texts: Sequence[str], prompt: str | None = None, max_length: int | None = None
    ) -> TokenizedTexts:
        """Token ids of ``prompt + text``, tokenised as one string; only the text is ever cut, at its end.

        Args:
            texts: The texts. An empty one under an empty prompt becomes a single special token.
            prompt: Put before every text.
            max_length: Longest result in tokens; `max_seq_length` where not given.

        Raises:
            UsageError: The prompt leaves no room for the text, or something is no text (`gircse.texts`).
        """
        prompt, limit = prompt or "", self.max_seq_length if max_length is None else max_length
        if limit < 1:
            raise UsageError(f"the maximum length must be 1 token or more, not {limit}")
        if prompt:
            with _tokenizing:
                prompt_length = len(self.tokenizer(prompt, verbose=False).input_ids)
            if prompt_length >= limit:
                raise UsageError(
                    f"the instruction alone takes {prompt_length} of {limit} tokens; "
                    "shorten it or raise the maximum length"
                )
        joined = [prompt + text for text in as_texts(texts)]
        if not joined:
            return TokenizedTexts([], [])
        with _tokenizing:
            ids: list[list[int]] = self.tokenizer(joined, verbose=False).input_ids
            truncated = [len(row) > limit for row in ids]
            if any(truncated):
                # A second pass over the long ones: only the tokenizer knows which special tokens belong at the end.
                long = [text for text, cut in zip(joined, truncated, strict=True) if cut]
                cut_ids = iter(self.tokenizer(long, truncation=True, max_length=limit, verbose=False).input_ids)
                ids = [next(cut_ids) if cut else row for row, cut in zip(ids, truncated, strict=True)]
        return TokenizedTexts([row or [self._filler_token] for row in ids], truncated)

    @property
    def _filler_token(self) -> int:
        """Stands in for a text without tokens, and pads (padding is masked, so its value does not matter)."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id):
            if isinstance(token, int):
                return token
        return 0

    def pad(self, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """A batch as tensors, padded on the left: ``input_ids`` and ``attention_mask``, both (B, N) on the CPU."""
        longest = max(len(row) for row in ids)
        input_ids = torch.full((len(ids), longest), self._filler_token, dtype=torch.long)
        attention_mask = torch.zeros((len(ids), longest), dtype=torch.long)
        for index, row in enumerate(ids):
            input_ids[index, longest - len(row) :] = torch.tensor(row, dtype=torch.long)
            attention_mask[index, longest - len(row) :] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """The sentence-transformers entry: texts to a padded batch."""
        return self.pad(self.tokenize_texts(inputs, prompt).ids)

    # Token ids to embeddings

    def forward(
        self, features: dict[str, Any], num_steps: int | Sequence[int] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Add ``refinement_states``, ``step_embeddings`` and ``sentence_embedding`` to the features.

        Args:
            features: ``input_ids`` and ``attention_mask``, (B, N), padded on either side. ``soft_token_gradients``
                may be among them: one of `gircse.gradient_chain.SOFT_TOKEN_GRADIENTS`, ``full`` where it is not.
            num_steps: K for this call, or for each row; the checkpoint's where not given. 0 is the encoder-only vector
                h_0. A row keeps its last embedding where others take more steps.
            **kwargs: Ignored, as sentence-transformers' interface asks.
        """
        decoder = self.settled_decoder()
        config = self.refinement
        steps = config.num_steps if num_steps is None else num_steps
        steps = int(steps) if isinstance(steps, Integral) else steps  # NumPy's too
        device = features["input_ids"].device
        if device.type == "cpu" and not self.step_graphs.anywhere:
            self.step_graphs.drop()  # the model has left a GPU
        packs = not self.frozen and decoder.transformer is self.decoder.transformer
        with self.packed_weights.products(device) if packs else nullcontext():
            states = refine(
                decoder,
                features["input_ids"],
                features["attention_mask"],
                num_steps=steps,
                temperature=config.temperature,
                prompt_tokens=prompt_pass_tokens(device),
                graphs=self.step_graphs,
                soft_token_gradients=features.get("soft_token_gradients", "full"),
                reading=config.reading,
            )
        features["refinement_states"] = states
        features["step_embeddings"] = pool_steps(states, config.pooling)
        if not isinstance(steps, int):
            features["step_embeddings"] = keep_finished(features["step_embeddings"], states, steps)
        features["sentence_embedding"] = features["step_embeddings"][:, -1]
        return features

    # Checkpoints

    def get_config_dict(self) -> dict[str, Any]:
        """What gircse_config.json holds."""
        return asdict(Checkpoint(self.reference, self.refinement, self.weights, self.training_facts))

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write adapter or full weights, tokenizer and configuration.

        A LoRA model stores its adapter and names its backbone. Without an adapter, weights that can or could be trained
        are stored whole, and a backbone that was always frozen is only named.

        Raises:
            UsageError: `safe_serialization` is False, as pickled weights are not written; or weights are quantised or
                packed.
        """
        if not safe_serialization:
            raise UsageError("weights are saved as safetensors only; leave safe_serialization at its default")
        if self.frozen:
            made, by = ("8-bit", "quantize_weights") if self.quantized else ("packed", "pack_weights")
            raise UsageError(f"{made} weights are not saved; save the model before {by}")
        if self.has_adapter:
            save_adapter(self.backbone, output_path, self.reference.name)
        elif self.weights == "full":
            self.backbone.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)
        self.save_config(output_path)

    @classmethod
    def load(  # type: ignore[override]
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> GenerativeEncoder:
        """Load what `save` wrote, from a folder or the hub.

        Args:
            model_name_or_path: Folder or hub id.
            subfolder: Where in it.
            token: Hub token.
            cache_folder: Hub cache.
            revision: Hub revision.
            local_files_only: Never ask the network.
            model_kwargs: For the backbone's ``from_pretrained`` (``dtype``, ``attn_implementation`` ...); the key
                ``backbone`` names another place of the same backbone weights.
            **kwargs: Ignored, as sentence-transformers' interface asks.

        Raises:
            GircseError: The configuration is incomplete, or the backbone's weights are not those it was trained on.
        """
        hub = {
            "subfolder": subfolder, "token": token, "cache_folder": cache_folder, "revision": revision,
            "local_files_only": local_files_only,
        }  # fmt: skip
        values = cls.load_config(model_name_or_path, **hub)
        checkpoint = Checkpoint.from_dict(values, model_name_or_path)
        folder = cls.load_dir_path(model_name_or_path, **hub)
        if folder is None:
            raise GircseError(f"{model_name_or_path}: the checkpoint's files are not there")
        options = dict(model_kwargs or {})
        place = options.pop("backbone", None) or checkpoint.backbone.name
        if checkpoint.weights == "full":
            backbone = load_causal_lm(folder, **options)
        else:
            backbone = load_causal_lm(_verified_backbone(place, checkpoint.backbone), **options)
        if checkpoint.weights == "adapter":
            backbone.load_adapter(os.fspath(folder))
            if backbone.dtype != torch.float32:
                widen(backbone, folder)
        backbone.requires_grad_(checkpoint.weights == "full")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        made = cls(backbone, tokenizer, checkpoint.backbone, checkpoint.refinement, checkpoint.training)
        made._changed_whole = checkpoint.weights == "full"
        return made


def load_causal_lm(folder: str | Path, **options: Any) -> PreTrainedModel:
    """A causal LM from a local folder, in float32 unless `options` names a dtype."""
    options.setdefault("dtype", options.pop("torch_dtype", torch.float32))  # its name in older transformers
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # a bar over a second's work, which no argument switches off
    try:
        backbone = AutoModelForCausalLM.from_pretrained(folder, **options)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    use_fastest_attention(backbone)
    use_fused_norms(backbone)
    return backbone


def _verified_backbone(place: str, reference: BackboneReference) -> Path:
    from gircse.backbones import resolve_backbone

    found = resolve_backbone(place)
    if found.sha256 != reference.sha256:
        raise GircseError(
            f"the weights of {place} (sha256 {found.sha256[:12]}) are not those this model was trained on "
            f"({reference.name}, sha256 {reference.sha256[:12]}); fetch that version of the backbone"
        )
    return found.path
