"""Which columns a report compares, how sure it is of them, and what it shows. From results as files: no model runs."""

from __future__ import annotations

import json
import zlib
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from gircse.cli.report import report
from gircse.evaluate.report import write_report
from gircse.evaluate.results import Results, read_results
from gircse.evaluate.statistics import DRAWS, SEED, Items, compare, interval, mean_of, p_text

RNG = np.random.default_rng(0)
ITEMS = {"Pairs": 40, "Questions": 30, "Groups": None}  # None: a clustering, whose scores do not pair
KINDS = {"Pairs": "STS", "Questions": "STS", "Groups": "Clustering"}
FACTS = {
    "main_score": "main",
    "revision": "0",
    "dtype": "float32",
    "device": "cpu",
    "sample": "all",
    "limit": None,
    "seed": 7,
    "perturbation": None,
    "perturbation_is": None,
    "paraphrase": None,
    "versions": {"gircse": "0"},
    "instructions": {"default": "Say what it is"},
    "fingerprint": {},
}

app = typer.Typer()
app.command()(report)


def write_result(folder: Path, model: str, step: int | None, task: str, better: float = 0.0, **facts: Any) -> Path:
    """A details file as `evaluate_model` writes it; items of a task are equally hard for every model."""
    n = ITEMS[task]
    hard = np.random.default_rng(1).normal(0.5, 0.2, n or 10)
    own = zlib.crc32(repr((model, step, task, facts)).encode())  # the same in every process
    noise = np.random.default_rng(own).normal(0, 0.02, n or 10)
    values = hard + noise + better
    items = {"statistic": "mean" if n else "resamples", "values": values.tolist(), "gold": None}
    score = float(values.mean())
    cost = {"texts": 9, "tokens_per_text": 8.0, "seconds_per_text": 0.001 * (1 + (step or 0)), "flops_per_text": 3e9}
    known = {
        **FACTS,
        "task": task,
        "kind": KINDS[task],
        "model": f"local/{model}",
        "num_steps": step,
        "cost": cost,
        "score": score,
        "interval": interval(Items(items["statistic"], values).samples()),
        "subsets": [{"subset": "default", "split": "test", "score": score, "items": items}],
        **facts,
    }
    variant = "-".join(str(facts.get(key, "")) for key in ("perturbation", "paraphrase"))
    path = folder / "details" / model / str(step) / f"{task}-{variant}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known), encoding="utf-8")
    return path


def write_models(folder: Path, tasks: tuple[str, ...] = tuple(ITEMS)) -> Results:
    """`first`, trained with K=2 and scored at 0, 2 and 5; `second` from before own_steps was kept; `plain`."""
    for task in tasks:
        for step, better in ((0, 0.0), (2, 0.05), (5, 0.03)):
            write_result(folder, "first", step, task, better, own_steps=2)
        for step in (1, 3):
            write_result(folder, "second", step, task)
        write_result(folder, "plain", None, task, 0.02, own_steps=None)
    return read_results(folder)


