"""The answer loss against its formula written out, and the answers that a recipe's sources have."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from gircse.errors import GircseError, UsageError
from gircse.losses import ICRLoss
from gircse.losses.answer import answer_loss, answer_tokens
from gircse.model import GIRCSE
from gircse.train.answers import _keywords
from gircse.train.data import load_training_data
from gircse.train.plan import plan_training
from gircse.train.recipe import load_recipe
from gircse.train.run import train
from tests.test_losses import ANCHORS, POSITIVES, assert_cached_equals_plain, columns
from tests.training_recipe import ROWS, values, write, write_rows

ANSWERS = [" author", " a cat and more", " in italy"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    return tmp_path


def by_hand(model: GIRCSE, num_steps: int, temperature: float) -> float:
    """Mean over rows of the mean over tokens of −log p, from the vocabulary's whole distribution."""
    states = model.encode_states(ANCHORS, num_steps=num_steps)
    vocabulary = model.encoder.decoder.vocabulary
    total = 0.0
    for row, answer in zip(states, ANSWERS, strict=True):
        tokens = model.encoder.tokenizer(answer.strip(), add_special_tokens=False).input_ids[: max(num_steps, 1)]
        with torch.no_grad():
            found = [-math.log(vocabulary.probabilities(h, temperature)[t]) for h, t in zip(row, tokens, strict=False)]
        total += sum(found) / len(tokens)
    return total / len(ANSWERS)


@pytest.mark.parametrize(("num_steps", "temperature"), [(0, 1.0), (1, 1.0), (3, 0.7)])
def test_soft_tokens_are_told_the_answer(model: GIRCSE, num_steps: int, temperature: float) -> None:
    model.encoder.configure(num_steps=num_steps, temperature=temperature)
    batch = columns(model, ANCHORS, POSITIVES)
    loss = ICRLoss(model, answer_weight=0.3)
    with torch.no_grad():
        total = float(loss([*batch, *columns(model, ANSWERS)]))
        plain = float(ICRLoss(model)(batch))
    expected = by_hand(model, num_steps, temperature)
    assert loss.last_answer_loss == pytest.approx(expected, rel=1e-4)
    assert total == pytest.approx(plain + 0.3 * expected, rel=1e-4)


