"""Vectors to a picture: two dimensions and nearest neighbours.

Knows numbers; knows nothing of files or pages. Everything is seeded: the same vectors give the same map.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA

from gircse.errors import MissingExtraError
from gircse.map import Method

SEED = 0
_NEIGHBOR_BLOCK = 1024  # rows compared with all others at once


def project(vectors: np.ndarray, method: Method) -> tuple[np.ndarray, str]:
    """Two dimensions.

    Args:
        vectors: (n, d) float32 of length 1.
        method: ``pca``, which keeps large distances, or ``umap``, which keeps neighbourhoods.

    Returns:
        (n, 2) float32 around 0, the farthest point at 1, and a sentence on what the axes mean.

    Raises:
        MissingExtraError: UMAP is not installed.
    """
    if method == "pca":
        pca = PCA(2, random_state=SEED)
        points = pca.fit_transform(vectors)
        kept = float(pca.explained_variance_ratio_.sum())
        note = f"PCA: the two axes hold {kept:.0%} of the variance"
    else:
        try:
            from umap import UMAP  # type: ignore[import-not-found]
        except ImportError as error:
            raise MissingExtraError("--method umap", "map") from error
        neighbors = min(15, len(vectors) - 1)
        # The spectral start needs more points than dimensions of its own; random serves the smallest maps.
        start = "spectral" if len(vectors) > 50 else "random"
        points = UMAP(n_neighbors=neighbors, metric="cosine", init=start, random_state=SEED, n_jobs=1).fit_transform(
            vectors
        )
        note = "UMAP: neighbourhoods are kept, distances between groups mean little"
    return _unit(np.asarray(points, dtype=np.float32)), note


def align(points: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Turn and mirror a layout, (n, 2), so that its points lie as near to those of another as they can.

    The axes of a projection are arbitrary; without this a switch between two layouts would show mostly that.
    """
    rotation, _ = orthogonal_procrustes(points, reference)
    return _unit(points @ rotation)


def nearest(vectors: np.ndarray, count: int = 5) -> np.ndarray:
    """The nearest vectors to each by cosine, (n, count) indices, itself left out: what a flat map cannot show."""
    count = min(count, len(vectors) - 1)
    rows = []
    for start in range(0, len(vectors), _NEIGHBOR_BLOCK):
        block = vectors[start : start + _NEIGHBOR_BLOCK]
        similarities = block @ vectors.T
        similarities[np.arange(len(block)), np.arange(start, start + len(block))] = -np.inf
        best = np.argpartition(-similarities, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(similarities, best, axis=1), axis=1, kind="stable")
        rows.append(np.take_along_axis(best, order, axis=1))
    return np.concatenate(rows)


def _unit(points: np.ndarray) -> np.ndarray:
    points = points - points.mean(axis=0)
    return points / max(float(np.abs(points).max()), 1e-12)
