"""`gircse index`, `search`, `rerank` and `ask`: options reach the work, results go to standard output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gircse.cli.search import open_index
from gircse.errors import GircseError, InputDataError, UsageError
from gircse.search import answer as work
from gircse.search.manifest import Manifest
from gircse.search.table import ChunkTable
from tests.search_model import WordModel

pytest.importorskip("lancedb")
VERBS = ("index", "search", "rerank", "ask")
Invoke = Callable[..., Any]

ROWS = [
    {"key": "ants", "body": "ants dig nests in the ground", "kind": "insect"},
    {"key": "bees", "body": "bees build hives and make honey", "kind": "insect"},
    {"key": "cats", "body": "cats sleep all day", "kind": "mammal"},
]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The names of the models that were loaded."""
    loaded: list[Any] = []

    def load(name: str | None, **options: Any) -> WordModel:
        loaded.append(name)
        return WordModel()

    for verb in VERBS:
        module = import_module(f"gircse.cli.{verb}")
        if hasattr(module, "load_model"):
            monkeypatch.setattr(module, "load_model", load)
    return loaded


@pytest.fixture
def invoke(models: list[Any]) -> Invoke:
    app = typer.Typer()
    for verb in VERBS:
        app.command(verb)(getattr(import_module(f"gircse.cli.{verb}"), verb))

    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(app, list(arguments))
        if isinstance(result.exception, GircseError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout) if "--json" in arguments else result.stdout

    return run


@pytest.fixture
def folder(tmp_path: Path, invoke: Invoke) -> str:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    options = ("--column", "body", "--id-column", "key", "--chunk-tokens", "8")
    summary = invoke("index", str(corpus), "-o", str(tmp_path / "an.index"), *options, "--num-steps", "1", "--json")
    assert (summary["documents"], summary["added"]) == (3, 3)
    return str(tmp_path / "an.index")


def test_options_reach_the_index_and_are_remembered(folder: str, invoke: Invoke, tmp_path: Path) -> None:
    made = Manifest.read(Path(folder)).settings
    assert (made.num_steps, made.chunk_tokens, made.chunk_overlap, made.column, made.id_column) == (
        1, 8, 1, "body", "key",
    )  # fmt: skip
    corpus = str(tmp_path / "corpus.jsonl")
    assert invoke("index", corpus, "-o", folder, "--json")["unchanged"] == 3
    for option, value in (("--num-steps", "2"), ("--chunk-overlap", "0"), ("--instruction", "topic")):
        with pytest.raises(UsageError, match="made with other settings"):
            invoke("index", corpus, "-o", folder, option, value)
    options = ("--overwrite", "--column", "body", "--chunk-tokens", "9", "--chunk-overlap", "0")
    assert invoke("index", corpus, "-o", folder, *options, "--instruction", "topic", "--json")["added"] == 3
    made = Manifest.read(Path(folder)).settings
    assert (made.document_prompt, made.chunk_overlap, made.id_column, made.num_steps) == ("topic : ", 0, None, 2)
    with pytest.raises(UsageError, match="exceed the model's longest input of 40"):
        invoke("index", corpus, "-o", folder, "--overwrite", "--column", "body", "--chunk-tokens", "41")


def test_a_wrong_call_of_index_loads_nothing_and_writes_nothing(
    tmp_path: Path, invoke: Invoke, models: list[Any]
) -> None:
    corpus, folder = tmp_path / "corpus.txt", tmp_path / "an.index"
    corpus.write_text("ants dig\nbees fly\n", encoding="utf-8")
    for options, said in (
        (("--chunk-tokens", "40", "--chunk-overlap", "25"), "chunks of 40 tokens cannot overlap by 25"),
        (("--chunk-tokens", "8", "--text-language", "Klingon"), "no language 'Klingon'; choose from Arabic, Danish"),
    ):
        with pytest.raises(UsageError, match=said):
            invoke("index", str(corpus), "-o", str(folder), *options)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("")
    with pytest.raises(UsageError, match="holds other things than an index"):
        invoke("index", str(corpus), "-o", str(tmp_path / "notes"))
    assert (models, folder.exists()) == ([], False)
    small = ("--chunk-tokens", "8")
    assert invoke("index", str(corpus), "-o", str(folder), *small, "--text-language", "german", "--json")["added"] == 2
    assert Manifest.read(folder).settings.text_language == "German"


