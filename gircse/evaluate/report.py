"""The report: one HTML file that needs no network, and its plots as files.

Knows results and what people want to read of them; knows nothing of models. The page is report.html.j2.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, cast

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup

from gircse.evaluate.plots import STYLE, draw_all
from gircse.evaluate.results import CONTROL, Result, Results
from gircse.evaluate.statistics import DRAWS, SEED, p_text


def write_report(results: Results, output: Path) -> Path:
    """Write the page and, beside it, a folder of its plots as SVG and PNG.

    Args:
        results: From `read_results`.
        output: The HTML file.

    Returns:
        The folder of plots.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.parent / f"{output.stem}_plots"
    folder.mkdir(exist_ok=True)
    plots: dict[str, Markup] = {}
    with matplotlib.rc_context(cast(Any, STYLE)):
        for name, figure in draw_all(results).items():
            drawn = io.StringIO()
            figure.savefig(drawn, format="svg", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png", dpi=150)
            (folder / f"{name}.svg").write_text(drawn.getvalue(), encoding="utf-8")
            plots[name] = _inline(drawn.getvalue(), name)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters["p_text"] = p_text
    common = results.common_tasks(results.columns)
    html = page.get_template("report.html.j2").render(
        plots=plots,
        curves=[name for name in plots if name.startswith("steps_")],
        columns=results.columns,
        headings=[(model, results.steps(model)) for model in results.models()],
        kinds=_score_table(results),
        means=_means(results),
        common=common,
        on_different_data=results.on_different_data(),
        comparisons=results.comparison_tables(),
        costs=results.costs(),
        facets=_facets(results),
        wordings=_wordings(results),
        wording_lists=_wording_lists(results),
        noise=results.noise(),
        soft_tokens=results.soft_tokens,
        settings=_settings(results),
        draws=DRAWS,
        seed=SEED,
    )
    output.write_text(html, encoding="utf-8")
    return folder


def _inline(svg: str, name: str) -> Markup:
    """An SVG for a page: no XML header, ids that no other plot has, as wide as the page lets it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    return Markup(svg)


def _span(cell: Result | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    return {"score": cell.score, "low_high": cell.interval}


def _score_table(results: Results) -> list[dict[str, Any]]:
    """Tasks by kind, each with its scores in the order of the columns."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for kind, task in results.tasks:
        cells = [results.by_cell.get((task, column)) for column in results.columns]
        best = max((cell.score for cell in cells if cell), default=0.0)
        metric = next(cell.facts["main_score"] for cell in cells if cell)
        row = {"task": task, "metric": metric, "cells": [_span(cell) for cell in cells], "best": best}
        kinds.setdefault(kind, []).append(row)
    return [{"kind": kind, "rows": rows} for kind, rows in kinds.items()]


def _means(results: Results) -> list[dict[str, Any]]:
    """The rows under the scores: means over tasks and over kinds of tasks, where there is more than one."""
    common = results.common_tasks(results.columns)
    rows = []
    for over, mean, count in (
        ("tasks that every column has", results.mean, len(common)),
        ("kinds of these tasks", results.mean_of_kinds, len(results.kinds(common))),
    ):
        if count > 1:
            means = [mean(column, common) for column in results.columns]
            cells = [{"score": score, "low_high": low_high} for score, low_high in means]
            rows.append({"label": f"mean of the {count} {over}", "cells": cells})
    return rows


def _facets(results: Results) -> list[dict[str, Any]]:
    """Scores of each facet under its own instruction and under the others', per column."""
    rows = []
    for cell in results.plain:
        control = next((r for r in results.all if r.task == cell.task + CONTROL and r.column == cell.column), None)
        if control is None:
            continue
        for entry in cell.facts["subsets"]:
            others = [
                e["score"] for e in control.facts["subsets"] if e["subset"].split(" under ")[0] == entry["subset"]
            ]
            own, other = 100 * entry["score"], 100 * float(np.mean(others))
            rows.append(
                {"task": cell.task, "facet": entry["subset"], "column": cell.column, "own": own, "other": other}
            )
    order = {column: place for place, column in enumerate(results.columns)}
    return sorted(rows, key=lambda row: (row["task"], row["facet"], order[row["column"]]))


def _worded(results: Results) -> dict[tuple[str, str], list[Result]]:
    """Task and column to the results under the task's own instruction, first, and under its other wordings."""
    worded = {}
    for (task, column), own in results.by_cell.items():
        others = [
            r
            for r in results.all
            if r.task == task and r.column == column and r.facts["paraphrase"] and not r.facts["perturbation"]
        ]
        if others:
            worded[task, column] = [own, *others]
    return worded


def _wording(result: Result) -> str:
    instructions: dict[str, str] = result.facts["instructions"]
    if len(instructions) == 1:
        return next(iter(instructions.values()))
    return "; ".join(f"{subset}: {instruction}" for subset, instruction in instructions.items())


def _wordings(results: Results) -> list[dict[str, Any]]:
    """Mean, spread and worst case over the wordings of a task's instruction."""
    rows = []
    for (task, column), scored in _worded(results).items():
        scores = [r.score for r in scored]
        rows.append(
            {
                "task": task,
                "column": column,
                "own": scores[0],
                "count": len(scores),
                "mean": float(np.mean(scores)),
                "spread": float(np.std(scores, ddof=1)),
                "worst": min(scores),
                "wording": _wording(min(scored, key=lambda r: r.score)),
            }
        )
    place = {column: at for at, column in enumerate(results.columns)}
    return sorted(rows, key=lambda row: (row["task"], place[row["column"]]))


def _wording_lists(results: Results) -> list[dict[str, Any]]:
    """Of each task every wording with its score in every column, the task's own first: what the means are made of."""
    tasks: dict[str, dict[str, dict[str, float]]] = {}
    for (task, column), scored in _worded(results).items():
        for r in scored:
            tasks.setdefault(task, {}).setdefault(_wording(r), {})[column] = r.score
    lists = []
    for task, wordings in sorted(tasks.items()):
        columns = [column for column in results.columns if any(column in scores for scores in wordings.values())]
        rows = [{"wording": w, "scores": [scores.get(column) for column in columns]} for w, scores in wordings.items()]
        lists.append({"task": task, "columns": columns, "rows": rows})
    return lists


def _settings(results: Results) -> dict[str, Any]:
    models = {r.label: r.facts for r in results.plain}
    tasks: dict[str, dict[str, Any]] = {}
    for r in results.plain:
        tasks[r.task] = {"sample": r.facts["sample"], "instructions": r.facts["instructions"]}
    versions = next(iter(models.values()))["versions"]
    return {"models": models, "tasks": dict(sorted(tasks.items())), "versions": versions}
