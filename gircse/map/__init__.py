"""A map of a corpus: `points` reads embeddings and texts, `projection` lays them out, `page` writes the HTML file.

This file holds only the words they share, so that the command line can offer them without importing anything heavy.
"""

from __future__ import annotations

from typing import Literal

Method = Literal["pca", "umap"]
"""How d dimensions become two."""

DEFAULT_MAX_POINTS = 10_000
"""Texts on a map at most; a larger corpus is sampled."""
