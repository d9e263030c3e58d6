"""`gircse map`: what is read, what is laid out, and a page that shows it in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from gircse.cli.map import map as map_verb
from gircse.embed.job import embed_corpus
from gircse.embed.reader import CorpusReader
from gircse.errors import GircseError, InputDataError, MissingExtraError, UsageError
from gircse.map.page import color_column
from gircse.map.points import read_embeddings, read_labels, sample_rows
from gircse.map.projection import align, nearest, project
from tests.hashing_model import HashingModel, settings

HOSTILE = "</script><script>window.hacked = 1</script><!-- & \u2028 'quoted'"


def run(*arguments: object) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("map")(map_verb)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def page_data(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 60 documents and its embeddings under two instructions."""
    folder = tmp_path_factory.mktemp("map")
    documents = [
        {"id": f"d{n}", "text": HOSTILE if n == 7 else f"text {n} about {'cats' if n % 3 else 'dogs'}", "stars": n % 3}
        for n in range(60)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps(document) for document in documents), encoding="utf-8")
    for name, instruction, steps in (("topic", "Find the topic", 2), ("mood", "Find the mood", 4)):
        made = settings(instruction=instruction, prompt=instruction, num_steps=steps)
        reader = CorpusReader(str(folder / "corpus.jsonl"), id_column="id")
        embed_corpus(HashingModel(), reader, folder / f"{name}.parquet", made)
    return folder


def test_two_instructions_make_a_page_with_texts_and_colours(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "map.html"
    files = folder / "topic.parquet", folder / "mood.parquet"
    result = run(*files, "--texts", folder / "corpus.jsonl", "--color-by", "stars", "-o", page, "--json")
    assert json.loads(result.stdout) == {"output": str(page), "points": 60, "total": 60, "views": 2}
    data = page_data(page)
    assert data["ids"] == [f"d{n}" for n in range(60)]
    assert data["texts"][7] == HOSTILE
    assert [view["name"] for view in data["views"]] == ["Find the topic", "Find the mood"]
    assert np.shape(data["views"][1]["points"]) == (60, 2)
    assert data["views"][0]["points"] != data["views"][1]["points"]
    column = data["column"]
    assert [column["categories"][k] for k in column["values"]] == [str(n % 3) for n in range(60)]
    html = page.read_text("utf-8")
    assert "<script>window.hacked" not in html
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)|url\(|@import|fetch\(", html), (
        "nothing is loaded from elsewhere"
    )
    with pytest.raises(UsageError, match="--overwrite"):
        run(*files, "-o", page)


def test_options_change_the_page(folder: Path, tmp_path: Path) -> None:
    plain, other = tmp_path / "plain.html", tmp_path / "other.html"
    run(folder / "topic.parquet", "-o", plain)
    run(folder / "topic.parquet", "-o", other, "--clusters", 3, "--max-points", 20, "--title", "A <b>title</b>")
    assert page_data(plain)["texts"] is None
    assert len(page_data(plain)["views"][0]["clusters"]["categories"]) == 8
    assert len(page_data(other)["views"][0]["clusters"]["categories"]) == 3
    assert len(page_data(other)["ids"]) == 20
    assert "<h1>A &lt;b&gt;title&lt;/b&gt;</h1>" in other.read_text("utf-8")
    run(folder / "topic.parquet", "-o", plain, "--overwrite")
    again = plain.read_bytes()
    run(folder / "topic.parquet", "-o", plain, "--overwrite")
    assert plain.read_bytes() == again, "the same input gives the same page"


def test_umap_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MissingExtraError, match=r"gircse\[map\]"):
        project(np.eye(5, dtype=np.float32), "umap")


@pytest.mark.slow
def test_umap_keeps_groups_apart() -> None:
    pytest.importorskip("umap")
    vectors, groups = _groups(40)
    points, note = project(vectors, "umap")
    assert "UMAP" in note
    assert _separation(points, groups) > 2


def test_rows_of_other_texts_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"id": "d0", "text": "one"}\n', encoding="utf-8")
    with pytest.raises(InputDataError, match="no text with the id 'd1'"):
        run(folder / "topic.parquet", "--texts", tmp_path / "short.jsonl", "-o", tmp_path / "a.html")
    with pytest.raises(UsageError, match=r"'nothing'.*stars"):
        run(
            folder / "topic.parquet",
            "--texts",
            folder / "corpus.jsonl",
            "--color-by",
            "nothing",
            "-o",
            tmp_path / "a.html",
        )
    with pytest.raises(InputDataError, match="no such file"):
        run(folder / "none.parquet", "-o", tmp_path / "a.html")
    with pytest.raises(InputDataError, match="Parquet"):
        run(folder / "corpus.jsonl", "-o", tmp_path / "a.html")
    lines = [f"line {n}" for n in range(20)]
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("\n".join([name, *lines]), encoding="utf-8")
        embed_corpus(
            HashingModel(), CorpusReader(str(tmp_path / f"{name}.txt")), tmp_path / f"{name}.parquet", settings()
        )
    with pytest.raises(InputDataError, match="not the texts"):
        run(tmp_path / "one.parquet", "--texts", tmp_path / "two.txt", "-o", tmp_path / "a.html")
    with pytest.raises(InputDataError, match="other texts"):
        run(tmp_path / "one.parquet", tmp_path / "two.parquet", "-o", tmp_path / "a.html")
    with pytest.raises(GircseError, match="html"):
        run(folder / "topic.parquet", "-o", tmp_path / "a.pdf")
    assert not (tmp_path / "a.html").exists()


