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


_LEFT_OUT = "left out: items do not pair"
_TEXTS = (_LEFT_OUT, "task", "model")  # headings of columns that are not numbers


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

        console = Console(width=None if sys.stdout.isatty() else 200)
        for table in (terminal_table(found), *summary_tables(found)):
            console.print(table)
    for line in found.on_different_data():
        stderr.print(line, markup=False, highlight=False, soft_wrap=True)


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
    means = _mean_rows(results)
    if means:
        table.add_section()
    for label, cells in means:
        table.add_row(f"[bold]{label}[/]", *cells)
    return table


def summary_tables(results: Results) -> list[Table]:
    """Differences of the mean between columns, what noise does to scores, and what a text costs in each column."""
    from rich.table import Table

    tables = []
    for title, (heading, *rows) in _summaries(results).items():
        table = Table(title=title, title_justify="left")
        for at, name in enumerate(heading):
            table.add_column(name, justify="left" if at == 0 or name in _TEXTS else "right")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def markdown_table(results: Results) -> str:
    """The terminal's tables as Markdown."""
    columns = results.columns
    rows = [["task", *columns]]
    for _, task in results.tasks:
        cells = [results.by_cell.get((task, column)) for column in columns]
        rows.append([task, *(_cell(cell.score, cell.interval) if cell else "" for cell in cells)])
    rows += [[label, *cells] for label, cells in _mean_rows(results)]
    parts = [_markdown(rows)]
    for title, table in _summaries(results).items():
        parts += [f"{title}:", _markdown(table)]
    return "\n\n".join(parts)


def _markdown(rows: list[list[str]]) -> str:
    ruled = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def _mean_rows(results: Results) -> list[tuple[str, list[str]]]:
    """Means over the tasks that every column has, and over their kinds, where there is more than one."""
    columns = results.columns
    common = results.common_tasks(columns)
    kinds = len(results.kinds(common))
    rows = []
    if len(common) > 1:
        rows.append((f"mean of {len(common)} tasks", [_cell(*results.mean(column, common)) for column in columns]))
    if kinds > 1:
        rows.append((f"mean of {kinds} kinds", [_cell(*results.mean_of_kinds(column, common)) for column in columns]))
    return rows


def _summaries(results: Results) -> dict[str, list[list[str]]]:
    """Titles to rows, the first of them the headings."""
    found = {
        "Differences of the mean, paired over the same items": _test_rows(results),
        "Noisy texts against the same texts clean": _noise_rows(results),
        "Mean cost of a text": _cost_rows(results),
    }
    return {title: rows for title, rows in found.items() if len(rows) > 1}


def _test_rows(results: Results) -> list[list[str]]:
    from gircse.evaluate.statistics import p_text

    rows = [["compared", "difference", "95 % interval", "p", "tasks"]]
    left_out: list[str] = []
    for first, second in results.compared():
        found = results.mean_comparison(first, second)
        if found is None:
            continue
        low, high = 100 * found.test.low, 100 * found.test.high
        difference, interval = f"{100 * found.test.difference:+.1f}", f"{low:+.1f} to {high:+.1f}"
        rows.append([f"{first} minus {second}", difference, interval, p_text(found.test.p), str(len(found.tasks))])
        left_out.append(", ".join(found.unpaired))
    if any(left_out):
        rows = [[*row, names] for row, names in zip(rows, [_LEFT_OUT, *left_out], strict=True)]
    return rows


def _noise_rows(results: Results) -> list[list[str]]:
    from gircse.evaluate.statistics import p_text

    rows = [["noise", "task", "model", "clean", "noisy", "difference", "95 % interval", "p"]]
    for row in results.noise():
        clean, noisy = row["clean"], row["noisy"]
        shown = [row["heading"], row["task"], row["column"], f"{clean:.1f}", f"{noisy:.1f}", f"{noisy - clean:+.1f}"]
        test = row["test"]
        spread = ["-", "-"] if test is None else [f"{test['low']:+.1f} to {test['high']:+.1f}", p_text(test["p"])]
        rows.append(shown + spread)
    return rows


def _cost_rows(results: Results) -> list[list[str]]:
    rows = [["model", "ms", "GFLOPs"]]
    for row in results.costs():
        shown = (f"{1000 * row['seconds_per_text']:.1f}", f"{row['flops_per_text'] / 1e9:.2f}")
        rows.append([row["column"], *("-" if value == "nan" else value for value in shown)])
    return rows


def _cell(score: float, interval: tuple[float, float] | None) -> str:
    return f"{score:.1f}" if interval is None else f"{score:.1f} ± {(interval[1] - interval[0]) / 2:.1f}"


def _as_json(results: Results) -> dict[str, Any]:
    asked = ("task", "kind", "main_score", "model", "revision", "num_steps", "dtype", "sample")
    keys = (*asked, "perturbation", "paraphrase", "instructions", "cost")
    rows = [
        {key: result.facts[key] for key in keys}
        | {"data": result.data, "column": result.column, "score": result.score, "interval": result.interval}
        for result in results.all
    ]
    return {"results": rows, "comparisons": results.comparison_tables(), "noise": results.noise()}
