"""From a file to the loss: what a row knows as an answer, or says itself, is none of its negatives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gircse.errors import GircseError, UsageError
from gircse.losses import ICRLoss
from gircse.model import GIRCSE
from gircse.train.data import load_training_data, text_columns
from gircse.train.mine import mine_file
from gircse.train.recipe import load_recipe
from gircse.train.run import train
from gircse.train.same_texts import KeysBesideTexts
from tests.training_recipe import values, write


def candidates_of(tmp_path: Path, backbone: Path, rows: list[dict[str, Any]], **source: Any) -> dict[str, set[str]]:
    """The candidates in the softmax of every anchor, all rows in one batch."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = values(tmp_path, backbone)
    content["data"]["sources"] = [{"file": "rows", "instruction": "find", "licence": "x", **source}]
    content["training"]["batch_size"] = len(rows)
    (data,) = load_training_data(load_recipe(write(tmp_path, content))).values()
    model = GIRCSE.from_backbone(str(backbone), device="cpu")
    batch = KeysBesideTexts(model.preprocess)(data.to_list())
    names = text_columns(data)
    features = [
        {key.removeprefix(name + "_"): value for key, value in batch.items() if key.startswith(name + "_")}
        for name in names
    ]
    allowed = ICRLoss(model).allowed_candidates(features)
    texts = [[str(text).split("Query:")[-1] for text in data[name]] for name in names]
    candidates = [text for column in texts[1:] for text in column]
    return {
        anchor: {text for text, kept in zip(candidates, row, strict=True) if kept}
        for anchor, row in zip(texts[0], allowed.tolist(), strict=True)
    }


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_query_is_no_negative_of_itself(tmp_path: Path, backbone: Path, symmetric: bool) -> None:
    pairs = [("reset it?", "lost it?"), ("lost it?", "reset it?"), ("cat", "dog"), ("cow", "cat")]
    rows = [{"query": query, "pos": [text]} for query, text in pairs]
    found = candidates_of(tmp_path, backbone, rows, symmetric=symmetric)
    assert found == {
        "reset it?": {"lost it?", "dog", "cat"},
        "lost it?": {"reset it?", "dog", "cat"},
        "cat": {"lost it?", "reset it?", "dog"},
        "cow": {"lost it?", "reset it?", "dog", "cat"},
    }


@pytest.mark.parametrize("count", [4, 12])  # compared all at once, and row by row
def test_an_answer_that_was_not_drawn_is_no_negative(tmp_path: Path, backbone: Path, count: int) -> None:
    answers = [f"answer {n}" for n in range(count)]
    rows = [{"query": "all", "pos": answers, "neg": ["no", answers[0]]}]
    rows += [{"query": f"q{n}", "pos": [answers[n]], "neg": [f"not {n}", f"nor {n}"]} for n in range(count)]
    found = candidates_of(tmp_path, backbone, rows, negatives=2)
    assert len(found["all"] & set(answers)) == 1, "the drawn one"
    assert {"no", "not 0", "nor 3"} <= found["all"]
    assert set(answers) - found["q0"] <= {"answer 0"} | (set(answers) - found["q1"] - {"answer 1"})
    assert all(f"answer {n}" in found[f"q{n}"] for n in range(count))


def test_keys_reach_the_loss_of_a_run(tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    rows = [{"query": f"q {n}", "pos": ["p", f"p {n}"], "neg": [f"n {n}"]} for n in range(8)]
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = values(tmp_path, backbone)
    content["data"]["sources"] = [{"file": "rows", "instruction": "find", "negatives": 1, "licence": "x"}]
    seen: list[list[tuple[int, ...]]] = []
    own = ICRLoss.allowed_candidates

    def spy(self: ICRLoss, columns: Any, labels: Any = None) -> torch.Tensor:
        shapes = [tuple(columns[0]["known_keys"].shape), *(tuple(column["plain_key"].shape) for column in columns)]
        seen.append(shapes)
        return own(self, columns, labels)

    monkeypatch.setattr(ICRLoss, "allowed_candidates", spy)
    train(load_recipe(write(tmp_path, content)), tmp_path / "out")
    assert seen == [[(4, 3), (4,), (4,), (4,)]] * 2


def test_mining_leaves_a_query_s_own_text_out(model: GIRCSE, tmp_path: Path) -> None:
    """Ten paraphrases of one another: each is a passage of another row."""
    rows = [{"task": "t", "query": f"how {n}", "pos": [f"how {(n + 1) % 10}"], "instruction": "x"} for n in range(10)]
    source, output = tmp_path / "rows.jsonl", tmp_path / "mined.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine_file(source, output, model, negatives=3, margin=-1.0)
    mined = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(len(row["neg"]) == 3 for row in mined)
    assert not any(row["query"] in row["neg"] for row in mined)
    with pytest.raises(UsageError, match=r"no task tt; did you mean t\?"):
        mine_file(source, tmp_path / "b.jsonl", model, symmetric_tasks=frozenset({"tt"}))


def test_a_file_in_two_formats_is_refused(tmp_path: Path, backbone: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("rows.jsonl", "rows.parquet"):
        (tmp_path / "data" / name).write_text("")
    with pytest.raises(GircseError, match=r"rows\.jsonl and rows\.parquet are both there"):
        load_training_data(load_recipe(write(tmp_path, values(tmp_path, backbone))))