def test_answers_are_read_without_padding_special_tokens_and_spaces(model: GIRCSE) -> None:
    tokenizer = model.encoder.tokenizer
    space, word = tokenizer(" ", add_special_tokens=False).input_ids, tokenizer(" cat", add_special_tokens=False)
    ids = torch.tensor([[tokenizer.all_special_ids[0], *space, *word.input_ids]])
    padded = torch.nn.functional.pad(ids, (2, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (2, 0))
    read = answer_tokens({"input_ids": padded, "attention_mask": mask}, tokenizer)
    assert read == [tokenizer("cat", add_special_tokens=False).input_ids]
    with pytest.raises(UsageError, match="no tokens that could be spelled"):
        answer_tokens({"input_ids": torch.tensor([space]), "attention_mask": torch.ones(1, len(space))}, tokenizer)


def test_an_answer_is_learned(model: GIRCSE) -> None:
    """Gradients reach the states: a few steps down the loss, and the answers have become likely."""
    model.encoder.backbone.requires_grad_(True)
    vocabulary = model.encoder.decoder.vocabulary
    tokens = [model.encoder.tokenizer(answer, add_special_tokens=False).input_ids for answer in ANSWERS]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen = []
    for _ in range(12):
        states = model({**model.preprocess(ANCHORS)})["refinement_states"]
        loss = answer_loss(states, tokens, vocabulary, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.5 * seen[0]


@pytest.mark.parametrize("mini_batch", [1, 4])
def test_cached_gradients_equal_plain_ones_with_answers(model: GIRCSE, mini_batch: int) -> None:
    batch = columns(model, ANCHORS, POSITIVES, ANSWERS)
    assert_cached_equals_plain(model, batch, mini_batch, temperature=0.5, answer_weight=0.8)


def test_an_answer_is_no_column_to_contrast_with(model: GIRCSE) -> None:
    with pytest.raises(UsageError, match="needs an anchor and a positive"):
        ICRLoss(model.eval(), answer_weight=1.0)(columns(model, ANCHORS, ANSWERS))
    with pytest.raises(UsageError, match="answer_weight must be 0 or more"):
        ICRLoss(model, answer_weight=-1.0)


def with_source(folder: Path, backbone: Path, **source: Any) -> Path:
    content = values(folder, backbone)
    content["data"]["sources"][0] |= source
    return write(folder, content)


def test_an_answer_is_the_name_in_the_positive(folder: Path, backbone: Path) -> None:
    recipe = load_recipe(with_source(folder, backbone, answer="pos *"))
    data = load_training_data(recipe)
    assert "answer_to_spell" in data["rows/a"].column_names
    assert "answer_to_spell" not in data["rows/b"].column_names
    rows: list[Any] = data["rows/a"].to_list()
    for row in rows:
        assert row["answer_to_spell"] == " " + row["positive"].rsplit("pos ", 1)[1]
    with pytest.raises(GircseError, match=r"rows/a: the positive 'pos \d+' does not fit answer: 'name: \*'"):
        load_training_data(load_recipe(with_source(folder, backbone, answer="name: *")))


def facet_rows(folder: Path) -> None:
    """Two tasks of translations: their positives are in two languages, their queries in one."""
    rows = [
        {**row, "task": "en-" + row["task"], "query": f"a small number of {row['query']}", "neg": []} for row in ROWS
    ]
    (folder / "data" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def facet(folder: Path, backbone: Path, kind: str, **own: Any) -> Path:
    content = values(folder, backbone)
    source = {
        "file": "pairs", "task": "en-*", "examples": 40, "facet": kind, "negatives": 1, "symmetric": True,
        "instruction": ["by " + kind, "as " + kind], "licence": "x",
    }  # fmt: skip
    content["data"]["sources"] = [source | own]
    return write(folder, content)


def test_an_answer_is_the_name_of_the_form(folder: Path, backbone: Path) -> None:
    facet_rows(folder)
    names = {"queries": "English", "*-a": "French", "en-b": "German"}
    data = load_training_data(load_recipe(facet(folder, backbone, "form", answer=names)))["pairs/en-*/form"]
    rows: list[Any] = data.to_list()
    tasks = {f"pos {i}" for i in range(24)}
    seen = set()
    for row in rows:
        text = row["anchor"].split("\nQuery:")[1]
        assert (row["answer_to_spell"] == " English") == (text not in tasks)
        seen.add(row["answer_to_spell"])
    assert seen == {" English", " French", " German"}
    del names["en-b"]
    with pytest.raises(GircseError, match="answer has no name for the positives of en-b; add one"):
        load_training_data(load_recipe(facet(folder, backbone, "form", answer=names)))


def test_an_answer_is_a_keyword_of_the_query(folder: Path, backbone: Path) -> None:
    facet_rows(folder)
    recipe = load_recipe(facet(folder, backbone, "content", answer="keyword"))
    data = load_training_data(recipe)["pairs/en-*/content"]
    assert set(data["answer_to_spell"]) == {" small", " number", " query"}
    assert load_training_data(recipe)["pairs/en-*/content"][:] == data[:], "the same words every time"


def test_keywords_are_rare_but_not_unique() -> None:
    drawn = _keywords(
        ["common rarer"] * 50 + ["common thing"] * 400 + ["common single", "lonely", "ab"], random.Random(0)
    )
    assert drawn[:50].count("rarer") > 32, "in proportion to 1/√frequency: three of four"
    assert drawn[-3:] == ["common", "lonely", "ab"], (
        "a word of one query only where there is no other, and then the query"
    )


def test_every_row_draws_one_of_several_wordings(folder: Path, backbone: Path) -> None:
    facet_rows(folder)
    data = load_training_data(load_recipe(facet(folder, backbone, "content")))["pairs/en-*/content"]
    rows: list[Any] = data.to_list()
    prompts = [[text.split("\nQuery:")[0] for text in row.values() if isinstance(text, str)] for row in rows]
    assert all(len(set(row)) == 1 for row in prompts), "all texts of a row are read under the same words"
    assert {row[0] for row in prompts} == {"Instruct: by content", "Instruct: as content"}


def test_answers_that_cannot_be_are_refused(folder: Path, backbone: Path) -> None:
    for source, message in (
        ({"answer": "pos"}, r"a pattern of the positives with one \* in it"),
        ({"answer": {"queries": "x"}}, "belong to facet: form"),
        ({"facet": "form", "instruction": "x", "answer": {"*": "x"}}, "that of the queries' form among them"),
        ({"facet": "form", "instruction": "x", "answer": "keyword"}, "answer is a mapping"),
        ({"facet": "content", "instruction": "x", "answer": "a *"}, "answer: keyword"),
        ({"instruction": []}, "instruction"),
    ):
        with pytest.raises(GircseError, match=message):
            load_recipe(with_source(folder, backbone, **source))
    content = values(folder, backbone) | {"loss": {"answer_weight": 0.2}}
    with pytest.raises(GircseError, match="no source has an answer"):
        load_recipe(write(folder, content))


@pytest.mark.parametrize("pooling", ["mean", "prompt_mean"])
def test_an_encoders_vector_learns_the_first_token_of_an_answer(folder: Path, backbone: Path, pooling: str) -> None:
    model = {"num_steps": 0, "pooling": pooling, "max_seq_length": 40}
    if pooling == "prompt_mean":
        model["attention"] = "bidirectional"
    content: dict[str, Any] = values(folder, backbone) | {"model": model, "loss": {"answer_weight": 20.0}}
    content["data"]["sources"][0]["answer"] = "pos *"
    content["training"] |= {"epochs": 4, "learning_rate": 1e-2}
    logs: list[dict[str, float]] = []
    train(load_recipe(write(folder, content)), folder / "run", report=logs.append)
    told = [entry["answer_loss_of/rows/a"] for entry in logs if "answer_loss_of/rows/a" in entry]
    assert told[-1] < 0.9 * told[0]


def test_a_run_with_answers_logs_their_loss_and_its_weight_counts(
    folder: Path, backbone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(name: str, weight: float) -> list[dict[str, float]]:
        content: dict[str, Any] = values(folder, backbone) | {"loss": {"answer_weight": weight}}
        content["data"]["sources"][0]["answer"] = "pos *"
        logs: list[dict[str, float]] = []
        train(load_recipe(write(folder, content)), folder / name, report=logs.append)
        return [entry for entry in logs if "loss" in entry]

    light, heavy = run("light", 0.1), run("heavy", 2.0)
    assert "Column" not in caplog.text, "the collator warned of a column's name"
    answered = [entry for entry in light if "answer_loss_of/rows/a" in entry]
    assert len(answered) == 4, "16 rows in batches of 4, a log entry a step"
    assert not any("answer_loss_of/rows/b" in entry for entry in light)
    assert heavy[-1]["loss"] != light[-1]["loss"]
    plan = plan_training(load_recipe(write(folder, values(folder, backbone))))
    with_answer = plan_training(load_recipe(with_source(folder, backbone, answer="pos *")))
    assert with_answer.flops_per_step == plan.flops_per_step, "answers are not embedded"
