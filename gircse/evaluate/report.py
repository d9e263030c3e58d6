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
from gircse.evaluate.statistics import DRAWS, SEED


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
    html = page.get_template("report.html.j2").render(
        plots=plots,
        curves=[name for name in plots if name.startswith("steps_")],
        columns=results.columns,
        headings=[(model, results.steps(model)) for model in results.models()],
        kinds=_score_table(results),
        means=_means(results),
        common=results.common_tasks(results.columns),
        comparisons=_comparisons(results),
        costs=_costs(results),
        facets=_facets(results),
        wordings=_wordings(results),
        noise=_noise(results),
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
    common = results.common_tasks(results.columns)
    if len(common) < 2:
        return []
    means = [results.mean(column, common) for column in results.columns]
    return [{"score": mean, "low_high": low_high} for mean, low_high in means]


def _comparisons(results: Results) -> list[dict[str, Any]]:
    """The largest K of each model with steps against its smallest K and against every other model."""
    tables = []
    models = results.models()
    for model in models:
        steps = results.steps(model)
        if steps == [None]:
            continue
        column = f"{model} K={steps[-1]}"
        others = [f"{model} K={steps[0]}"] if len(steps) > 1 else []
        for other in models[models.index(model) + 1 :]:
            last = results.steps(other)[-1]
            others.append(other if last is None else f"{other} K={last}")
        for other in others:
            rows = []
            for _, task in results.tasks:
                found = results.comparison(task, column, other)
                if found is not None:
                    rows.append(
                        {"task": task, **{key: 100 * getattr(found, key) for key in ("difference", "low", "high")}}
                    )
                    rows[-1] |= {"p": found.p, "n": found.n}
            if rows:
                tables.append({"first": column, "second": other, "rows": rows})
    return tables


def _costs(results: Results) -> list[dict[str, Any]]:
    common = results.common_tasks(results.columns)
    rows = []
    for column in results.columns:
        cells = [results.by_cell[task, column] for task in common]
        if not cells:
            continue
        mean = {
            key: float(np.mean([cell.facts["cost"][key] or np.nan for cell in cells]))
            for key in ("tokens_per_text", "seconds_per_text", "flops_per_text")
        }
        rows.append({"column": column, "score": results.mean(column, common)[0], **mean})
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


def _wordings(results: Results) -> list[dict[str, Any]]:
    """Mean, spread and worst case over the wordings of a task's instruction."""
    rows = []
    for (task, column), own in results.by_cell.items():
        others = [
            r
            for r in results.all
            if r.task == task and r.column == column and r.facts["paraphrase"] and not r.facts["perturbation"]
        ]
        if not others:
            continue
        scores = [own.score, *(r.score for r in others)]
        worst = min([own, *others], key=lambda r: r.score)
        rows.append(
            {
                "task": task,
                "column": column,
                "own": own.score,
                "count": len(scores),
                "mean": float(np.mean(scores)),
                "spread": float(np.std(scores, ddof=1)),
                "worst": worst.score,
                "wording": next(iter(worst.facts["instructions"].values())),
            }
        )
    place = {column: at for at, column in enumerate(results.columns)}
    return sorted(rows, key=lambda row: (row["task"], place[row["column"]]))


def _noise(results: Results) -> list[dict[str, Any]]:
    """Scores of perturbed texts beside those of clean ones."""
    rows = []
    for cell in results.all:
        clean = results.by_cell.get((cell.task, cell.column))
        if cell.facts["perturbation"] and clean is not None:
            facts = {"task": cell.task, "kind": cell.facts["perturbation"], "is": cell.facts["perturbation_is"]}
            rows.append({**facts, "column": cell.column, "clean": clean.score, "noisy": cell.score})
    place = {column: at for at, column in enumerate(results.columns)}
    return sorted(rows, key=lambda row: (row["kind"], row["task"], place[row["column"]]))


def _settings(results: Results) -> dict[str, Any]:
    models = {r.label: r.facts for r in results.plain}
    tasks: dict[str, dict[str, Any]] = {}
    for r in results.plain:
        tasks[r.task] = {"sample": r.facts["sample"], "instructions": r.facts["instructions"]}
    versions = next(iter(models.values()))["versions"]
    return {"models": models, "tasks": dict(sorted(tasks.items())), "versions": versions}
