"""LanceDB: an embedding function in its registry, under the name ``gircse``. Extra ``search``.

LanceDB stores the arguments of `create` in the table and makes the function again when the table is opened, so the
model is named by its path. Importing this module registers the function; import it before opening such a table.
"""

from __future__ import annotations

from typing import Any

from gircse.errors import MissingExtraError
from gircse.integrations import Embedder

try:
    import numpy as np
    from lancedb.embeddings import TextEmbeddingFunction, register
    from pydantic import PrivateAttr
except ImportError as error:
    raise MissingExtraError("gircse.integrations.lancedb", "search") from error


@register("gircse")
class GIRCSEEmbeddingFunction(TextEmbeddingFunction):
    """Embeds source columns and queries of a LanceDB table.

    Args:
        name: A saved model's folder or hub id; the model that ships with gircse where None.
        instruction: Of queries.
        document_instruction: Of documents.
        num_steps: K.
        device: As SentenceTransformer takes it.

    Example:
        >>> function = GIRCSEEmbeddingFunction.create(num_steps=5)
        >>> class Passage(LanceModel):
        ...     text: str = function.SourceField()
        ...     vector: Vector(function.ndims()) = function.VectorField()
    """

    name: str | None = None
    instruction: str | None = None
    document_instruction: str | None = None
    num_steps: int | None = None
    device: str | None = None
    max_retries: int = 0  # nothing here fails by chance
    _embedder: Embedder = PrivateAttr()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._embedder = Embedder(
            self.name,
            instruction=self.instruction,
            document_instruction=self.document_instruction,
            num_steps=self.num_steps,
            device=self.device,
        )

    def ndims(self) -> int:
        """Length of a vector."""
        return self._embedder.dimensions

    def compute_query_embeddings(self, query: str, *args: Any, **kwargs: Any) -> list[np.ndarray | None]:
        """Vectors of queries."""
        return list(self._embedder.embed_queries([query]))

    def generate_embeddings(self, texts: list[str] | np.ndarray, *args: Any, **kwargs: Any) -> list[np.ndarray | None]:
        """Vectors of documents; an empty cell gets none."""
        present = [place for place, text in enumerate(texts) if text is not None]
        vectors: list[np.ndarray | None] = [None] * len(texts)
        for place, vector in zip(present, self._embedder.embed_documents([texts[p] for p in present]), strict=True):
            vectors[place] = vector
        return vectors
