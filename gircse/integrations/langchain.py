"""LangChain: a GIRCSE model as `langchain_core.embeddings.Embeddings`. Extra ``langchain``."""

from __future__ import annotations

from gircse.errors import MissingExtraError
from gircse.integrations import HasEmbedder

try:
    from langchain_core.embeddings import Embeddings
except ImportError as error:
    raise MissingExtraError("gircse.integrations.langchain", "langchain") from error


class GIRCSEEmbeddings(HasEmbedder, Embeddings):
    """Embeddings for any LangChain vector store, retriever or semantic cache.

    Args:
        model: As `gircse.integrations.Embedder` takes it, and so are the others.
        instruction: Of queries.
        document_instruction: Of documents.
        num_steps: K.
        device: For a model named by path.

    Example:
        >>> from langchain_core.vectorstores import InMemoryVectorStore
        >>> store = InMemoryVectorStore(GIRCSEEmbeddings(instruction="Given a question, find its answer"))
    """

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of documents."""
        return self.embedder.embed_documents(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        """The vector of a query."""
        return self.embedder.embed_queries([text])[0].tolist()
