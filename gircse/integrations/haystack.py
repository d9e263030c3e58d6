"""Haystack: a text and a document embedder. Extra ``haystack``."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gircse.errors import MissingExtraError, UsageError
from gircse.integrations import Embedder

try:
    from haystack import Document, component, default_from_dict, default_to_dict
except ImportError as error:
    raise MissingExtraError("gircse.integrations.haystack", "haystack") from error

if TYPE_CHECKING:
    from gircse.model import GIRCSE


@component
class GIRCSETextEmbedder:
    """Embeds a query.

    Args:
        model: As `gircse.integrations.Embedder` takes it, and so are the others. A pipeline with a model object runs
            but cannot be stored as YAML; one with a path can.
        instruction: Of the query.
        num_steps: K.
        device: For a model named by path.

    Example:
        >>> GIRCSETextEmbedder(instruction="Given a question, find its answer").run("Who wrote Hamlet?")
    """

    def __init__(
        self,
        model: GIRCSE | str | None = None,
        *,
        instruction: str | None = None,
        num_steps: int | None = None,
        device: str | None = None,
    ) -> None:
        self.embedder = Embedder(model, instruction=instruction, num_steps=num_steps, device=device)

    def warm_up(self) -> None:
        """Load the model."""
        _ = self.embedder.model

    def to_dict(self) -> dict[str, Any]:
        """The component as a pipeline stores it."""
        settings = self.embedder.settings()
        del settings["document_instruction"]
        return default_to_dict(self, **settings)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GIRCSETextEmbedder:
        """The component that a pipeline stored."""
        return default_from_dict(cls, data)

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    def run(self, text: str) -> dict[str, Any]:
        """Embed a query.

        Args:
            text: The query.

        Returns:
            ``embedding``, of length 1, and ``meta``.
        """
        if not isinstance(text, str):
            raise UsageError("GIRCSETextEmbedder takes one string; documents go to GIRCSEDocumentEmbedder")
        return {"embedding": self.embedder.embed_queries([text])[0].tolist(), "meta": _meta(self.embedder)}

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    async def run_async(self, text: str) -> dict[str, Any]:
        """`run` in a thread."""
        return await asyncio.to_thread(self.run, text)


@component
class GIRCSEDocumentEmbedder:
    """Embeds documents.

    Args:
        model: As `gircse.integrations.Embedder` takes it, and so are the next three.
        instruction: Of the documents, for symmetric tasks; plain text where None and the checkpoint has no prompt.
        num_steps: K.
        device: For a model named by path.
        meta_fields_to_embed: Metadata put before the content.
        embedding_separator: Between them.
    """

    def __init__(
        self,
        model: GIRCSE | str | None = None,
        *,
        instruction: str | None = None,
        num_steps: int | None = None,
        device: str | None = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
    ) -> None:
        self.embedder = Embedder(model, document_instruction=instruction, num_steps=num_steps, device=device)
        self.meta_fields_to_embed, self.embedding_separator = meta_fields_to_embed or [], embedding_separator

    def warm_up(self) -> None:
        """Load the model."""
        _ = self.embedder.model

    def to_dict(self) -> dict[str, Any]:
        """The component as a pipeline stores it."""
        settings = self.embedder.settings()
        settings["instruction"] = settings.pop("document_instruction")
        return default_to_dict(
            self,
            **settings,
            meta_fields_to_embed=self.meta_fields_to_embed,
            embedding_separator=self.embedding_separator,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GIRCSEDocumentEmbedder:
        """The component that a pipeline stored."""
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Embed documents.

        Args:
            documents: Left as they are.

        Returns:
            ``documents``, copies with embeddings of length 1, and ``meta``.
        """
        if not isinstance(documents, list) or any(not isinstance(document, Document) for document in documents):
            raise UsageError("GIRCSEDocumentEmbedder takes a list of Documents; a string goes to GIRCSETextEmbedder")
        vectors = self.embedder.embed_documents([self._text(document) for document in documents])
        embedded = [
            replace(document, embedding=vector.tolist()) for document, vector in zip(documents, vectors, strict=True)
        ]
        return {"documents": embedded, "meta": _meta(self.embedder)}

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """`run` in a thread."""
        return await asyncio.to_thread(self.run, documents)

    def _text(self, document: Document) -> str:
        fields = [document.meta.get(name) for name in self.meta_fields_to_embed]
        return self.embedding_separator.join(
            [*(str(field) for field in fields if field is not None), document.content or ""]
        )


def _meta(embedder: Embedder) -> dict[str, Any]:
    model = embedder.model
    return {
        "model": embedder.name or model.encoder.reference.name,
        "num_steps": model.num_steps if embedder.num_steps is None else embedder.num_steps,
    }