@pytest.mark.parametrize("name", ["rows.ndjson", "rows.txt", "rows"])
def test_a_corpus_is_read_as_it_was_embedded(name: str, folder: Path, tmp_path: Path) -> None:
    corpus, embedded = tmp_path / name, tmp_path / "x.parquet"
    shutil.copy(folder / "corpus.jsonl", corpus)
    embed_corpus(HashingModel(), CorpusReader(str(corpus), "jsonl", id_column="id"), embedded, settings())
    run(embedded, "--texts", corpus, "--color-by", "stars", "-o", tmp_path / "map.html")
    assert page_data(tmp_path / "map.html")["texts"][7] == HOSTILE
    table = tmp_path / "table.parquet"  # the same rows in a kind of file that its name tells
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in corpus.read_text("utf-8").splitlines()]), table)
    run(embedded, "--texts", table, "-o", tmp_path / "map.html", "--overwrite")
    assert page_data(tmp_path / "map.html")["texts"][7] == HOSTILE


@pytest.mark.parametrize("precision", ["float16", "int8", "binary"])
def test_every_precision_is_read(precision: Any, folder: Path, tmp_path: Path) -> None:
    reader = CorpusReader(str(folder / "corpus.jsonl"), id_column="id")
    embed_corpus(
        HashingModel(),
        reader,
        tmp_path / "x.parquet",
        settings(precision=precision, instruction="Find the topic", prompt="Find the topic"),
    )
    rows, _ = sample_rows(tmp_path / "x.parquet", 10)
    exact, stored = (read_embeddings(path, rows) for path in (folder / "topic.parquet", tmp_path / "x.parquet"))
    assert stored.ids == exact.ids
    cosines = (exact.vectors * stored.vectors).sum(axis=1)
    assert cosines.min() > (0.5 if precision == "binary" else 0.999)


def test_texts_may_lie_in_the_embedding_file(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    table = pa.table(
        {"id": range(9), "embedding": vectors.tolist(), "text": [f"t{n}" for n in range(9)], "kind": list("abcabcabc")}
    )
    pq.write_table(table, tmp_path / "x.parquet")
    rows = np.array([1, 4])
    labels = read_labels(read_embeddings(tmp_path / "x.parquet", rows), rows, None, None, "kind")
    assert (labels.texts, labels.values) == (["t1", "t4"], ["b", "b"])


def _groups(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Three groups of vectors of length 1, and which is whose."""
    generator = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2], size)
    vectors = np.eye(16)[groups] + 0.05 * generator.standard_normal((3 * size, 16))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), groups


def _separation(points: np.ndarray, groups: np.ndarray) -> float:
    centres = np.stack([points[groups == g].mean(axis=0) for g in range(3)])
    within = max(np.linalg.norm(points[groups == g] - centres[g], axis=1).mean() for g in range(3))
    return min(float(np.linalg.norm(centres[a] - centres[b])) for a, b in ((0, 1), (0, 2), (1, 2))) / within


def test_projection_and_neighbours_find_the_groups() -> None:
    vectors, groups = _groups(30)
    points, note = project(vectors, "pca")
    assert _separation(points, groups) > 5
    assert float(re.search(r"(\d+)%", note)[1]) > 80  # type: ignore[index]
    near = nearest(vectors, 4)
    assert (groups[near] == groups[:, None]).all()
    similarities = vectors @ vectors.T - 2 * np.eye(len(vectors))
    np.testing.assert_array_equal(near, np.argsort(-similarities, axis=1)[:, :4])


def test_a_turned_layout_is_turned_back() -> None:
    points = project(np.random.default_rng(1).standard_normal((50, 8)).astype(np.float32), "pca")[0]
    turn = np.array([[0.6, -0.8], [-0.8, -0.6]])  # a rotation and a reflection
    np.testing.assert_allclose(align(points @ turn, points), points, atol=1e-5)


def test_many_values_become_few_categories() -> None:
    words = color_column("word", [f"w{n}" for n in range(30)] + ["often"] * 5 + [None])
    assert len(words.categories) == 12
    assert words.categories[0] == "often"
    assert words.categories[words.values[29]] == "(others)"
    numbers = color_column("number", [*range(100), None])
    assert numbers.ordered
    assert [numbers.categories[numbers.values[n]] for n in (0, 99, 100)] == ["0 to 19.8", "79.2 to 99", "(none)"]


@pytest.mark.slow
def test_the_page_in_a_browser(folder: Path, tmp_path: Path, browser: Any) -> None:
    page_file = tmp_path / "map.html"
    files = folder / "topic.parquet", folder / "mood.parquet"
    run(*files, "--texts", folder / "corpus.jsonl", "--color-by", "stars", "-o", page_file)
    page = browser.new_page(viewport={"width": 390, "height": 800}, reduced_motion="reduce")
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(page_file.as_uri())
    page.focus("#map")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
    assert page.locator("#chosen p").first.text_content().startswith("text")
    assert page.locator("#near li").count() == 5
    before = page.evaluate("now.map(p => p.join())")
    page.locator("#views label").nth(1).click()
    page.wait_for_function("document.querySelector('#near li') && view === 1")
    assert page.evaluate("now.map(p => p.join())") != before
    page.fill("#query", "window.hacked")
    assert "1 found" in page.text_content("#found")
    page.evaluate("choose(7, true)")
    assert page.locator("#chosen p").first.text_content() == HOSTILE
    page.locator("#legend button").first.click()
    assert page.locator("#legend button[aria-pressed=false]").count() == 1
    page.select_option("#color", "cluster")
    assert "cluster" in page.text_content("#legend-name")
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out on a phone"
    assert problems == []
