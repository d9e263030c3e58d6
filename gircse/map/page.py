"""A map as one HTML file that needs no network. Knows the page's data; knows nothing of models. See page.html.j2."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from gircse.groups.clusters import cluster, distinctive_words
from gircse.map import Method
from gircse.map.points import EmbeddingFile, Labels
from gircse.map.projection import align, nearest, project
from gircse.search.corpus import Scalar

_MAX_CATEGORIES = 12  # as many as the page has colours


@dataclass(frozen=True)
class Coloring:
    """Categories of the points.

    Attributes:
        name: What they are.
        categories: Their names.
        values: Of each point, an index into `categories`.
        ordered: Whether they have an order, as ranges of numbers do.
    """

    name: str
    categories: list[str]
    values: list[int]
    ordered: bool = False


def make_views(
    files: Sequence[EmbeddingFile], texts: Sequence[str] | None, method: Method, clusters: int
) -> list[dict[str, Any]]:
    """One layout a file, each with its own clusters and neighbours; later ones are turned to lie over the first."""
    views: list[dict[str, Any]] = []
    reference: np.ndarray | None = None
    for file, name in zip(files, _view_names(files), strict=True):
        points, note = project(file.vectors, method)
        points = points if reference is None else align(points, reference)
        reference = points if reference is None else reference
        labels = cluster(file.vectors, clusters)
        coloring = Coloring("cluster", _cluster_names(texts, labels), labels.tolist())
        views.append(
            {
                "name": name,
                "note": note,
                "points": np.round(points, 4).tolist(),
                "clusters": vars(coloring),
                "nearest": nearest(file.vectors).tolist(),
            }
        )
    return views


def _cluster_names(texts: Sequence[str] | None, clusters: np.ndarray) -> list[str]:
    """A name for every cluster: its number, and where there are texts its words."""
    words = [[]] * (int(clusters.max()) + 1) if texts is None else distinctive_words(texts, clusters)
    return [f"{place}: {', '.join(own)}" if own else f"cluster {place}" for place, own in enumerate(words, start=1)]


def color_column(name: str, values: Sequence[Scalar | None]) -> Coloring:
    """Categories of a column: its most frequent values, or fifths of a range of many numbers."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(set(numbers)) > _MAX_CATEGORIES and len(numbers) == sum(value is not None for value in values):
        return _ranges(name, values, numbers)
    words = ["(none)" if value is None else str(value) for value in values]
    common = [word for word, _ in Counter(words).most_common()]
    if len(common) > _MAX_CATEGORIES:
        common = [*common[: _MAX_CATEGORIES - 1], "(others)"]
    place = {word: index for index, word in enumerate(common)}
    return Coloring(name, common, [place.get(word, len(common) - 1) for word in words])


def _ranges(name: str, values: Sequence[Scalar | None], numbers: Sequence[float]) -> Coloring:
    edges = np.unique(np.quantile(numbers, [0, 0.2, 0.4, 0.6, 0.8, 1]))
    categories = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    places = [
        len(categories) if value is None else min(int(np.searchsorted(edges, value, "right")) - 1, len(categories) - 1)
        for value in (None if value is None else float(value) for value in values)
    ]
    if len(categories) in places:
        categories.append("(none)")
    return Coloring(name, categories, places, ordered=True)


def write_page(
    output: Path,
    *,
    title: str,
    files: Sequence[EmbeddingFile],
    labels: Labels,
    total: int,
    method: Method,
    clusters: int,
    color_by: str | None,
) -> None:
    """Write the map.

    Args:
        output: The HTML file.
        title: Its heading.
        files: One view each, over the same rows.
        labels: Texts and colours.
        total: Rows that the points were sampled from.
        method: Of the projection.
        clusters: k of k-means.
        color_by: Name of the column that `labels.values` come from.
    """
    column = color_column(color_by, labels.values) if color_by and labels.values else None
    data = {
        "ids": files[0].ids,
        "texts": labels.texts,
        "column": vars(column) if column else None,
        "views": make_views(files, labels.texts, method, clusters),
    }
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("page.html.j2").render(
        title=title, count=len(files[0].ids), total=total, views=data["views"], column=column, data=_script(data)
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")


def _view_names(files: Sequence[EmbeddingFile]) -> list[str]:
    """What distinguishes the files: their instructions, their steps, in the end their names."""
    instructions = [file.made.get("instruction") or file.made.get("prompt") or "no instruction" for file in files]
    steps = [f"{name}, K = {file.made.get('num_steps')}" for file, name in zip(files, instructions, strict=True)]
    for names in (instructions, steps):
        if len(set(names)) == len(files) and all(file.made for file in files):
            return names
    return [file.path.stem for file in files]


def _script(data: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
