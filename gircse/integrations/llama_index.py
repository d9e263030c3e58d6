"""LlamaIndex: a GIRCSE model as `llama_index.core` `BaseEmbedding`. Extra ``llama-index``."""

from __future__ import annotations

import asyncio
import json
import os
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from gircse.checksum import vectors_checksum
from gircse.errors import MissingExtraError, UsageError
from gircse.integrations import Embedder

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import Field, PrivateAttr
except ImportError as error:
    raise MissingExtraError("gircse.integrations.llama_index", "llama-index") from error

if TYPE_CHECKING:
    from gircse.model import GIRCSE


class GIRCSEEmbedding(BaseEmbedding):
    """An embedding model for LlamaIndex: ``Settings.embed_model = GIRCSEEmbedding()``.

    Args:
        model: As `gircse.integrations.Embedder` takes it, and so are the next four.
        instruction: Of queries.
        document_instruction: Of documents.
        num_steps: K.
        device: For a model named by path.
        **kwargs: As `BaseEmbedding` takes them, e.g. ``embed_batch_size``.

    Raises:
        UsageError: The settings are stored ones of a model object, which nobody could load again.
    """

    instruction: str | None = Field(default=None, description="Of queries; the checkpoint's where None.")
    document_instruction: str | None = Field(default=None, description="Of documents; the checkpoint's where None.")
    num_steps: int | None = Field(default=None, ge=0, description="Refinement steps K; the model's where None.")
    device: str | None = Field(default=None, description="Of a model named by path.")
    _embedder: Embedder = PrivateAttr()

    def __init__(
        self,
        model: GIRCSE | str | os.PathLike[str] | None = None,
        *,
        instruction: str | None = None,
        document_instruction: str | None = None,
        num_steps: int | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        settings: dict[str, Any] = {
            "instruction": instruction,
            "document_instruction": document_instruction,
            "num_steps": num_steps,
            "device": device,
        }
        # `model_name` is what the base class stores; from_dict() gives it back, and it must load the same model.
        stored_name = kwargs.pop("model_name", None)
        if model is None and stored_name is not None and stored_name.startswith(_OBJECT):
            raise UsageError(
                "an embedding made from a model object cannot be made again: save the model and give its folder"
            )
        model = model if model is not None or stored_name in (None, _SHIPPED) else stored_name
        embedder = Embedder(model, **settings)
        name = embedder.name or (_SHIPPED if model is None else _name_of_object(embedder.model))
        super().__init__(model_name=name, **settings, **kwargs)
        self._embedder = embedder

    @classmethod
    def class_name(cls) -> str:
        """Name in stored settings."""
        return "GIRCSEEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embedder.embed_queries([query])[0].tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embedder.embed_documents(texts).tolist()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


_SHIPPED = "gircse"
_OBJECT = "object:"


def _name_of_object(model: GIRCSE) -> str:
    """Another name wherever vectors may differ: by it LlamaIndex decides whether those of its cache may be used."""
    facts = [vectors_checksum(model.encoder), model.prompts, model.num_steps, model.max_seq_length, model.truncate_dim]
    return _OBJECT + sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
