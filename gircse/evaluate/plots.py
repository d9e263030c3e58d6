"""The report's plots, as matplotlib figures.

Knows results and how to draw them; knows nothing of HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from gircse.evaluate.results import Result, Results

STYLE = {
    "svg.fonttype": "none",  # text stays text: small files, the page's fonts
    "svg.hashsalt": "gircse",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7ec",
    "axes.edgecolor": "#98a2b3",
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
}
_COLOURS = ("#1d5fd1", "#d4562a", "#2b8a57", "#8a4fc0", "#b8860b", "#5b6775")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_SIZE = (4.6, 3.3)


def draw_all(results: Results) -> dict[str, Figure]:
    """Every plot that the results allow, by file name."""
    figures: dict[str, Figure] = {}
    curved = [model for model in results.models() if len([k for k in results.steps(model) if k is not None]) > 1]
    if curved:
        kinds = dict.fromkeys(kind for kind, _ in results.tasks)
        columns = results.columns
        common = set(results.common_tasks(columns))
        if len(common) > 1:
            title = f"Mean of {len(common)} tasks"
            figures["steps_mean"] = _curve(results, [t for _, t in results.tasks if t in common], title)
        for kind in kinds:
            tasks = [task for task_kind, task in results.tasks if task_kind == kind and task in common]
            if tasks:
                title = f"{kind}: {tasks[0] if len(tasks) == 1 else f'mean of {len(tasks)} tasks'}"
                figures[f"steps_{kind.lower()}"] = _curve(results, tasks, title)
    for name, key, scale, label in (
        ("cost_flops", "flops_per_text", 1e-9, "GFLOPs a text"),
        ("cost_seconds", "seconds_per_text", 1e3, "milliseconds a text"),
    ):
        figure = _quality_against_cost(results, lambda cell, k=key, s=scale: s * (cell.facts["cost"][k] or 0), label)
        if figure is not None:
            figures[name] = figure
    return figures


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_axisbelow(True)
    return figure, axes


def _curve(results: Results, tasks: Sequence[str], title: str) -> Figure:
    """Score against K with the bootstrap interval as a band; models without steps are lines across."""
    figure, axes = _axes(title)
    for at, model in enumerate(results.models()):
        colour, marker = _COLOURS[at % len(_COLOURS)], _MARKERS[at % len(_MARKERS)]
        steps = results.steps(model)
        if steps == [None]:
            mean, band = results.mean(model, tasks)
            axes.axhline(mean, color=colour, linestyle="--", label=model)
            if band:
                axes.axhspan(*band, color=colour, alpha=0.08, linewidth=0)
            continue
        known = [step for step in steps if step is not None]
        means = [results.mean(f"{model} K={step}", tasks) for step in known]
        axes.plot(known, [mean for mean, _ in means], color=colour, marker=marker, markersize=5, label=model)
        bands = [band for _, band in means if band is not None]
        if len(bands) == len(known):
            low, high = np.array(bands).T
            axes.fill_between(known, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("refinement steps K")
    axes.set_ylabel("score × 100")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9, loc="best")
    return figure


def _quality_against_cost(results: Results, cost: Callable[[Result], float], label: str) -> Figure | None:
    """Mean score over the tasks that all columns have, against their mean cost."""
    tasks = results.common_tasks(results.columns)
    if not tasks:
        return None
    figure, axes = _axes(f"Mean of {len(tasks)} tasks" if len(tasks) > 1 else tasks[0])
    drawn = False
    for at, model in enumerate(results.models()):
        columns = [model if step is None else f"{model} K={step}" for step in results.steps(model)]
        costs = [float(np.mean([cost(results.by_cell[task, column]) for task in tasks])) for column in columns]
        if min(costs) <= 0:
            continue
        drawn = True
        means = [results.mean(column, tasks)[0] for column in columns]
        colour, marker = _COLOURS[at % len(_COLOURS)], _MARKERS[at % len(_MARKERS)]
        axes.plot(costs, means, color=colour, marker=marker, markersize=5, label=model)
        steps = results.steps(model)
        for place in {0, len(steps) - 1}:
            if steps[place] is not None:
                shift = (8, -3) if place else (0, -14)
                axes.annotate(
                    f"K={steps[place]}",
                    (costs[place], means[place]),
                    shift,
                    textcoords="offset points",
                    fontsize=9,
                    color=colour,
                    ha="left" if place else "center",
                )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel(label)
    axes.set_ylabel("score × 100")
    axes.legend(frameon=False, fontsize=9, loc="best")
    return figure if drawn else None