def shown(folder: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, [str(folder), *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_models_are_compared_at_their_own_steps(tmp_path: Path) -> None:
    results = write_models(tmp_path)
    assert [results.own_step(model) for model in ("first", "second", "plain")] == [2, 3, None]
    assert results.compared() == [
        ("first K=2", "first K=0"),
        ("first K=2", "second K=3"),
        ("first K=2", "plain"),
        ("second K=3", "second K=1"),
        ("second K=3", "plain"),
    ]


def test_own_steps_that_were_not_scored_give_way_to_the_largest(tmp_path: Path) -> None:
    for step in (0, 1, 4):
        write_result(tmp_path, "first", step, "Pairs", own_steps=2)
    assert read_results(tmp_path).compared() == [("first K=4", "first K=0")]


def test_an_encoder_only_model_is_not_compared_with_itself(tmp_path: Path) -> None:
    write_result(tmp_path, "first", 0, "Pairs", own_steps=0)
    write_result(tmp_path, "plain", None, "Pairs", own_steps=None)
    assert read_results(tmp_path).compared() == [("first K=0", "plain")]


def test_parallel_subsets_are_no_further_items() -> None:
    one = Items("mean", RNG.normal(size=50)), Items("mean", RNG.normal(size=50))
    alone, twice = compare([one[0]], [one[1]]), compare([one[0]] * 2, [one[1]] * 2)
    assert alone is not None
    assert twice is not None
    assert (twice.low, twice.high, twice.p) == pytest.approx((alone.low, alone.high, alone.p), abs=1e-12)
    assert np.allclose(alone.samples, one[0].samples(DRAWS, SEED) - one[1].samples(DRAWS, SEED))


def test_samples_drawn_once_are_those_of_their_seed() -> None:
    items = Items("mean", RNG.normal(size=20))
    first = items.samples(50, seed=1)
    assert not np.array_equal(first, items.samples(50, seed=2))
    assert len(items.samples(60, seed=1)) == 60
    assert np.array_equal(first, Items("mean", items.values).samples(50, seed=1))


def test_the_mean_over_tasks_is_tested_in_pairs(tmp_path: Path) -> None:
    results = write_models(tmp_path)
    found = results.mean_comparison("first K=2", "first K=0")
    assert found is not None
    assert found.tasks == ["Pairs", "Questions"]
    assert found.unpaired == ["Groups"]
    tests = [results.comparison(task, "first K=2", "first K=0") for task in found.tasks]
    known = [test for test in tests if test is not None]
    assert found.test.difference == pytest.approx(np.mean([test.difference for test in known]))
    assert found.test.n == 70
    low, high = interval((known[0].samples + known[1].samples) / 2)
    assert (found.test.low, found.test.high) == pytest.approx((low, high))
    assert found.test.high - found.test.low < max(test.high - test.low for test in known)
    assert found.test.p < 0.0021
    first, second = (results.mean(column, found.tasks)[1] for column in ("first K=2", "first K=0"))
    assert first is not None
    assert second is not None
    assert first[0] < second[1], "apart, the intervals overlap"


def test_the_mean_of_one_task_is_that_task() -> None:
    test = compare([Items("mean", RNG.normal(size=30))], [Items("mean", RNG.normal(size=30))])
    assert test is not None
    assert mean_of([test]) == test
    assert (p_text(2 / 1001), p_text(0.0499)) == ("< 0.002", "0.050")


def test_columns_without_pairs_have_no_test(tmp_path: Path) -> None:
    results = write_models(tmp_path, ("Groups",))
    assert results.mean_comparison("first K=2", "first K=0") is None
    assert "minus" not in shown(tmp_path)


def test_kinds_count_the_same_whatever_their_tasks(tmp_path: Path) -> None:
    results = write_models(tmp_path)
    tasks = results.common_tasks(results.columns)
    scores = {task: results.by_cell[task, "plain"].score for task in tasks}
    mean, low_high = results.mean_of_kinds("plain", tasks)
    assert mean == pytest.approx((scores["Groups"] + (scores["Pairs"] + scores["Questions"]) / 2) / 2)
    assert low_high is not None
    assert low_high[0] < mean < low_high[1]
    write_report(results, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    terminal, markdown = shown(tmp_path), shown(tmp_path, "--markdown")
    for text in (html, terminal, markdown):
        assert "mean of 3 tasks" in text or "mean of the 3 tasks" in text
        assert "mean of 2 kinds" in text or "mean of the 2 kinds" in text
        assert f"{mean:.1f}" in text
    write_models(tmp_path / "one", ("Pairs", "Questions"))
    assert "kinds" not in shown(tmp_path / "one"), "the same as the mean over tasks"


def test_the_page_tests_the_mean_and_names_what_is_left_out(tmp_path: Path) -> None:
    results = write_models(tmp_path)
    write_report(results, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    tables = html.split("<h2>Comparison</h2>")[1].split("<h3>")[1:]
    headings = [table.split("</h3>")[0] for table in tables]
    assert headings[:2] == ["first K=2 minus first K=0", "first K=2 minus second K=3"]
    rows = [row.split("</td>") for row in tables[0].split("<tr")[2:]]
    assert [row[0].split("<td>")[1] for row in rows] == ["Pairs", "Questions", "mean of the 2 tasks above"]
    found = results.mean_comparison("first K=2", "first K=0")
    assert found is not None
    assert f"{100 * found.test.low:+.1f} to {100 * found.test.high:+.1f}" in rows[-1][2]
    assert "Left out, as their items do not pair: Groups." in tables[0]


def test_terminal_and_markdown_show_differences_and_costs(tmp_path: Path) -> None:
    write_models(tmp_path)
    terminal, markdown = shown(tmp_path), shown(tmp_path, "--markdown")
    test = read_results(tmp_path).mean_comparison("first K=2", "first K=0")
    assert test is not None
    between = f"{100 * test.test.low:+.1f} to {100 * test.test.high:+.1f}"
    row = ["first K=2 minus first K=0", f"{100 * test.test.difference:+.1f}", between, "< 0.002", "2", "Groups"]
    assert "| " + " | ".join(row) + " |" in markdown.splitlines()
    assert "| first K=5 | 6.0 | 3.00 |" in markdown.splitlines()
    lines = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in terminal.splitlines()]
    assert row in lines
    assert ["first K=5", "6.0", "3.00"] in lines


def test_unknown_costs_are_no_numbers(tmp_path: Path) -> None:
    cost = {"texts": 0, "tokens_per_text": 8.0, "seconds_per_text": None, "flops_per_text": None}
    write_result(tmp_path, "plain", None, "Pairs", cost=cost)
    assert "| plain | - | - |" in shown(tmp_path, "--markdown").splitlines()


def test_json_tells_wordings_apart(tmp_path: Path) -> None:
    write_result(tmp_path, "first", 2, "Pairs")
    write_result(tmp_path, "first", 2, "Pairs", paraphrase=1, instructions={"default": "Name it"})
    rows = json.loads(shown(tmp_path, "--json"))["results"]
    assert {(row["paraphrase"], row["instructions"]["default"]) for row in rows} == {
        (None, "Say what it is"),
        (1, "Name it"),
    }


def test_json_has_the_comparisons(tmp_path: Path) -> None:
    for model, offset in (("first", 0.0), ("second", -0.05)):
        for task in ("Pairs", "Questions"):
            write_result(tmp_path, model, 5, task, offset, own_steps=5)
    found = json.loads(shown(tmp_path, "--json"))
    (comparison,) = found["comparisons"]
    assert {row["column"] for row in found["results"]} == {comparison["first"], comparison["second"]}
    assert {row["task"] for row in comparison["rows"]} == {"Pairs", "Questions"}
    results = read_results(tmp_path)
    mean = results.mean_comparison(comparison["first"], comparison["second"])
    assert mean is not None
    assert comparison["mean"]["count"] == 2
    assert comparison["mean"]["difference"] == pytest.approx(100 * mean.test.difference)
    assert comparison["mean"]["low"] <= comparison["mean"]["difference"] <= comparison["mean"]["high"]


def test_wordings_of_facets_name_them(tmp_path: Path) -> None:
    write_result(tmp_path, "first", 2, "Pairs", instructions={"topic": "Of what", "language": "In what"})
    other = {"topic": "About what", "language": "Which tongue"}
    write_result(tmp_path, "first", 2, "Pairs", 0.02, paraphrase=1, instructions=other)
    write_report(read_results(tmp_path), tmp_path / "report.html")
    details = (tmp_path / "report.html").read_text().split("<details>")[1].split("</details>")[0]
    assert "topic: Of what; language: In what" in details
    assert "topic: About what; language: Which tongue" in details


def test_every_wording_is_listed_with_its_score(tmp_path: Path) -> None:
    for step in (0, 2):
        write_result(tmp_path, "first", step, "Pairs", own_steps=2)
        for number, wording in enumerate(("Name it", "Is <b>this</b> it?"), 1):
            write_result(
                tmp_path, "first", step, "Pairs", 0.01 * number, paraphrase=number, instructions={"default": wording}
            )
    results = read_results(tmp_path)
    write_report(results, tmp_path / "report.html")
    details = (tmp_path / "report.html").read_text().split("<details>")[1].split("</details>")[0]
    assert "Say what it is" in details.split("</tr>")[1]
    for wording in ("Name it", "Is &lt;b&gt;this&lt;/b&gt; it?"):
        assert details.count(wording) == 1
    for result in results.all:
        assert f"<td>{result.score:.1f}</td>" in details


def test_noise_is_tested_in_pairs_under_its_seed(tmp_path: Path) -> None:
    for task in ITEMS:
        write_result(tmp_path, "first", 2, task)
        noise = {"perturbation": "typos", "perturbation_is": "letters swapped", "seed": 11}
        write_result(tmp_path, "first", 2, task, -0.1, **noise)
    results = read_results(tmp_path)
    write_report(results, tmp_path / "report.html")
    section = (tmp_path / "report.html").read_text().split("Robustness to noisy input")[1].split("<h2>")[0]
    assert "<h3>typos (seed 11)</h3>" in section
    rows = {row.split("</td>")[0].split("<td>")[1]: row for row in section.split("<tr>")[2:]}
    noisy = next(r for r in results.all if r.task == "Pairs" and r.facts["perturbation"])
    test = noisy.against(results.by_cell["Pairs", "first K=2"])
    assert test is not None
    assert test.high < 0
    between = f"{100 * test.low:+.1f} to {100 * test.high:+.1f}"
    assert f"<td>{between}</td><td>{escape(p_text(test.p))}</td><td>40</td>" in rows["Pairs"]
    assert rows["Groups"].count("<td>–</td>") == 3
    terminal = next(line for line in shown(tmp_path).splitlines() if "typos (seed 11)" in line and "Pairs" in line)
    assert between in terminal
    found = {row["task"]: row for row in json.loads(shown(tmp_path, "--json"))["noise"]}
    assert (found["Pairs"]["seed"], found["Pairs"]["test"]["low"]) == (11, pytest.approx(100 * test.low))
    assert found["Groups"]["test"] is None


def test_items_of_other_data_do_not_pair_and_are_said_to_be_others(tmp_path: Path) -> None:
    for model, data in (("first", "1a2b"), ("second", "1a2b"), ("third", "9f8e")):
        write_result(tmp_path, model, 2, "Pairs", own_steps=2, fingerprint={"data": data})
        write_result(tmp_path, model, 2, "Questions", own_steps=2, fingerprint={"data": "5c"})
    results = read_results(tmp_path)
    assert results.comparison("Pairs", "first K=2", "second K=2") is not None
    assert results.comparison("Pairs", "first K=2", "third K=2") is None
    found = results.mean_comparison("first K=2", "third K=2")
    assert found is not None
    assert (found.tasks, found.unpaired) == (["Questions"], ["Pairs"])
    write_report(results, tmp_path / "report.html")
    said = (
        "Pairs was scored on different data (checksums), evaluate it again to compare: "
        "first K=2, second K=2 on 1a2b; third K=2 on 9f8e"
    )
    assert results.on_different_data() == [said]
    assert said in (tmp_path / "report.html").read_text()
    for arguments in ([], ["--markdown"], ["--json"]):
        result = CliRunner().invoke(app, [str(tmp_path), *arguments])
        assert (result.exit_code, result.stderr) == (0, said + "\n")
    assert {row["data"] for row in json.loads(result.stdout)["results"]} == {"1a2b", "9f8e", "5c"}


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(tmp_path: Path, browser: Any, width: int) -> None:
    for model in ("a-model-whose-name-is-rather-long", "second"):
        for step in (0, 2, 5, 10):
            for task in ITEMS:
                write_result(tmp_path, model, step, task, own_steps=5)
    hostile = "<script>window.hacked = 1</script>" + "looooooong" * 20
    write_result(tmp_path, "second", 5, "Pairs", 0.01, paraphrase=1, instructions={"default": hostile})
    write_report(read_results(tmp_path), tmp_path / "report.html")
    page = browser.new_page(viewport={"width": width, "height": 800})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file:") else problems.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "only tables scroll sideways"
    assert page.locator(".score-table tr:has-text('Pairs') td").count() == 1 + 8
    drawn = page.locator(".plots svg").evaluate_all("all => all.map(one => one.getBoundingClientRect())")
    assert len(drawn) >= 3
    assert all(200 < plot["width"] <= width and plot["height"] > 100 for plot in drawn)
    page.locator("summary", has_text="every wording").click()
    assert page.get_by_text(hostile).first.is_visible()
    assert page.evaluate("window.hacked") is None
    assert problems == [], "nothing is asked of a network"
    page.close()
