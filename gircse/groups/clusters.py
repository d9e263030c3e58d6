"""Groups of texts that nobody has named: k-means over vectors, and names for what it finds.

Knows vectors, words and soft tokens; knows nothing of files or pages. Everything is seeded: the same vectors give the
same clusters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from math import log
from typing import TYPE_CHECKING

import numpy as np
from sklearn.cluster import KMeans

from gircse.errors import UsageError

if TYPE_CHECKING:
    from gircse.model import GIRCSE

SEED = 0
TEXTS_A_NAME = 32
"""Texts of a cluster, those nearest to its centre, whose soft tokens name it."""

_CANDIDATES = 200  # vocabulary entries looked at for a cluster's name
_WORD_STARTS = ("Ġ", "▁")  # how tokenizers write the space before a word


def cluster(vectors: np.ndarray, count: int) -> np.ndarray:
    """K-means in all dimensions: the cluster of every vector, (n,), numbered from 0 by size, largest first.

    Raises:
        UsageError: There are fewer vectors than clusters.
    """
    if not 1 <= count <= len(vectors):
        raise UsageError(f"{len(vectors)} vectors make no {count} clusters")
    labels = KMeans(count, random_state=SEED).fit_predict(vectors)
    by_size = [label for label, _ in Counter(labels.tolist()).most_common()]
    rank = {label: place for place, label in enumerate(by_size)}
    return np.array([rank[label] for label in labels.tolist()])


def closeness(vectors: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The cosine similarity of every vector, of length 1, to the centre of its cluster: (n,)."""
    centres = np.stack([vectors[clusters == place].mean(axis=0) for place in range(int(clusters.max()) + 1)])
    centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return np.einsum("nd,nd->n", vectors, centres[clusters])


def most_central(near: np.ndarray, clusters: np.ndarray, count: int) -> list[np.ndarray]:
    """The rows of each cluster that are nearest to its centre, nearest first; `near` as `closeness` gives it."""
    members = [np.flatnonzero(clusters == place) for place in range(int(clusters.max()) + 1)]
    return [rows[np.argsort(-near[rows], kind="stable")[:count]] for rows in members]


def distinctive_words(texts: Sequence[str], clusters: np.ndarray, words: int = 3) -> list[list[str]]:
    """The words of each cluster that are frequent in it and rare in the others (TF-IDF over clusters)."""
    count = int(clusters.max()) + 1
    frequencies = [Counter[str]() for _ in range(count)]
    for text, place in zip(texts, clusters.tolist(), strict=True):
        frequencies[place].update(set(re.findall(r"[^\W\d_]{3,}", text.lower())))
    spread = Counter(word for counter in frequencies for word in counter)
    found = []
    for counter in frequencies:
        scores = {word: seen * log((1 + count) / spread[word]) for word, seen in counter.items() if seen > 1}
        found.append(sorted(scores, key=lambda word: (-scores[word], word))[:words])
    return found


def spoken_words(
    model: GIRCSE, texts: Sequence[str], groups: Sequence[np.ndarray], prompt: str, words: int = 3
) -> list[list[str]]:
    """What the model itself says of each group: words that its first soft token has more of than those of the others.

    A model that was taught to begin with an answer to the instruction names the groups so; of another one these are
    the words that it would go on with. Pieces of words are left out, and capitals do not count.

    Args:
        model: That made the vectors.
        texts: All of them.
        groups: Rows of the texts that speak for each group, as `most_central` gives them.
        prompt: Before every text.
        words: At most so many a group, the best first.
    """
    from gircse.explanation import mean_soft_token

    central = [[texts[int(row)] for row in rows] for rows in groups]
    said = np.stack([mean_soft_token(model, own, prompt) for own in central])  # (groups, V)
    gains = said * np.log((said + 1e-6) / (said.mean(axis=0) + 1e-6))
    tokenizer = model.encoder.tokenizer
    marked = any(mark in token for token in map(str, tokenizer.get_vocab()) for mark in _WORD_STARTS)
    found = []
    for row in gains:
        scores = Counter[str]()
        for token in np.argsort(-row, kind="stable")[:_CANDIDATES].tolist():
            starts = not marked or str(tokenizer.convert_ids_to_tokens(token)).startswith(_WORD_STARTS)
            word = str(tokenizer.decode([token])).strip().lower()
            if starts and row[token] > 0 and re.fullmatch(r"[^\W\d_]{3,}", word):
                scores[word] += row[token]
        found.append([word for word, _ in scores.most_common(words)])
    return found