def test_ctrl_c_says_what_is_kept(tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, folder = tmp_path / "corpus.txt", tmp_path / "an.index"
    corpus.write_text("ants dig\nbees fly\n", encoding="utf-8")
    app = typer.Typer()
    module = import_module("gircse.cli.index")
    app.command()(module.index)

    def stopped(*options: str) -> str:
        result = CliRunner().invoke(app, [str(corpus), "-o", str(folder), "--chunk-tokens", "8", *options])
        assert result.exit_code == 130
        return result.stderr

    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_model", stop)
        assert stopped() == "stopped; nothing was done yet\n"
    with monkeypatch.context() as patch:
        patch.setattr(ChunkTable, "build_indices", stop)
        kept = f"stopped; what is done is kept in {folder}: the same command"
        assert stopped() == f"{kept} goes on\n"
        assert stopped("--overwrite") == f"{kept} without --overwrite goes on\n"
    assert invoke("index", str(corpus), "-o", str(folder), "--chunk-tokens", "8", "--json")["unchanged"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_model", stop)
        assert stopped() == "stopped; nothing was done yet\n", "it was whole already"


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN"])
def test_what_is_printed_is_json(tmp_path: Path, invoke: Invoke, number: str) -> None:
    corpus, folder = tmp_path / "corpus.jsonl", str(tmp_path / "an.index")
    corpus.write_text(
        f'{{"text": "ants dig", "n": {number}, "m": 1.5}}\n{{"text": "bees", "n": 0.5}}', encoding="utf-8"
    )
    invoke("index", str(corpus), "-o", folder, "--chunk-tokens", "8")
    assert invoke("search", folder, "ants", "--top", "1", "--json")["hits"][0]["metadata"] == {"m": 1.5}
    # As an index may hold it that was made while infinite numbers counted as numbers.
    ChunkTable.open(Path(folder))._table.update(where="m = 1.5", values={"n": float(number)})
    assert invoke("search", folder, "ants", "--top", "1", "--json")["hits"][0]["metadata"] == {"m": 1.5}


def test_bad_rows_and_approximate_search(tmp_path: Path, invoke: Invoke) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"word{n} and word{n % 9}" for n in range(300)) + "\n \nlast", encoding="utf-8")
    options = ("--skip-bad", "--exact-below", "300", "--chunk-tokens", "8")
    summary = invoke("index", str(corpus), "-o", str(tmp_path / "an.index"), *options, "--json")
    assert (summary["skipped"], summary["documents"], summary["approximate"]) == (1, 301, True)
    hits = [
        invoke("search", str(tmp_path / "an.index"), "word17", *more, "--json")["hits"] for more in ((), ("--exact",))
    ]
    assert hits[0][0]["document_id"] == hits[1][0]["document_id"] == "18"


def test_search(folder: str, invoke: Invoke, models: list[Any]) -> None:
    models.clear()
    found = invoke("search", folder, "honey bees", "--top", "2", "--json")
    assert (found["num_steps"], found["hits"][0]["document_id"], len(found["hits"])) == (1, "bees", 2)
    assert found["hits"][0]["metadata"] == {"kind": "insect"}
    assert models == [None]
    found = invoke("search", folder, "cats honey", "--mode", "text", "--where", "kind = 'mammal'", "--json")
    assert [hit["chunk_id"] for hit in found["hits"]] == ["cats#0"]
    assert models == [None], "full-text search loads no model"
    shown = invoke("search", folder, "cats sleep all", "--mode", "vector", "--chunks", "--top", "1")
    assert "cats#0" in shown
    assert "cats sleep all day" in shown
    steered = invoke("search", folder, "x", "--instruction", "ants dig nests", "--mode", "vector", "--json")
    assert steered["hits"][0]["document_id"] == "ants"
    again = invoke("search", folder, "honey", "--rerank-steps", "3", "--candidates", "1", "--top", "1", "--json")
    assert again["hits"][0]["score"] == again["hits"][0]["similarity"]
    models.clear()
    for bad in (("--num-steps", "4"), ("--where", "nope = 1")):
        with pytest.raises(UsageError):
            invoke("search", folder, "cats", *bad)
    assert models == [], "refused before a model is loaded"


