"""Models as mteb encoders: every text encoded once, at the largest K, and each K served from that one run.

Knows models, prompts and mteb's encoder protocol; knows nothing of tasks' files, results or reports.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from threadpoolctl import threadpool_limits

from gircse.errors import UsageError
from gircse.evaluate.cost import TransformerSize, step_clock, transformer_size
from gircse.evaluate.tasks import PER_TEXT_INSTRUCTION
from gircse.model import GIRCSE
from gircse.other_models import MINILM, load_other_model, minilm_folder
from gircse.pooling import pool_steps

logger = logging.getLogger(__name__)

_CHUNK = 256  # texts between two reports of progress; sorted by length, so padding stays small
_DEFAULT = "default"


class TextSource(Protocol):
    """A model that embeds texts after each of its steps."""

    name: str
    revision: str
    dtype: str
    steps: tuple[int | None, ...]
    size: TransformerSize | None

    def embed(self, texts: Sequence[str], prompt: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Vectors (n, steps, d), seconds to reach each step (steps,), tokens of each text."""
        ...

    def prompt(self, instruction: str | None, prompt_type: PromptType | None) -> str:
        """What stands before a text, or what kind of text it is where the model itself decides."""
        ...


class GenerativeSource:
    """A GIRCSE model. Vectors are L2-normalised, and of the model's `truncate_dim` where it has one.

    Args:
        model: The model.
        steps: K >= 0 of the wanted embeddings.
        name: ``organisation/model``, for results.
        revision: What its weights and configuration are.
        batch_tokens: Padded tokens a batch.
    """

    def __init__(
        self, model: GIRCSE, steps: Sequence[int], name: str, revision: str, batch_tokens: int | None = None
    ) -> None:
        if not steps or min(steps) < 0:
            raise UsageError("--num-steps needs numbers of 0 or more, such as 0,1,5")
        self.model, self.name, self.revision, self.batch_tokens = model, name, revision, batch_tokens
        self.steps: tuple[int | None, ...] = tuple(sorted(set(steps)))
        self.dtype = model.encoder.weights_dtype
        self.size = transformer_size(model)

    def prompt(self, instruction: str | None, prompt_type: PromptType | None) -> str:
        """The instruction in the model's template; documents stand alone."""
        if not instruction or prompt_type == PromptType.document:
            return ""
        return self.model.format_instruction(instruction)

    def embed(self, texts: Sequence[str], prompt: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """As `TextSource.embed`: one run at the largest K."""
        steps = [step for step in self.steps if step is not None]
        tokens = [len(ids) for ids in self.model.tokenize_texts(texts, prompt).ids]
        with step_clock(self.model, max(steps)) as clock:
            states = self.model.encode_states(
                texts, num_steps=max(steps), prompt=prompt, batch_tokens=self.batch_tokens
            )  # (n, K + 1, d)
        pooled = states
        if max(steps):
            pooled = torch.cat([states[:, :1], pool_steps(states, self.model.encoder.refinement.pooling)], dim=1)
        vectors = torch.nn.functional.normalize(pooled[:, steps, : self.model.truncate_dim], dim=-1).numpy()
        return vectors, clock[steps], tokens


class PlainSource:
    """Any other SentenceTransformer, with the prompts and the similarity it brings itself and without instructions.

    Args:
        model: The model.
        name: ``organisation/model``, for results.
        revision: What its weights are.
    """

    steps: tuple[int | None, ...] = (None,)

    def __init__(self, model: SentenceTransformer, name: str, revision: str) -> None:
        self.model, self.name, self.revision = model, name, revision
        self.dtype = _dtype(model)
        self.size = transformer_size(model)

    def prompt(self, instruction: str | None, prompt_type: PromptType | None) -> str:
        """The kind of text; `SentenceTransformer.encode_query` and ``encode_document`` know what to put before it."""
        return prompt_type.value if prompt_type else ""

    def embed(self, texts: Sequence[str], prompt: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """As `TextSource.embed`, with a single step."""
        import time

        encode: Callable[..., Any] = {
            "query": self.model.encode_query,
            "document": self.model.encode_document,
        }.get(prompt, self.model.encode)
        started = time.perf_counter()
        vectors = encode(list(texts), show_progress_bar=False, convert_to_numpy=True)
        seconds = time.perf_counter() - started
        return np.asarray(vectors, dtype=np.float32)[:, None], np.array([seconds]), self._token_counts(list(texts))

    def _token_counts(self, texts: list[str]) -> list[int]:
        features = self.model.preprocess(texts)
        if "attention_mask" in features:
            return [int(mask.sum()) for mask in features["attention_mask"]]
        if "offsets" in features:  # static embeddings: all tokens in a row
            return np.diff([*features["offsets"].tolist(), len(features["input_ids"])]).tolist()
        return [self.model.preprocess([text])["input_ids"].numel() for text in texts]


def _dtype(model: torch.nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


@dataclass
class _Cost:
    texts: int = 0
    tokens: int = 0
    seconds: np.ndarray = field(default_factory=lambda: np.zeros(1))
    flops: np.ndarray = field(default_factory=lambda: np.zeros(1))


class StepStore:
    """Vectors of texts at every step, kept in a file while a task runs, so that memory does not grow with it.

    Args:
        source: Embeds what is not there yet, on `threads` threads; None for as many as there are.
        on_progress: Called with texts done and texts wanted, of the current call.
    """

    def __init__(self, source: TextSource, on_progress: Callable[[int, int], None] | None = None) -> None:
        self.source, self.on_progress = source, on_progress or (lambda done, total: None)
        self.threads: int | None = None
        self._rows: dict[tuple[str, str], int] = {}
        self._file = tempfile.NamedTemporaryFile(prefix="gircse-steps-")  # noqa: SIM115  # lives as long as the store
        self._width = 0
        self._cost = _Cost()

    def get(self, texts: Sequence[str], prompts: Sequence[str], step: int | None) -> np.ndarray:
        """The vectors of texts under their prompts after a step, (n, d) float32."""
        wanted: dict[str, list[str]] = {}
        for prompt, text in dict.fromkeys(zip(prompts, texts, strict=True)):
            if (prompt, text) not in self._rows:
                wanted.setdefault(prompt, []).append(text)
        total, done = sum(map(len, wanted.values())), 0
        for prompt, missing in wanted.items():
            missing.sort(key=len, reverse=True)
            for start in range(0, len(missing), _CHUNK):
                self._add(missing[start : start + _CHUNK], prompt)
                done += len(missing[start : start + _CHUNK])
                self.on_progress(done, total)
        steps = len(self.source.steps)
        shape = (len(self._rows), steps, self._width)
        stored = np.memmap(self._file.name, dtype=np.float32, mode="r", shape=shape)
        rows = [self._rows[prompt, text] for prompt, text in zip(prompts, texts, strict=True)]
        return np.asarray(stored[rows, self.source.steps.index(step)])

    def _add(self, texts: list[str], prompt: str) -> None:
        with threadpool_limits(self.threads):  # what scores them has one
            vectors, seconds, tokens = self.source.embed(texts, prompt)
        self._width = vectors.shape[-1]
        self._file.write(np.ascontiguousarray(vectors, dtype=np.float32).tobytes())
        self._file.flush()
        for text in texts:
            self._rows[prompt, text] = len(self._rows)
        cost = self._cost
        cost.texts += len(texts)
        cost.tokens += sum(tokens)
        cost.seconds = cost.seconds + seconds
        if self.source.size is not None:
            lengths = np.array(tokens, dtype=np.float64)
            size = self.source.size
            cost.flops = cost.flops + np.array([np.sum(size.flops(lengths, s or 0)) for s in self.source.steps])

    def cost(self, step: int | None) -> dict[str, float | int | None]:
        """Seconds, tokens and floating point operations per text that a step has cost so far."""
        at, texts = self.source.steps.index(step), max(1, self._cost.texts)
        counted = self.source.size is not None and self._cost.texts > 0
        return {
            "texts": self._cost.texts,
            "tokens_per_text": self._cost.tokens / texts + (step or 0),
            "seconds_per_text": float(self._cost.seconds[at]) / texts if self._cost.texts else None,
            "flops_per_text": float(self._cost.flops[at]) / texts if counted else None,
        }

    def close(self) -> None:
        """Give the file back."""
        self._rows.clear()
        self._file.close()


class StepEncoder(AbsEncoder):
    """One step of a model as mteb wants an encoder.

    Args:
        store: Of the task that is being scored.
        step: K; None for a model without steps.
        meta: Name, revision and settings under which mteb files the scores.
        instructions: Subset to instruction, with ``default`` for the others.
        change: Applied to every text but documents (perturbations).
    """

    def __init__(
        self,
        store: StepStore,
        step: int | None,
        meta: ModelMeta,
        instructions: Mapping[str, str],
        change: Callable[[str], str] | None = None,
    ) -> None:
        self.store, self.step, self.meta, self.mteb_model_meta = store, step, meta, meta
        self.instructions, self.change = instructions, change

    def encode(self, inputs: Any, *, prompt_type: PromptType | None = None, hf_subset: str, **kwargs: Any) -> Any:  # type: ignore[override]
        """Vectors of mteb's batches, (n, d) float32; see `mteb.EncoderProtocol`."""
        source = self.store.source
        texts: list[str] = []
        prompts: list[str] = []
        for batch in inputs:
            own = batch.get(PER_TEXT_INSTRUCTION)
            texts += batch["text"]
            if own is not None:  # triplets: both sides stand under the row's instruction
                prompts += [source.prompt(instruction, None) for instruction in own]
            else:
                instruction = self.instructions.get(hf_subset, self.instructions.get(_DEFAULT))
                prompts += [source.prompt(instruction, prompt_type)] * len(batch["text"])
        if self.change is not None and prompt_type != PromptType.document:
            texts = [self.change(text) for text in texts]
        return self.store.get(texts, prompts, self.step)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Of every vector (n, d) to every other (m, d): (n, m), the greater the nearer."""
        source = self.store.source
        known = source.model if isinstance(source, PlainSource) else super()  # AbsEncoder refuses some functions
        return known.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """The same of pairs, (n, d) and (n, d): (n,)."""
        source = self.store.source
        known = source.model if isinstance(source, PlainSource) else super()
        return known.similarity_pairwise(embeddings1, embeddings2)


def model_meta(source: TextSource, step: int | None, settings: Mapping[str, Any]) -> ModelMeta:
    """What mteb files scores under: settings besides name and revision become the experiment's."""
    experiment = {"dtype": source.dtype, **({} if step is None else {"num_steps": step}), **settings}
    model: GIRCSE | SentenceTransformer = getattr(source, "model")  # noqa: B009
    encoder = source.model.encoder if isinstance(source, GenerativeSource) else None
    longest, similarity = model.max_seq_length, model.similarity_fn_name
    return ModelMeta.create_empty(
        overwrites={
            "name": source.name,
            "revision": source.revision,
            "experiment_kwargs": experiment,
            "similarity_fn_name": ScoringFunction.COSINE if encoder else ScoringFunction.from_str(similarity),
            "use_instructions": encoder is not None,
            "framework": ["Sentence Transformers", "PyTorch"],
            "n_parameters": encoder.num_parameters if encoder else sum(p.numel() for p in model.parameters()),
            "embed_dim": model.get_embedding_dimension(),
            "max_tokens": longest if longest is not None and math.isfinite(longest) else None,  # JSON knows no infinity
            "adapted_from": _backbone_name(encoder.reference.name) if encoder else None,
        }
    )


def _backbone_name(name: str) -> str:
    """The backbone as others know it: of a folder only its name, as where it lay on this machine is of no use there."""
    return Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name


def load_source(
    name: str | None,
    steps: Sequence[int] | None,
    *,
    device: str | None = None,
    dtype: str = "float32",
    quantize: str | None = None,
    batch_tokens: int | None = None,
) -> TextSource:
    """A model by folder, hub id or known name.

    Args:
        name: `MINILM`, a folder, a hub id; the model that ships with the package where not given.
        steps: K of the wanted embeddings; the model's own K where not given. A model whose own K is 0 is scored at
            K = 0 alone, which a warning in the log says; other models than GIRCSE have no K.
        device: As SentenceTransformer takes it.
        dtype: Of the weights.
        quantize: ``int8`` for 8-bit weights. Other models than GIRCSE keep theirs, which a warning in the log says.
        batch_tokens: Padded tokens a batch.

    Raises:
        GircseError: It cannot be loaded.
    """
    weights = getattr(torch, dtype)
    if name is not None and name.lower() == MINILM:
        if quantize:
            _tell_not_quantized(name)
        model = load_other_model(name, device=device, dtype=weights)
        return PlainSource(model, "sentence-transformers/all-MiniLM-L6-v2", folder_revision(minilm_folder()))
    if name is None or _is_generative(name):
        generative = GIRCSE(name, device=device, dtype=weights)
        shown, revision = _identity(name, generative)
        if quantize:
            generative.quantize_weights()
        else:
            generative.pack_weights()
        return GenerativeSource(generative, _scored_steps(generative, steps, shown), shown, revision, batch_tokens)
    if quantize:
        _tell_not_quantized(name)
    model = load_other_model(name, device=device, dtype=weights)
    return PlainSource(model, *_identity(name, model))


def _tell_not_quantized(name: str) -> None:
    logger.warning("%s is no GIRCSE model: scored with its own weights, not with 8-bit ones", name)


def _scored_steps(model: GIRCSE, asked: Sequence[int] | None, name: str) -> Sequence[int]:
    """The steps that were asked for, where the model was made to take any."""
    if asked is None or model.num_steps > 0:
        return [model.num_steps] if asked is None else asked
    if max(asked, default=0) > 0:
        logger.warning("%s is an encoder-only model: scored at K=0, whatever other steps were asked for", name)
    return [0]


def _is_generative(name: str) -> bool:
    if Path(name).is_dir():
        return (Path(name) / "gircse_config.json").is_file()
    from huggingface_hub import file_exists, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "gircse_config.json")
        return isinstance(cached, str) or bool(file_exists(name, "gircse_config.json"))
    except Exception:  # offline, unreachable, no such name: loading it as a SentenceTransformer says what is wrong
        return False


def _identity(name: str | None, model: SentenceTransformer) -> tuple[str, str]:
    """``organisation/model`` and revision."""
    if name is None:
        from gircse.model import pretrained_path

        return f"gircse/{Path(pretrained_path()).name}", folder_revision(Path(pretrained_path()))
    if Path(name).is_dir():
        return f"local/{Path(name).resolve().name}", folder_revision(Path(name))
    known = getattr(model.model_card_data, "base_model_revision", None)  # sentence-transformers asks the hub for it
    return name, str(known or _cached_commit(name) or "main")


def _cached_commit(name: str) -> str | None:
    """The commit of a hub model that was loaded from the hub's cache: what its files' folder is called.

    Not the configuration's: that of a GIRCSE model belongs to the backbone.
    """
    from huggingface_hub import try_to_load_from_cache

    for file in ("modules.json", "config.json"):
        path = try_to_load_from_cache(name, file, cache_dir=os.environ.get("SENTENCE_TRANSFORMERS_HOME"))
        if isinstance(path, str):
            return Path(path).parent.name
    return None


def folder_revision(folder: Path) -> str:
    """SHA-256 of what is loaded from a model folder, 16 digits.

    That is its files and its modules' folders. Texts about the model (.md), the log of its training and other folders
    (checkpoints, results) do not count.
    """
    modules = folder / "modules.json"
    parts = [entry["path"] for entry in json.loads(modules.read_text(encoding="utf-8"))] if modules.is_file() else []
    files = {path for part in parts if part for path in (folder / part).rglob("*")} | set(folder.iterdir())
    digest = sha256()
    for path in sorted(p for p in files if p.is_file() and p.suffix != ".md" and p.name != "log.jsonl"):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
