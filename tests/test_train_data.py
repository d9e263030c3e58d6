"""Rows are read, drawn and laid out as the recipe says; what is wrong with them is told by file and line."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from gircse.errors import GircseError
from gircse.losses import ICRLoss
from gircse.model import GIRCSE
from gircse.train.data import _others, example_counts, load_training_data, text_columns
from gircse.train.plan import plan_training
from gircse.train.recipe import Recipe, load_recipe
from gircse.train.rows import read_rows
from gircse.train.run import make_losses, make_model, train
from gircse.train.same_texts import KeysBesideTexts
from tests.training_recipe import ROWS, values, write, write_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    return tmp_path


def test_rows_are_drawn_and_laid_out_as_the_recipe_says(folder: Path, backbone: Path) -> None:
    recipe = load_recipe(write(folder, values(folder, backbone)))
    data = load_training_data(recipe)
    assert {name: len(rows) for name, rows in data.items()} == {"rows/a": 16, "rows/b": 8}
    assert text_columns(data["rows/a"]) == ["anchor", "positive", "negative_1"]
    assert text_columns(data["rows/b"]) == ["anchor", "positive", "negative_1", "negative_2"]
    first = data["rows/a"][0]
    assert first["anchor"].startswith("Instruct: do a\nQuery:query ")
    assert first["positive"].startswith("Instruct: do a\nQuery:pos "), "symmetric: both sides carry the instruction"
    assert data["rows/b"][0]["positive"].startswith("pos ")
    assert load_training_data(recipe)["rows/a"][:] == data["rows/a"][:]
    other = load_recipe(write(folder, values(folder, backbone) | {"seed": 4}))
    assert load_training_data(other)["rows/a"][:] != data["rows/a"][:]


def test_other_rows_are_looked_for_among_all() -> None:
    rows = [{"query": f"q{n}" if n < 5 else "same", "pos": [f"p{n}" if n < 5 else "same"]} for n in range(500)]
    for seed in range(20):
        assert _others(rows[-1], 0, rows, 2, random.Random(seed))[0].startswith("q")
    with pytest.raises(GircseError, match="a facet needs 6 different texts"):
        _others(rows[0], 0, rows[:5], 5, random.Random(0))


def test_missing_files_and_too_few_rows(folder: Path, backbone: Path) -> None:
    content = values(folder, backbone)
    content["data"]["sources"][0]["examples"] = 500
    with pytest.raises(GircseError, match="24 rows have 1 negatives, the recipe asks for 500"):
        load_training_data(load_recipe(write(folder, content)))
    content["data"]["sources"][0]["file"] = "nowhere"
    with pytest.raises(GircseError, match="nowhere is not there"):
        load_training_data(load_recipe(write(folder, content)))


def test_rows_with_too_few_negatives_are_told_of(
    folder: Path, backbone: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "neg": row["neg"][: number % 2]} for number, row in enumerate(ROWS[:24])]
    (folder / "data" / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = values(folder, backbone)
    content["data"]["sources"] = [{"file": "few", "licence": "x", "negatives": 1}]
    recipe = load_recipe(write(folder, content))
    assert plan_training(recipe).examples == {"few": 12}
    assert "few: 12 of 24 rows left out: fewer than 1 negative" in caplog.text
    caplog.clear()
    monkeypatch.setenv("LOCAL_RANK", "1")
    plan_training(recipe)
    assert not caplog.text, "one process speaks for all"


def test_the_recipe_for_data_of_ones_own_is_shown_as_it_is() -> None:
    page = Path("docs/training.md").read_text().split("without its comments")[1].split("\n\n")[1]
    shown, recipe = yaml.safe_load(page), yaml.safe_load(Path("recipes/own-data.yaml").read_text())
    assert list(shown.items()) == list(recipe.items())


def test_rows_of_a_small_source_are_drawn_again(folder: Path, backbone: Path) -> None:
    """All of them before any a second time, each time with a negative of its own."""
    content = values(folder, backbone)
    source = content["data"]["sources"][0]
    source |= {"examples": 60, "repeats": 3}
    data = load_training_data(load_recipe(write(folder, content)))["rows/a"]
    counts = Counter(data["anchor"])
    assert len(counts) == 24
    assert set(counts.values()) == {2, 3}
    assert len(set(data["anchor"][:24])) == len(set(data["anchor"][24:48])) == 24
    assert len(set(zip(data["anchor"], data["negative_1"], strict=True))) > 30
    del source["examples"]
    assert len(load_training_data(load_recipe(write(folder, content)))["rows/a"]) == 72, "all that it has"
    source |= {"examples": 60, "repeats": 2}
    with pytest.raises(GircseError, match=r"24 rows have 1 negatives, the recipe asks for 60; .* raise repeats"):
        load_training_data(load_recipe(write(folder, content)))


def test_a_task_that_is_not_in_the_file_is_named(folder: Path, backbone: Path) -> None:
    """With rows of its own number, where the message spoke of negatives, and as a share, where it went unnoticed."""
    content = values(folder, backbone)
    source = content["data"]["sources"][0]
    rows = [{**row, "task": "nli/" + str(row["task"])} for row in ROWS]
    (folder / "data" / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source["file"] = "more"
    for shared in (False, True):
        if shared:
            content["data"]["examples"] = 16
            del source["examples"]
        for task, message in (
            ("nil/a", r"more.jsonl: there is no task nil/a; did you mean nli/a\?"),
            ("xyz", r"more.jsonl: there is no task xyz; it has nli/a, nli/b"),
        ):
            source["task"] = task
            with pytest.raises(GircseError, match=message):
                load_training_data(load_recipe(write(folder, content)))
    source |= {"task": "nli/a", "negatives": 3}
    with pytest.raises(GircseError, match=r"more.jsonl: none of the 24 rows of nli/a has 3 negatives; lower negatives"):
        load_training_data(load_recipe(write(folder, content)))


def test_a_class_of_the_rows_becomes_the_label(folder: Path, backbone: Path) -> None:
    content = values(folder, backbone)
    rows = [{**row, "kind": "even" if index % 2 == 0 else "odd"} for index, row in enumerate(ROWS)]
    (folder / "data" / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = content["data"]["sources"][0]
    source |= {"file": "more", "class_field": "kind"}
    recipe = load_recipe(write(folder, content))
    data = load_training_data(recipe)["more/a"]
    numbers = [int(text.rsplit(" ", 1)[-1]) % 2 for text in data["anchor"]]
    assert data["label"] == numbers, "even is 0, odd is 1"
    assert plan_training(recipe).columns == 4, "a label is no text"
    logs: list[dict[str, float]] = []
    train(recipe, folder / "classes", report=logs.append)
    del source["class_field"]
    plain: list[dict[str, float]] = []
    train(load_recipe(write(folder, content)), folder / "plain", report=plain.append)
    name = "loss_of/more/a"
    first, other = (next(log[name] for log in found if name in log) for found in (logs, plain))
    assert first < other, "fewer negatives"
    source["class_field"] = "colour"
    with pytest.raises(GircseError, match="class_field colour must hold a text or a whole number in every row"):
        load_training_data(load_recipe(write(folder, content)))


def test_the_mixture_shares_out_a_total(folder: Path, backbone: Path) -> None:
    """Whole batches in proportion to size^(1/T); a full source's rest goes to the others."""
    content = values(folder, backbone)
    content["data"]["examples"] = 24
    for source in content["data"]["sources"]:
        del source["examples"]
    recipe = load_recipe(write(folder, content))
    assert example_counts(recipe, [200, 100]) == [16, 8]
    assert example_counts(recipe, [500, 100]) == [20, 4]
    assert example_counts(recipe, [300, 3]) == [24, 0], "less than a batch gives none"
    assert example_counts(recipe, [9, 100]) == [0, 24]
    assert example_counts(recipe, [8, 12]) == [8, 12], "all there is"
    content["data"]["mixture_temperature"] = 1000
    assert example_counts(load_recipe(write(folder, content)), [300, 100]) == [12, 12]
    assert {name: len(rows) for name, rows in load_training_data(recipe).items()} == {"rows/a": 12, "rows/b": 12}
    content["data"]["sources"][0]["examples"] = 8
    content["data"]["sources"][1]["examples"] = 8
    with pytest.raises(GircseError, match="there is none"):
        load_recipe(write(folder, content))
    del content["data"]["examples"], content["data"]["mixture_temperature"], content["data"]["sources"][0]["examples"]
    assert example_counts(load_recipe(write(folder, content)), [203, 100]) == [203, 8], "all, where nobody says"


