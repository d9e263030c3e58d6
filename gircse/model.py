"""GIRCSE, the user's object: a SentenceTransformer whose encoder writes soft tokens.

Knows prompts, batches and what soft tokens are made of; knows nothing of losses, files or the command line.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from gircse.batches import batch_cost, plan_batches
from gircse.checkpoint import BackboneReference, RefinementConfig, check_no_backbone, no_saved_model, not_loaded
from gircse.encoder import GenerativeEncoder, TokenizedTexts, load_causal_lm
from gircse.errors import GircseError, UsageError
from gircse.explanation import SoftTokenContent, soft_token_contents
from gircse.fast.grouped_steps import takes_groups
from gircse.fast.module_walk import SteadySentenceTransformer
from gircse.hardware import default_batch_tokens, is_out_of_memory
from gircse.model_card import GIRCSEModelCardData
from gircse.texts import as_texts, is_single

if TYPE_CHECKING:
    from peft import LoraConfig

    from gircse.search.rerank import RankedDocument

logger = logging.getLogger(__name__)

DEFAULT_INSTRUCTION = "Given a question, retrieve passages that answer it"
"""The instruction of queries where neither the call nor the checkpoint names one."""


class GIRCSE(SteadySentenceTransformer):
    """Generative text embeddings: soft tokens written about a text, their mean hidden state as its vector.

    Everything a SentenceTransformer does works, and `encode`, `encode_query` and `encode_document` take two arguments
    more: ``num_steps`` (K >= 0, the number of soft tokens; 0 is the encoder-only vector) and ``batch_tokens`` (padded
    tokens a batch, which bounds memory).

    Args:
        model_name_or_path: A saved model's folder or hub id; the model that ships with the package where not given.
        dtype: Of the weights, e.g. ``torch.bfloat16``; float32 where not given.
        backbone: Another place of the same backbone weights, where the checkpoint's own is not to be had.
        **kwargs: As `SentenceTransformer` takes them.

    Raises:
        GircseError: Nothing was saved there, or its backbone's weights are not those it was trained on.

    Example:
        >>> model = GIRCSE()
        >>> query = model.encode_query("who wrote Hamlet?", instruction="Given a question, retrieve its answer")
        >>> model.similarity(query, model.encode_document(["Shakespeare wrote it.", "Rome lies on the Tiber."]))
    """

    default_huggingface_organization = None
    model_card_data_class = GIRCSEModelCardData
    # The package's own module is no remote code: it needs no trust_remote_code, and any other does.
    _module_classes: ClassVar[Mapping[str, type[nn.Module]]] = {"gircse.encoder.GenerativeEncoder": GenerativeEncoder}

    def __init__(
        self,
        model_name_or_path: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        backbone: str | None = None,
        **kwargs: Any,
    ) -> None:
        named = str(model_name_or_path) if model_name_or_path else None
        if kwargs.get("modules") is None:
            model_name_or_path = str(model_name_or_path or pretrained_path())
            check_no_backbone(model_name_or_path)
            options = dict(kwargs.pop("model_kwargs", None) or {})
            options |= {key: value for key, value in (("dtype", dtype), ("backbone", backbone)) if value is not None}
            kwargs["model_kwargs"] = options
        try:
            super().__init__(model_name_or_path, **kwargs)
        except (OSError, JSONDecodeError) as error:
            raise not_loaded(str(model_name_or_path), error) from error
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise GircseError(
                f"{model_name_or_path} brings code of its own to run; pass trust_remote_code=True if you trust it"
            ) from error
        self.loaded_from = named  # None: it ships with the package, or is new
        if not isinstance(self[0], GenerativeEncoder):
            raise GircseError(f"{model_name_or_path} is not a GIRCSE model; load it with SentenceTransformer")

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str,
        *,
        num_steps: int = 5,
        pooling: str = "mean",
        temperature: float = 1.0,
        max_seq_length: int = 512,
        attention: str = "causal",
        lora: LoraConfig | None = None,
        full_finetune: bool = False,
        prompts: dict[str, str] | None = None,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        **model_kwargs: Any,
    ) -> GIRCSE:
        """An untrained model over any Hugging Face decoder.

        Args:
            name_or_path: A folder, a hub id, or a known name (``smollm2-135m``, ``gemma3-270m``).
            num_steps: K, kept in the checkpoint.
            pooling: One of `gircse.pooling.POOLINGS`.
            temperature: Soft-token temperature.
            max_seq_length: Longest prompt in tokens.
            attention: One of `gircse.refiner.ATTENTIONS`, over the prompt.
            lora: Trainable low-rank layers; the backbone under them is frozen.
            full_finetune: Train, and save, all weights. Without it and without `lora` the model is frozen.
            prompts: Named prompts; ``query`` and ``document`` are used by `encode_query` and `encode_document`.
            dtype: Of the weights; float32 where not given.
            device: As SentenceTransformer takes it.
            **model_kwargs: For the backbone's ``from_pretrained``, e.g. ``attn_implementation``.

        Raises:
            UnsupportedBackboneError: The loop would not equal this backbone's own forward pass.
            GircseError: The backbone is not to be had.
        """
        from gircse.backbones import resolve_backbone

        if lora is not None and full_finetune:
            raise UsageError("choose one of lora and full_finetune")
        config = RefinementConfig(num_steps, pooling, temperature, max_seq_length, attention=attention)
        found = resolve_backbone(name_or_path)
        model = load_causal_lm(found.path, **({"dtype": dtype} if dtype else {}), **model_kwargs)
        model.requires_grad_(full_finetune)
        reference = BackboneReference(found.name, found.sha256, found.licence)
        encoder = GenerativeEncoder(model, AutoTokenizer.from_pretrained(found.path), reference, config)
        if lora is not None:
            encoder.add_lora(lora)
        if prompts is None:
            template = config.instruction_template
            prompts = {"query": template.format(instruction=DEFAULT_INSTRUCTION), "document": ""}
        return cls(modules=[encoder], prompts=prompts, device=device, similarity_fn_name="cosine")

    @property
    def encoder(self) -> GenerativeEncoder:
        """The generative encoder module."""
        return cast(GenerativeEncoder, self[0])

    @property
    def num_steps(self) -> int:
        """K where a call names none; kept in the checkpoint."""
        return self.encoder.refinement.num_steps

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        self.encoder.configure(num_steps=value)

    def format_instruction(self, instruction: str) -> str:
        """The prompt that puts an instruction before a text.

        Raises:
            UsageError: The instruction is empty.
        """
        if not instruction.strip():
            raise UsageError("the instruction is empty; leave it out, or say what the vector should be about")
        return self.encoder.refinement.instruction_template.format(instruction=instruction)

    def quantize_weights(self) -> GIRCSE:
        """Round the weights of all linear layers to 8 bits, for inference on a CPU; there is no way back.

        Half of float32's memory, and half of its time where the processor multiplies integers (VNNI); elsewhere a short
        query is faster and a batch is not. The vectors change a little, and can be compared with those made before.

        Returns:
            This model.

        Raises:
            UsageError: The model is not on the CPU, or its weights are packed.
        """
        self.encoder.quantize()
        return self

    def pack_weights(self) -> GIRCSE:
        """Keep the weights of all linear layers once, in the form that a CPU's products read, for inference alone.

        Half the memory, a short query some 20 ms sooner, and the same vectors: without it those weights are kept beside
        the packed copy that embeds. There is no way back to training or saving. Where packed products are not the
        fastest, and on a GPU, nothing changes.

        Returns:
            This model.
        """
        self.encoder.pack()
        return self

    # Embedding

    def encode_query(self, inputs: Any, *args: Any, instruction: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Embed queries under an instruction.

        Args:
            inputs: A text or texts.
            *args: As `SentenceTransformer.encode_query` takes them.
            instruction: What the vector should be about; the checkpoint's ``query`` prompt where not given.
            **kwargs: As `SentenceTransformer.encode_query` takes them, and ``num_steps`` and ``batch_tokens``.

        Returns:
            As `SentenceTransformer.encode_query`: (n, d) float32, or (d,) for a single text.
        """
        self._set_instruction(instruction, args, kwargs)
        return super().encode_query(inputs, *args, **kwargs)

    def encode_document(self, inputs: Any, *args: Any, instruction: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Embed documents: plain texts unless an instruction is given. Arguments and result as in `encode_query`."""
        self._set_instruction(instruction, args, kwargs)
        return super().encode_document(inputs, *args, **kwargs)

    def _set_instruction(self, instruction: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if instruction is None:
            return
        if args or kwargs.get("prompt") is not None or kwargs.get("prompt_name") is not None:
            raise UsageError("give either an instruction or a prompt, not both")
        kwargs["prompt"] = self.format_instruction(instruction)

    def _prompt_for(self, instruction: str | None, prompt: str | None, prompt_name: str | None = None) -> str | None:
        """What stands before every text: as `encode` reads a prompt, or what an instruction becomes."""
        if instruction is None:
            return self._resolve_prompt(prompt, prompt_name)
        if prompt is not None or prompt_name is not None:
            raise UsageError("give either an instruction or a prompt, not both")
        return self.format_instruction(instruction)

    def encode_steps(
        self,
        inputs: str | dict[str, str] | Iterable[str],
        *,
        num_steps: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        instruction: str | None = None,
        normalize_embeddings: bool = False,
        batch_tokens: int | None = None,
        show_progress_bar: bool = False,
    ) -> np.ndarray:
        """The embeddings after 1, 2, ..., K steps from one run: ``encode_steps(...)[:, k - 1]`` is ``encode`` at K = k.

        Args:
            inputs: A text or texts.
            num_steps: K >= 1; the checkpoint's where not given.
            prompt: Put before every text.
            prompt_name: A named prompt of the checkpoint.
            instruction: Instead of a prompt.
            normalize_embeddings: Scale every vector to length 1.
            batch_tokens: Padded tokens a batch.
            show_progress_bar: On stderr.

        Returns:
            (n, K, d) float32; (K, d) for a single text.

        Raises:
            UsageError: K is below 1.
        """
        steps = self.num_steps if num_steps is None else num_steps
        if steps < 1:
            raise UsageError(f"encode_steps needs num_steps of 1 or more, not {steps}")
        single = is_single(inputs)
        texts = cast("Sequence[str]", [inputs] if single else inputs)
        tokenized = self.tokenize_texts(texts, self._prompt_for(instruction, prompt, prompt_name))
        result = self._run_batches(
            tokenized, steps, batch_tokens, feature="step_embeddings", show_progress_bar=show_progress_bar
        )
        result = result[..., : self.truncate_dim]
        if normalize_embeddings:
            result = torch.nn.functional.normalize(result, dim=-1)
        return (result[0] if single else result).numpy()

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        num_steps: int | None = None,
        top: int | None = None,
    ) -> list[RankedDocument]:
        """Documents by their similarity to a query, best first; see `gircse.search.rerank.rerank`."""
        from gircse.search.rerank import rerank

        return rerank(self, query, documents, instruction=instruction, num_steps=num_steps, top=top)

    def encode_states(
        self,
        inputs: Sequence[str],
        *,
        num_steps: int | None = None,
        prompt: str | None = None,
        batch_tokens: int | None = None,
    ) -> Tensor:
        """The states that embeddings are pooled from, the prompt's included: compares K, K = 0 and poolings at once.

        Args:
            inputs: Texts.
            num_steps: K >= 0; the checkpoint's where not given.
            prompt: Put before every text.
            batch_tokens: Padded tokens a batch.

        Returns:
            (n, K + 1, d) float32 on the CPU: h_0, ..., h_K.
        """
        tokenized = self.tokenize_texts(inputs, prompt)
        return self._run_batches(tokenized, num_steps, batch_tokens, feature="refinement_states")

    def tokenize_texts(
        self, texts: Sequence[str], prompt: str | None = None, max_length: int | None = None
    ) -> TokenizedTexts:
        """Token ids of ``prompt + text``; see `GenerativeEncoder.tokenize_texts`.

        Where `max_length` is not given and a text is cut, a model says so once, as a warning.
        """
        tokenized = self.encoder.tokenize_texts(texts, prompt, max_length)
        if max_length is None and (cut := sum(tokenized.truncated)) and not getattr(self, "_told_of_cuts", False):
            self._told_of_cuts = True
            limit = self.max_seq_length
            logger.warning("%d of %d texts were cut to %d tokens (max_seq_length)", cut, len(tokenized.ids), limit)
        return tokenized

    def start_multi_process_pool(self, target_devices: list[str] | None = None) -> dict[Any, Any]:
        """As in sentence-transformers. The adapter is folded before the weights are shared, once for all workers."""
        self.eval()
        self.encoder.settle_adapter()
        return super().start_multi_process_pool(target_devices)

    def encode_tokenized(
        self, tokenized: TokenizedTexts, *, num_steps: int | None = None, batch_tokens: int | None = None
    ) -> Tensor:
        """Embed token ids. The same input on the same machine and number of threads gives the same bytes.

        Args:
            tokenized: What `tokenize_texts` returns.
            num_steps: K; the checkpoint's where not given.
            batch_tokens: Padded tokens a batch.

        Returns:
            (n, d) float32 on the CPU, not normalised; of the model's `truncate_dim`, where it has one.
        """
        return self._run_batches(tokenized, num_steps, batch_tokens)[:, : self.truncate_dim].contiguous()

    @property
    def pads_batches(self) -> bool:
        """Whether rows of a batch are padded to its longest: not where soft tokens are written by groups of rows."""
        return not takes_groups(self.encoder.decoder)

    @torch.inference_mode()
    def _run_batches(
        self,
        tokenized: TokenizedTexts,
        num_steps: int | None,
        batch_tokens: int | None,
        *,
        feature: str = "sentence_embedding",
        max_batch: int | None = None,
        device: torch.device | None = None,
        show_progress_bar: bool = False,
    ) -> Tensor:
        """One feature of the encoder for all texts in their order, (n, ...) float32 on the CPU."""
        self.eval()
        device = device or self.device
        steps = self.num_steps if num_steps is None else num_steps
        try:
            steps = operator.index(steps)  # NumPy's and PyTorch's whole numbers too
        except TypeError:
            raise UsageError(f"num_steps must be one whole number for all texts, not {steps!r}") from None
        texts = list(dict.fromkeys(map(tuple, tokenized.ids)))  # a text that occurs twice is embedded once
        unique = {ids: index for index, ids in enumerate(texts)}
        lengths = [len(ids) for ids in texts]
        batch_tokens = default_batch_tokens(device) if batch_tokens is None else batch_tokens
        plan = partial(plan_batches, num_steps=steps, max_batch=max_batch, padded=self.pads_batches)
        batches = plan(lengths, batch_tokens=batch_tokens)
        if not texts:
            shape = {"sentence_embedding": (), "step_embeddings": (max(steps, 1),), "refinement_states": (steps + 1,)}
            return torch.empty(0, *shape[feature], self.encoder.get_embedding_dimension())
        rows: list[Tensor | None] = [None] * len(texts)
        with tqdm(total=len(texts), desc="Texts", unit="text", disable=not show_progress_bar) as bar:
            while batches:
                batch = batches.pop(0)
                features = self.encoder.pad([texts[index] for index in batch])
                features = {name: value.to(device) for name, value in features.items()}
                try:
                    out = self(features, num_steps=steps)[feature]
                    values = out.float().cpu().contiguous()  # a copy: a view would keep every step
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    self._check_out_of_memory(len(batch), error)
                    left = [index for group in (batch, *batches) for index in group]
                    budget = batch_cost([lengths[index] for index in batch], steps, padded=self.pads_batches) // 2
                    planned = plan([lengths[index] for index in left], batch_tokens=budget)
                    batches = [[left[place] for place in group] for group in planned]
                    continue
                for index, row in zip(batch, values, strict=True):
                    rows[index] = row
                bar.update(len(batch))
        return torch.stack([cast(Tensor, rows[unique[tuple(ids)]]) for ids in tokenized.ids])

    def _check_out_of_memory(self, texts: int, error: Exception) -> None:
        """Raise what a smaller batch would not mend; warn once a model of what it does."""
        if texts == 1 or not is_out_of_memory(error):
            raise error
        if not getattr(self, "_told_of_memory", False):
            self._told_of_memory = True
            logger.warning(
                "out of memory with %d texts in a batch: going on with half; a smaller batch_tokens avoids this", texts
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def is_singular_input(self, inputs: Any) -> bool:
        """Whether this is one text: also a column of pandas, a generator or a set is several."""
        return is_single(inputs)

    def get_model_kwargs(self) -> list[str]:
        """Arguments that `encode` takes besides those of every SentenceTransformer."""
        return [*super().get_model_kwargs(), "batch_tokens"]

    @torch.inference_mode()
    def _inference(self, inputs: list[Any], **kwargs: Any) -> Any:
        """sentence-transformers' inner loop, with batches by token budget instead of by count.

        `batch_size` stays an upper bound on the texts of a batch where the caller set it below or above the default.
        """
        if kwargs.get("output_value") == "token_embeddings":
            raise UsageError("there are no token embeddings: soft tokens have states of their own (encode_states)")
        if kwargs.get("output_value") != "sentence_embedding":
            kwargs.pop("batch_tokens", None)
            return super()._inference(as_texts(inputs), **kwargs)
        tokenized = self.tokenize_texts(inputs, kwargs.get("prompt"))
        device = self._resolve_inference_device(kwargs.get("device"))
        embeddings = self._run_batches(
            tokenized,
            kwargs.get("num_steps"),
            kwargs.get("batch_tokens"),
            max_batch=None if kwargs.get("batch_size", 32) == 32 else kwargs["batch_size"],
            device=device,
            show_progress_bar=kwargs.get("show_progress_bar", False),
        )
        if (dim := kwargs.get("truncate_dim")) is not None:
            whole = self.encoder.get_embedding_dimension()
            if not 1 <= dim <= whole:
                raise UsageError(f"truncate_dim must be between 1 and {whole}, not {dim}")
            embeddings = embeddings[..., :dim]
        if kwargs.get("normalize_embeddings"):
            embeddings = torch.nn.functional.normalize(embeddings, dim=-1)
        return embeddings if kwargs.get("save_to_cpu", True) else embeddings.to(device)

    # Looking inside

    def explain(
        self,
        text: str,
        *,
        instruction: str | None = None,
        prompt: str | None = None,
        num_steps: int | None = None,
        top: int = 5,
        max_length: int | None = None,
    ) -> list[SoftTokenContent]:
        """Which vocabulary tokens each soft token is made of.

        Args:
            text: The text.
            instruction: What the vector should be about.
            prompt: Instead of an instruction; the checkpoint's default prompt, if it has one, where neither is given.
            num_steps: K >= 1; the checkpoint's where not given.
            top: Tokens listed a step.
            max_length: Longest prompt in tokens; the checkpoint's where not given.

        Returns:
            One entry a step.
        """
        steps = self.num_steps if num_steps is None else num_steps
        if steps < 1 or top < 1:
            raise UsageError(f"explain needs num_steps and top of 1 or more, not {steps} and {top}")
        return soft_token_contents(self, text, self._prompt_for(instruction, prompt), steps, top, max_length)

    def _load_default_modules(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        raise no_saved_model(model_name_or_path)


def pretrained_path() -> str:
    """Folder of the model that ships with the package."""
    return str(Path(__file__).parent / "pretrained" / "smollm2-135m")
