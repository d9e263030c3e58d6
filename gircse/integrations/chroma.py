"""Chroma: an embedding function under the name ``gircse``. Extra ``chroma``.

A collection stores the settings, and finds the function again when it is opened, in any process that has imported this
module. One that is given to `get_collection` replaces it unseen: Chroma compares names alone. Chroma sends usage data
unless ``chromadb.Settings(anonymized_telemetry=False)`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gircse.errors import MissingExtraError, UsageError
from gircse.integrations import HasEmbedder

try:
    from chromadb import Documents, EmbeddingFunction, Embeddings
    from chromadb.utils.embedding_functions import register_embedding_function
except ImportError as error:
    raise MissingExtraError("gircse.integrations.chroma", "chroma") from error


@register_embedding_function
class GIRCSEEmbeddingFunction(HasEmbedder, EmbeddingFunction[Documents]):
    """Embeds documents and queries of a Chroma collection.

    Args:
        model: As `gircse.integrations.Embedder` takes it, and so are the others. With a model object the collection
            works but does not remember its function: give it again to `get_collection`.
        instruction: Of queries.
        document_instruction: Of documents.
        num_steps: K.
        device: For a model named by path.
    """

    def __call__(self, input: Sequence[str]) -> Embeddings:
        """Vectors of documents."""
        return list(self.embedder.embed_documents(input))

    def embed_query(self, input: Sequence[str]) -> Embeddings:
        """Vectors of queries."""
        return list(self.embedder.embed_queries(input))

    @staticmethod
    def name() -> str:
        """Name in a collection's settings."""
        return "gircse"

    def default_space(self) -> Any:
        """Cosine."""
        return "cosine"

    def get_config(self) -> dict[str, Any]:
        """What a collection stores; Chroma's NotImplemented where the model was given as an object."""
        try:
            return self.embedder.settings()
        except UsageError:
            return NotImplemented

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> GIRCSEEmbeddingFunction:
        """The function that a collection stored."""
        return GIRCSEEmbeddingFunction(**config)

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Refuse settings under which the collection's vectors would have been others; a model's folder may move.

        Raises:
            UsageError: K or the instruction of documents changed.
        """
        for key in ("num_steps", "document_instruction"):
            if old_config.get(key) != new_config.get(key):
                raise UsageError(f"the collection was made with another {key}; make a new collection for this one")