def test_an_unfinished_index_says_what_does_not_count_yet(
    folder: str, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: Any) -> None:
        raise GircseError("stopped")

    monkeypatch.setattr(work, "BackboneWriter", Writer)
    monkeypatch.setattr(ChunkTable, "build_indices", stop)
    corpus = str(tmp_path / "corpus.jsonl")
    with pytest.raises(GircseError, match="stopped"):
        invoke("index", corpus, "-o", str(tmp_path / "first"), "--column", "body", "--chunk-tokens", "8")
    assert invoke("search", str(tmp_path / "first"), "honey bees", "--json")["hits"][0]["document_id"] == "2"
    answer = invoke("ask", str(tmp_path / "first"), "what do bees make?", "--min-score", "-1", "--json")
    assert answer["passages"][0]["document_id"] == "2"
    open_index(tmp_path / "first")
    assert "run gircse index again; until then words do not count" in capsys.readouterr().err
    with pytest.raises(GircseError, match="stopped"):
        invoke("index", corpus, "-o", folder)
    open_index(Path(folder))
    assert capsys.readouterr().err.endswith("is unfinished: run gircse index again\n"), "it has words of its first run"


def test_rerank(invoke: Invoke, models: list[Any], tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    columns = ("--column", "body", "--id-column", "key")
    found = invoke("rerank", "honey", str(texts), *columns, "--num-steps", "7", "--top", "2", "--json")
    assert (found["num_steps"], len(found["results"])) == (7, 2)
    assert (found["results"][0]["id"], found["results"][0]["index"]) == ("bees", 1)
    assert invoke("rerank", "x", str(texts), *columns, "--instruction", "cats sleep").split()[2] == "cats"
    texts.write_text("", encoding="utf-8")
    models.clear()
    with pytest.raises(InputDataError, match=r"texts\.jsonl: holds no texts") as caught:
        invoke("rerank", "honey", str(texts), *columns)
    assert (caught.value.exit_code, models) == (1, [])
    texts.write_text('{"key": 1}\n', encoding="utf-8")
    with pytest.raises(InputDataError, match=r"mend or remove the row$"):  # there is no --skip-bad to name
        invoke("rerank", "honey", str(texts), *columns)


class Writer:
    """In the backbone's place."""

    def __init__(self, encoder: Any, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def write(self, messages: Any) -> Iterator[str]:
        yield from ("They make ", f"honey [1] ({self.max_tokens}).")


def test_ask(folder: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "BackboneWriter", Writer)
    question = "what do bees make and build?"
    found = invoke("ask", folder, question, "--min-score", "0.3", "--max-tokens", "9", "--json")
    assert (found["answer"], found["found"]) == ("They make honey [1] (9).", True)
    assert [(p["document_id"], p["cited"]) for p in found["passages"]] == [("bees", True)]
    shown = invoke("ask", folder, question, "--min-score", "-1", "--top", "2")
    assert shown.startswith("They make honey [1]")
    assert "bees#0" in shown
    assert len(shown.splitlines()) == 3
    few = invoke("ask", folder, question, "--min-score", "-1", "--context-tokens", "2", "--json")
    assert [p["text"] for p in few["passages"]] == ["bees build"]
    nothing = invoke("ask", folder, question, "--min-score", "0.99", "--json")
    assert (nothing["answer"], nothing["found"], nothing["passages"]) == ("Nothing relevant found.", False, [])
    where = invoke("ask", folder, question, "--min-score", "-1", "--where", "kind = 'mammal'", "--json")
    assert [p["document_id"] for p in where["passages"]] == ["cats"]
    with pytest.raises(UsageError, match="--llm and --llm-model belong together"):
        invoke("ask", folder, question, "--llm", "http://localhost:1")
    with pytest.raises(GircseError, match="localhost:1/v1/chat/completions cannot be reached"):
        invoke("ask", folder, question, "--min-score", "-1", "--llm", "http://localhost:1/v1", "--llm-model", "m")