def test_rows_of_ones_own_need_a_query_and_a_passage(folder: Path, backbone: Path) -> None:
    """Task, instruction and negatives may be missing, and names be those of sentence-transformers."""
    own: list[dict[str, Any]] = [{"query": f"query {i}", "pos": f"pos {i}"} for i in range(5)]
    own += [{"anchor": f"query {i}", "positive": [f"pos {i}"], "negative": f"neg {i}"} for i in range(5, 9)]
    (folder / "data" / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    rows = list(read_rows(folder / "data" / "own.jsonl"))
    assert [(row["query"], row["pos"]) for row in rows] == [(f"query {i}", [f"pos {i}"]) for i in range(9)]
    assert [row["neg"] for row in rows] == [[]] * 5 + [[f"neg {i}"] for i in range(5, 9)]
    content: dict[str, Any] = {**values(folder, backbone), "query_instruction": "find the answer"}
    content["data"]["sources"] = [{"file": "own", "licence": "my own"}]
    data = load_training_data(load_recipe(write(folder, content)))["own"]
    assert sorted(data["anchor"]) == [f"Instruct: find the answer\nQuery:query {i}" for i in range(9)]
    assert sorted(data["positive"]) == [f"pos {i}" for i in range(9)]
    content["data"]["sources"][0]["instruction"] = "find the opposite"
    other = load_training_data(load_recipe(write(folder, content)))["own"]
    assert str(other["anchor"][0]).startswith("Instruct: find the opposite\nQuery:")
    (folder / "data" / "empty.jsonl").touch()
    content["data"]["sources"][0]["file"] = "empty"
    with pytest.raises(GircseError, match=r"empty\.jsonl: it has no rows at all"):
        load_training_data(load_recipe(write(folder, content)))
    content["data"]["sources"][0]["file"] = "own"
    content["training"]["batch_size"], content["data"]["max_seq_length"] = 10, 40
    with pytest.raises(GircseError, match="own: a batch holds one source, and 9 rows make none of 10; lower"):
        plan_training(load_recipe(write(folder, content)))


def test_the_shipped_model_can_be_trained_further(
    folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model stands in for it."""
    content = values(folder, backbone)
    first = train(load_recipe(write(folder, content)), folder / "first")
    monkeypatch.setattr("gircse.model.pretrained_path", lambda: str(folder / "first"))
    again = make_model(load_recipe(write(folder, content | {"start_from": "shipped"})))
    assert again.encode("a text").tolist() == pytest.approx(first.encode("a text").tolist(), rel=1e-4)
    assert any(parameter.requires_grad for parameter in again.parameters())
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    (folder / "elsewhere" / "shipped").mkdir()
    with pytest.raises(GircseError, match="shipped is no saved GIRCSE model"):
        make_model(load_recipe(write(folder, content | {"start_from": "shipped"})))


def test_parquet_rows_equal_json_rows(folder: Path) -> None:
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    assert list(read_rows(path)) == list(read_rows(folder / "data" / "rows.jsonl.zst"))


def test_rows_of_a_hub_data_set_are_drawn_and_renamed(folder: Path, backbone: Path) -> None:
    """A local folder stands in for the hub: `datasets` loads both in the same way."""
    place = folder / "set"
    place.mkdir()
    flag = [
        {"prompt": row["instruction"], "type": row["task"], **{k: row[k] for k in ("query", "pos", "neg")}}
        for row in ROWS
    ]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flag))
    content = values(folder, backbone)
    content["data"]["sources"] = [{"hub": str(place), "task": "b", "examples": 8, "negatives": 1, "licence": "x"}]
    data = load_training_data(load_recipe(write(folder, content)))
    (rows,) = data.values()
    assert len(rows) == 8
    assert all(text.startswith("Instruct: do b\nQuery:query ") for text in rows["anchor"])
    content["data"]["sources"][0]["hub"] = str(folder / "nowhere")
    with pytest.raises(GircseError, match="cannot be loaded"):
        load_training_data(load_recipe(write(folder, content)))
    del content["data"]["sources"][0]["examples"]
    with pytest.raises(GircseError, match="give its number of examples"):
        load_recipe(write(folder, content))
    content["data"]["sources"] = [{"file": "rows", "hub": "x/y", "licence": "x", "examples": 1}]
    with pytest.raises(GircseError, match="either file or hub"):
        load_recipe(write(folder, content))


def test_splits_of_a_hub_data_set_are_tasks_that_keep_to_themselves(
    folder: Path, backbone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in cfli/bge-full-data: no split called train, and one for each of the data sets that it is made of."""
    place = folder / "set" / "data"
    place.mkdir(parents=True)
    for split, count in (("fever", 40), ("nq", 20), ("tiny", 3)):
        rows = [
            {"prompt": f"about {split}", "type": "retrieval", "query": f"{split} {i}", "pos": ["p"], "neg": ["n"]}
            for i in range(count)
        ]
        (place / f"{split}-00000-of-00001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = values(folder, backbone)
    hub = str(folder / "set")
    content["data"]["sources"] = [{"hub": hub, "examples": 63, "negatives": 1, "licence": "x", "by_task": True}]
    recipe = load_recipe(write(folder, content))
    data = load_training_data(recipe)
    assert {name: len(rows) for name, rows in data.items()} == {f"{hub}/fever": 40, f"{hub}/nq": 20}
    assert f"{hub}: left out for want of 4 rows, which make a step: tiny" in caplog.text
    for split in ("fever", "nq"):
        assert all(
            text.startswith(f"Instruct: about {split}\nQuery:{split} ") for text in data[f"{hub}/{split}"]["anchor"]
        )
    losses = make_losses(recipe, make_model(recipe), list(map(str, data)))
    assert losses.keys() == data.keys()
    content["data"]["sources"][0] |= {"examples": 12, "by_task": False}
    (rows,) = load_training_data(load_recipe(write(folder, content))).values()
    numbers = sorted(int(text.split()[-1]) for text in rows["anchor"] if "fever" in text)
    assert 0 < len(numbers) < 12, "drawn from all splits"
    assert numbers[-1] >= len(numbers), "and from all of each"
    content["data"]["sources"][0]["task"] = "nq"
    (rows,) = load_training_data(load_recipe(write(folder, content))).values()
    assert all(":nq " in text for text in rows["anchor"])


def test_tasks_of_a_file_can_keep_to_themselves(folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = values(folder, backbone)
    source = {"file": "rows", "by_task": True, "negatives": 2, "in_batch_negatives": False, "licence": "x"}
    content["data"]["sources"] = [source]

    def sizes() -> dict[str, int]:
        data = load_training_data(load_recipe(write(folder, content)))
        for name, rows in data.items():
            assert all(text.startswith(f"Instruct: do {str(name)[-1]}\n") for text in rows["anchor"])
        return {str(name): len(rows) for name, rows in data.items()}

    assert sizes() == {"rows/a": 24, "rows/b": 24}
    source["examples"] = 30
    assert sizes() == {"rows/a": 16, "rows/b": 12}, "whole batches"
    logs: list[dict[str, float]] = []
    train(load_recipe(write(folder, content)), folder / "out", report=logs.append)
    assert {key for entry in logs for key in entry if key.startswith("loss_of/")} == {
        "loss_of/rows/a",
        "loss_of/rows/b",
    }
    content["training"]["gather_across_devices"] = True
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert sizes() == {"rows/a": 12, "rows/b": 12}, "of all processes"
    monkeypatch.setenv("WORLD_SIZE", "9")
    with pytest.raises(GircseError, match="rows: no task has 36 rows, which make a step"):
        sizes()
    monkeypatch.delenv("WORLD_SIZE")
    content["data"]["sources"] = [source, {"file": "rows", "task": "a", "licence": "x"}]
    with pytest.raises(GircseError, match="the rows of rows/a are in two sources"):
        sizes()
    content["data"]["sources"] = [{**source, "facet": "content", "instruction": "x", "symmetric": True}]
    with pytest.raises(GircseError, match="by_task takes them apart"):
        sizes()


def facet_recipe(folder: Path, backbone: Path, facet: str, negatives: int, in_batch: bool) -> Recipe:
    content = values(folder, backbone)
    own = {"negatives": negatives, "in_batch_negatives": in_batch, "symmetric": True, "licence": "x"}
    content["data"]["sources"] = [
        {"file": "rows", "task": "a", "examples": 24, "instruction": "by " + facet, "facet": facet, **own}
    ]
    return load_recipe(write(folder, content))


def test_a_facet_turns_positives_and_negatives_around(folder: Path, backbone: Path) -> None:
    def numbers(facet: str, negatives: int, in_batch: bool) -> list[list[tuple[str, str]]]:
        data = load_training_data(facet_recipe(folder, backbone, facet, negatives, in_batch))[f"rows/a/{facet}"]
        rows: list[Any] = data.to_list()
        prompt = f"Instruct: by {facet}\nQuery:"
        texts = [[row[name] for name in text_columns(data)] for row in rows]
        assert all(text.startswith(prompt) for own in texts for text in own)
        return [[tuple(text.removeprefix(prompt).split()) for text in own] for own in texts]  # form, row

    for (form, row), positive, *negatives in numbers("content", 2, True):
        assert (positive[0] != form, positive[1]) == (True, row), "the counterpart"
        assert len(set(negatives)) == 2
        assert all(other[0] == form and other[1] != row for other in negatives)
    found = numbers("form", 1, False)
    for (form, row), positive, negative in found:
        assert (positive[0], positive[1] != row) == (form, True), "another row in the same form"
        assert (negative[0] != form, negative[1]) == (True, row), "the counterpart"
    assert {anchor[0] for anchor, *_ in found} == {"query", "pos"}, "either form asks"


@pytest.mark.parametrize("wordings", ["about", ["about", "what of", "subject of"]])
@pytest.mark.parametrize("facet", [None, "content"])
def test_a_text_under_another_wording_is_no_negative(
    folder: Path, backbone: Path, wordings: str | list[str], facet: str | None
) -> None:
    """Every query has three translations, and which are known does not hang on the wording that a row has drawn."""
    rows = [{"task": f"en-{name}", "query": f"en {i}", "pos": [f"{name} {i}"]} for i in range(8) for name in "abc"]
    (folder / "data" / "tongues.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = values(folder, backbone)
    own = {"file": "tongues", "symmetric": True, "licence": "x", "facet": facet, "negatives": 0 if facet is None else 1}
    content["data"]["sources"] = [{**own, "instruction": wordings, "repeats": 2, "examples": 48}]
    (data,) = load_training_data(load_recipe(write(folder, content))).values()
    model = GIRCSE.from_backbone(str(backbone), device="cpu")
    batch = KeysBesideTexts(model.preprocess)(data.to_list())
    columns = text_columns(data)
    texts = [[str(text).split("Query:")[-1] for text in data[name]] for name in columns]
    found = [
        {key.removeprefix(name + "_"): value for key, value in batch.items() if key.startswith(name + "_")}
        for name in columns
    ]
    allowed = ICRLoss(model).allowed_candidates(found)
    candidates = [text for column in texts[1:] for text in column]
    anchors, positives = texts[:2]
    for row, column in ((row, column) for row, column in allowed.nonzero().tolist() if row != column):
        assert candidates[column] not in (anchors[row], positives[row])
        assert column >= len(anchors) or anchors[column] != anchors[row]
    assert allowed.sum() > 48 * 24, "and all others are"


def test_the_loss_of_a_run_is_told_which_texts_are_the_same(
    folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, allowed = list[bool](), ICRLoss.allowed_candidates

    def spy(self: ICRLoss, columns: Any, labels: Any = None) -> Any:
        told.append(all(len(column["text_key"]) == 4 for column in columns))
        return allowed(self, columns, labels)

    monkeypatch.setattr(ICRLoss, "allowed_candidates", spy)
    content = values(folder, backbone)
    content["data"]["sources"] = [
        {"file": "rows", "task": "a", "examples": 8, "licence": "x", "instruction": ["a", "b"]}
    ]
    train(load_recipe(write(folder, content)), folder / "out")
    assert told == [True, True]


def test_forms_of_several_tasks_share_batches(folder: Path, backbone: Path) -> None:
    """The label says in which form each text of a row is, and tasks that match a pattern are drawn together."""
    tongues = ("de", "fr", "it")
    rows = [
        {"task": f"bitext/en-{name}", "instruction": "i", "query": f"en {name}{i}", "pos": [f"{name} {name}{i}"]}
        for i in range(20)
        for name in (*tongues, "no")
    ]
    (folder / "data" / "tongues.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = values(folder, backbone)
    own = {"negatives": 1, "symmetric": True, "licence": "x", "instruction": "by language", "facet": "form"}
    content["data"]["sources"] = [{"file": "tongues", "task": "bitext/en-[a-i]*", "examples": 48, **own}]
    recipe = load_recipe(write(folder, content))
    data = load_training_data(recipe)["tongues/bitext/en-[a-i]*/form"]
    forms = ("en", *tongues)
    found = set()
    for row in data.to_list():
        texts = [str(row[name]).rsplit("Query:", 1)[-1].split() for name in ("anchor", "positive", "negative_1")]
        assert row["label"] == [forms.index(form) for form, _ in texts]
        (form, number), positive, negative = texts
        assert (positive[0], positive[1] != number) == (form, True)
        assert (negative[0] != form, negative[1]) == (True, number)
        found.add(form)
    assert found == set(forms)
    logs: list[dict[str, float]] = []
    train(recipe, folder / "forms", report=logs.append)
    content["data"]["sources"][0]["in_batch_negatives"] = False
    alone: list[dict[str, float]] = []
    train(load_recipe(write(folder, content)), folder / "alone", report=alone.append)
    assert logs[0]["loss"] > alone[0]["loss"], "more negatives"


def test_a_task_named_like_a_pattern_means_itself_too(folder: Path, backbone: Path) -> None:
    rows = [{**row, "task": task} for task in ("en [old]", "en o") for row in ROWS[:12]]
    (folder / "data" / "names.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = values(folder, backbone)
    content["data"]["sources"] = [{"file": "names", "task": "en [old]", "examples": 24, "licence": "x"}]
    recipe = load_recipe(write(folder, content))
    assert len(load_training_data(recipe)["names/en [old]"]) == 24, "by name twelve, by pattern twelve more"
    content["data"]["sources"][0]["task"] = "en *"
    assert len(load_training_data(load_recipe(write(folder, content)))["names/en *"]) == 24


def test_facets_that_cannot_be_are_refused(folder: Path, backbone: Path) -> None:
    with pytest.raises(GircseError, match="one counterpart in the other form"):
        facet_recipe(folder, backbone, "form", 2, False)
    classes = values(folder, backbone)
    classes["data"]["sources"][0] |= {"facet": "form", "symmetric": True, "instruction": "x", "negatives": 1}
    taught = {**classes, "loss": {"teacher": "any"}}
    with pytest.raises(GircseError, match="facet: form is for sources without a teacher"):
        load_recipe(write(folder, taught))
    classes["data"]["sources"][0]["class_field"] = "kind"
    with pytest.raises(GircseError, match="a text's class is its form"):
        load_recipe(write(folder, classes))
    content = values(folder, backbone)
    content["data"]["sources"][0]["facet"] = "content"
    with pytest.raises(GircseError, match="an instruction of its own"):
        load_recipe(write(folder, content))
    recipe = facet_recipe(folder, backbone, "content", 1, True)
    (folder / "data" / "rows.jsonl.zst").unlink()
    rows = [{**ROWS[0], "query": str(i)} for i in range(24)]
    (folder / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(GircseError, match="2 different texts on each side"):
        load_training_data(recipe)
