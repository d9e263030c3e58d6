"""Classes for ecosystems that want a class of their own; each module imports its ecosystem, this file none.

`Embedder` is what they share: a model with the settings that a chain, a pipeline or a table keeps. Knows how a text
becomes a list of numbers; knows no ecosystem.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from gircse.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from gircse.model import GIRCSE

_loaded: WeakValueDictionary[tuple[str | None, str | None], GIRCSE] = WeakValueDictionary()
_loading = threading.Lock()
_encoding = threading.Lock()  # ecosystems call from many threads; the model takes all cores anyway


class Embedder:
    """A model and the settings of its vectors, which always have length 1: dot, cosine and L2 then rank alike.

    Args:
        model: A model, or a saved model's folder or hub id; the model that ships with gircse where None. One named by
            path is loaded at first use, and shared by all embedders of the process that name the same path and device.
        instruction: Of queries; the checkpoint's ``query`` prompt where None.
        document_instruction: Of documents, for symmetric tasks; the checkpoint's ``document`` prompt where None.
        num_steps: Refinement steps K; the model's where None.
        device: As SentenceTransformer takes it; for a model named by path only.

    Raises:
        UsageError: A device is given for a model that is loaded already, or `num_steps` is negative.
    """

    def __init__(
        self,
        model: GIRCSE | str | os.PathLike[str] | None = None,
        *,
        instruction: str | None = None,
        document_instruction: str | None = None,
        num_steps: int | None = None,
        device: str | None = None,
    ) -> None:
        self.name = os.fspath(model) if isinstance(model, str | os.PathLike) else None
        self._model = None if model is None or self.name is not None else model
        if self._model is not None and device is not None:
            raise UsageError("the model is on a device already: move it with model.to(device)")
        if num_steps is not None and num_steps < 0:
            raise UsageError(f"num_steps must be 0 or more, not {num_steps}")
        self.instruction, self.document_instruction = instruction, document_instruction
        self.num_steps, self.device = num_steps, device
        self._made_from_object = self._model is not None

    @property
    def model(self) -> GIRCSE:
        """The model, loaded at first use."""
        if self._model is None:
            self._model = _load(self.name, self.device)
        return self._model  # type: ignore[return-value]

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return self.model.get_embedding_dimension() or 0

    def settings(self) -> dict[str, str | int | None]:
        """The arguments that make the same embedder again, as JSON can hold them.

        Raises:
            UsageError: The model was given as an object, so nobody could load it again.
        """
        if self._made_from_object:
            raise UsageError(
                "an embedder made from a model object cannot be stored: save the model and give its folder"
            )
        return {
            "model": self.name,
            "instruction": self.instruction,
            "document_instruction": self.document_instruction,
            "num_steps": self.num_steps,
            "device": self.device,
        }

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of queries, (n, d) float32 of length 1."""
        model = self.model
        with _encoding:
            return model.encode_query(
                list(texts), instruction=self.instruction, num_steps=self.num_steps, normalize_embeddings=True
            )

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of documents, (n, d) float32 of length 1."""
        model = self.model
        with _encoding:
            return model.encode_document(
                list(texts), instruction=self.document_instruction, num_steps=self.num_steps, normalize_embeddings=True
            )


class HasEmbedder:
    """A class of an ecosystem whose constructor is `Embedder`'s; its `embedder` does the work."""

    def __init__(
        self,
        model: GIRCSE | str | os.PathLike[str] | None = None,
        *,
        instruction: str | None = None,
        document_instruction: str | None = None,
        num_steps: int | None = None,
        device: str | None = None,
    ) -> None:
        self.embedder = Embedder(
            model,
            instruction=instruction,
            document_instruction=document_instruction,
            num_steps=num_steps,
            device=device,
        )


def _load(name: str | None, device: str | None) -> GIRCSE:
    from gircse.model import GIRCSE

    with _loading:
        model = _loaded.get((name, device))
        if model is None:
            model = _loaded[name, device] = GIRCSE(name, device=device).pack_weights()
        return model
