"""`gircse report`: results as one HTML file with its plots, and as a table in the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gircse.cli.common import DebugOption, JsonOption, stderr
from gircse.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from gircse.evaluate.results import Results


def report(
    results: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that gircse evaluate -o wrote.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="One self-contained HTML file; the plots as PNG and SVG beside it."
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown, for a model card.")
    ] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show results: a table in the terminal, and with -o an HTML report with its plots.

    [bold]Examples[/bold]

      gircse report results
      gircse report results -o report.html       report.html and report_plots/*.png, *.svg
      gircse report results --markdown
      gircse report results --json
    """
    if markdown and json_output:
        raise UsageError("choose one of --markdown and --json")
    from gircse.evaluate.results import read_results

    found = read_results(results)
    if output is not None:
        with stderr.status("drawing"):
            from gircse.evaluate.report import write_report

            plots = write_report(found, output)
        stderr.print(f"{output}, plots in {plots}", highlight=False, soft_wrap=True)
    if json_output:
        print(json.dumps(_as_json(found), ensure_ascii=False))
    elif markdown:
        print(markdown_table(found))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 200).print(terminal_table(found))


def terminal_table(results: Results) -> Table:
    """Tasks down, models and steps across, and means over the tasks that every column has."""
    from rich.table import Table

    columns = results.columns
    table = Table(title="Main scores × 100, ± half the 95 % interval", title_justify="left")
    table.add_column("task")
    for column in columns:
        table.add_column(column, justify="right")
    for kind in dict.fromkeys(kind for kind, _ in results.tasks):
        table.add_section()
        table.add_row(f"[bold]{kind}[/]")
        for task in (name for task_kind, name in results.tasks if task_kind == kind):
            cells = [results.by_cell.get((task, column)) for column in columns]
            table.add_row(task, *(_cell(cell.score, cell.interval) if cell else "-" for cell in cells))
    common = results.common_tasks(columns)
    if len(common) > 1:
        table.add_section()
        means = [_cell(*results.mean(column, common)) for column in columns]
        table.add_row(f"[bold]mean of {len(common)} tasks above[/]", *means)
    return table


def markdown_table(results: Results) -> str:
    """The terminal's table as Markdown, with the mean over kinds of tasks beside the mean over tasks."""
    columns = results.columns
    rows = [["task", *columns], ["---"] * (len(columns) + 1)]
    for _, task in results.tasks:
        cells = [results.by_cell.get((task, column)) for column in columns]
        rows.append([task, *(_cell(cell.score, cell.interval) if cell else "" for cell in cells)])
    common = [(kind, task) for kind, task in results.tasks if task in results.common_tasks(columns)]
    if len(common) > 1:
        names = [task for _, task in common]
        kinds = {kind: [task for other, task in common if other == kind] for kind, _ in common}
        rows.append([f"mean of {len(names)} tasks", *(_cell(*results.mean(column, names)) for column in columns)])
        of_kinds = [[results.mean(column, tasks)[0] for tasks in kinds.values()] for column in columns]
        rows.append([f"mean of {len(kinds)} kinds", *(_cell(sum(means) / len(means), None) for means in of_kinds)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(score: float, interval: tuple[float, float] | None) -> str:
    return f"{score:.1f}" if interval is None else f"{score:.1f} ± {(interval[1] - interval[0]) / 2:.1f}"


def _as_json(results: Results) -> list[dict[str, Any]]:
    keys = ("task", "kind", "main_score", "model", "revision", "num_steps", "dtype", "sample", "perturbation", "cost")
    return [
        {key: result.facts[key] for key in keys} | {"score": result.score, "interval": result.interval}
        for result in results.all
    ]
