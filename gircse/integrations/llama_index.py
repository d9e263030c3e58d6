"""LlamaIndex: a GIRCSE model as `llama_index.core` `BaseEmbedding`. Extra ``llama-index``."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from gircse.errors import MissingExtraError
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
        model = model if model is not None or stored_name in (None, _SHIPPED) else stored_name
        embedder = Embedder(model, **settings)
        super().__init__(model_name=embedder.name or _SHIPPED, **settings, **kwargs)
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
