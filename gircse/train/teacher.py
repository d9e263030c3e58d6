"""The teacher: a model that reads the training texts once, however often the run is killed and resumed.

Knows texts, vectors and files; knows nothing of losses or of what is done with what it says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from gircse.other_models import load_other_model

Teacher = Callable[[list[str]], np.ndarray]
"""Embeddings (n, width) of texts, by a model that is taught from."""


def load_teacher(name: str) -> Teacher:
    """A model to be taught by.

    Raises:
        GircseError: It cannot be loaded.
    """
    on_gpu = torch.cuda.is_available()
    # Rounded to 16 bits its cosines change by less than what they are divided by in the loss.
    model = load_other_model(name, dtype=torch.float16 if on_gpu else torch.float32)
    batch_size = 1024 if on_gpu else 32
    return lambda texts: model.encode(texts, batch_size=batch_size, convert_to_numpy=True)


def keep_vectors(teacher: Teacher, name: str, folder: Path) -> Teacher:
    """A teacher that writes down what it has read, a file a call: reading takes it minutes, a large mixture hours.

    Args:
        teacher: Asked for what is not there yet.
        name: Of the teacher; the texts of another one are not found.
        folder: Of the files; made if need be. A kill leaves a file whole or not at all.
    """

    def read(texts: list[str]) -> np.ndarray:
        path = folder / f"{sha256(json.dumps([name, texts]).encode()).hexdigest()}.npy"
        if path.is_file():
            return np.load(path)
        vectors = teacher(texts)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{path.stem}.{os.getpid()}.partial"  # every process of a run reads for itself
        with temporary.open("wb") as file:
            np.save(file, vectors)
        temporary.replace(path)
        return vectors

    return read
