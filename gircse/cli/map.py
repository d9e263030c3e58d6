"""`gircse map`: the command's options. The work is `gircse.map`'s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gircse.cli.common import DebugOption, JsonOption, stderr
from gircse.errors import UsageError
from gircse.groups import DEFAULT_CLUSTERS
from gircse.map import DEFAULT_MAX_POINTS, Method


def map(
    embeddings: Annotated[
        list[Path],
        typer.Argument(metavar="EMBEDDINGS", help=".parquet of gircse embed; several of one corpus get a switch."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUTPUT", help="The page, .html.")],
    texts: Annotated[
        str | None, typer.Option("--texts", metavar="FILE", help="The corpus that was embedded: texts and columns.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Column of the text; the one that was embedded where not given.")
    ] = None,
    color_by: Annotated[
        str | None, typer.Option("--color-by", metavar="COLUMN", help="Colour by a column; else by cluster.")
    ] = None,
    clusters: Annotated[int, typer.Option(min=2, max=12, help="Clusters of k-means.")] = DEFAULT_CLUSTERS,
    method: Annotated[Method, typer.Option(help="pca, or umap (extra map).")] = "pca",
    max_points: Annotated[
        int, typer.Option(min=3, help="Texts drawn at most; a random sample of a larger corpus.")
    ] = DEFAULT_MAX_POINTS,
    title: Annotated[str | None, typer.Option(help="Heading; the name of the first file where not given.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT.")] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Draw a corpus as a map: one HTML file with a point a text, to be opened in a browser, no network needed.

    Text on hover or tap, search, colours by column or by cluster, the nearest texts in
    all dimensions. Several files over the same texts (two instructions, two K) get a
    switch that moves every text from its one place to the other.

    [bold]Examples[/bold]

      gircse map corpus.parquet --texts corpus.jsonl -o map.html
      gircse map topic.parquet mood.parquet --texts reviews.jsonl --color-by stars -o map.html
      gircse map wiki.parquet --texts wiki.parquet --method umap --max-points 20000 -o map.html
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{output}: OUTPUT must end in .html")
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists: choose another OUTPUT, or replace it with --overwrite")
    with stderr.status("reading"):
        from gircse.map.page import write_page
        from gircse.map.points import read_files, read_labels, sample_rows

        rows, total = sample_rows(embeddings[0], max_points)
        files = read_files(embeddings, rows, total)
        labels = read_labels(files[0], rows, texts, column, color_by)
    with stderr.status("drawing"):
        write_page(
            output,
            title=title or embeddings[0].stem,
            files=files,
            labels=labels,
            total=total,
            method=method,
            clusters=clusters,
            color_by=color_by,
        )
    sample = f" of {total:,}" if total > len(rows) else ""
    shown = "texts" if labels.texts is not None else "ids only: --texts FILE puts the texts on it"
    stderr.print(f"{output}: {len(rows):,}{sample} points, {shown}", markup=False, highlight=False, soft_wrap=True)
    if json_output:
        print(json.dumps({"output": str(output), "points": len(rows), "total": total, "views": len(files)}))
