"""An index that a program makes and changes: documents in memory are added, replaced and removed."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gircse.checksum import vectors_checksum
from gircse.cli import app
from gircse.errors import GircseError, InputDataError, UsageError
from gircse.model import GIRCSE
from gircse.search.manifest import Manifest
from gircse.search.search import SearchIndex
from tests.search_model import WordModel, make_index, settings

DOCUMENTS: list[dict[str, Any]] = [
    {"id": "ants", "text": "Ants dig deep nests.", "legs": 6, "seen": date(2020, 5, 1)},
    {"id": "cats", "text": "Cats sleep all day long.", "legs": np.int64(4)},
    {"id": 7, "text": "Bees fly far.", "tags": ["a", "b"]},
]


def found(index: SearchIndex, query: str, **options: Any) -> list[str]:
    return [hit.document_id for hit in index.search(query, **options)]


@pytest.fixture
def model() -> Any:
    return WordModel()


def test_documents_in_memory(model: Any, tmp_path: Path) -> None:
    index = SearchIndex.create(tmp_path / "i", model, iter(DOCUMENTS), chunk_tokens=12)
    assert found(index, "ants nests", top=1) == ["ants"]
    assert found(index, "sleep", mode="text") == ["cats"]
    assert found(index, "day", where="legs < 6") == ["cats"]
    (hit,) = index.search("bees", mode="text")
    assert (hit.document_id, hit.metadata) == ("7", {"tags": '["a", "b"]'})
    assert index.search("ants", top=1)[0].metadata == {"legs": 6, "seen": "2020-05-01"}
    made = Manifest.read(tmp_path / "i")
    assert (made.documents, made.complete, made.settings.chunk_tokens, made.settings.num_steps) == (3, True, 12, 2)


def test_adding_and_removing(model: Any, tmp_path: Path) -> None:
    index = SearchIndex.create(tmp_path / "i", model, DOCUMENTS, chunk_tokens=12)
    model.embedded.clear()
    new = [{"id": "dogs", "text": "Dogs bark.", "loud": True}, {"id": "cats", "text": "Cats purr."}, DOCUMENTS[0]]
    summary = index.add(new)
    assert (summary.added, summary.changed, summary.unchanged, summary.removed) == (1, 1, 1, 0)
    assert (summary.documents, summary.chunks) == (4, 4)
    assert sorted(model.embedded) == ["cats purr", "dogs bark"]
    assert found(index, "bark", mode="text") == ["dogs"]
    assert found(index, "sleep", mode="text") == [], "the old text has gone"
    assert found(index, "bees fly", top=1) == ["7"], "the others are there"
    assert index.remove(["cats", "nobody", "7", "cats"]) == 2
    assert sorted(found(index, "cats bees ants dogs", top=9)) == ["ants", "dogs"]
    assert (Manifest.read(tmp_path / "i").documents, Manifest.read(tmp_path / "i").chunks) == (2, 2)
    assert index.remove([]) == 0
    assert index.add([]).documents == 2


def test_wrong_documents_and_places(model: Any, tmp_path: Path) -> None:
    index = SearchIndex.create(tmp_path / "i", model, DOCUMENTS, chunk_tokens=12)
    for wrong, words in (
        ([{"id": "x"}], r"documents:1: .*no key 'text'"),
        ([{"text": "x"}], r"documents:1: .*no key 'id'"),
        ([{"id": "x", "text": " "}], r"documents:1: the text is empty; mend it"),
        ([{"id": "x", "text": "a"}, {"id": "x", "text": "b"}], r"documents:2: the id 'x' occurred before"),
        ([{"id": "x", "text": "\ud800"}], "documents:1"),
    ):
        with pytest.raises(InputDataError, match=words):
            index.add(wrong)
    with pytest.raises(UsageError, match="is there already"):
        SearchIndex.create(tmp_path / "i", model, DOCUMENTS)
    SearchIndex.create(tmp_path / "i", model, DOCUMENTS[:1], overwrite=True, chunk_tokens=12)
    assert index.remove(["cats"]) == 0, "it was made anew"
    with pytest.raises(InputDataError, match="holds no documents"):
        SearchIndex.create(tmp_path / "j", model, [], chunk_tokens=12)
    with pytest.raises(GircseError, match="needs the model"):
        SearchIndex(tmp_path / "i").add(DOCUMENTS)
    with pytest.raises(UsageError, match="longest input of 40"):
        SearchIndex.create(tmp_path / "k", model, DOCUMENTS, chunk_tokens=41)


def test_row_numbers_are_no_ids_to_add_to(model: Any, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("ants\nbees\n")
    checksum = vectors_checksum(model.encoder)
    make_index(corpus, tmp_path / "i", model, settings(id_column=None, model_checksum=checksum))
    index = SearchIndex(tmp_path / "i", model)
    with pytest.raises(UsageError, match="ids of their own"):
        index.add(DOCUMENTS)
    assert index.remove(["2"]) == 1


def test_what_is_added_to_an_unfinished_index_does_not_finish_it(model: Any, tmp_path: Path) -> None:
    index = SearchIndex.create(tmp_path / "i", model, DOCUMENTS, chunk_tokens=12)
    manifest = json.loads((tmp_path / "i" / "manifest.json").read_text())
    (tmp_path / "i" / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    index.add([{"id": "dogs", "text": "Dogs bark."}])
    assert not Manifest.read(tmp_path / "i").complete
    assert found(index, "bark", top=1) == ["dogs"]


def test_the_verb_keeps_others_where_it_is_told_to(saved: str, tmp_path: Path) -> None:
    folder = tmp_path / "i"
    for name, rows in (("a", DOCUMENTS[1:2]), ("b", [{"id": "dogs", "text": "Dogs bark."}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row, default=int) + "\n" for row in rows))
    asked = ["-o", str(folder), "--id-column", "id", "--model", saved, "--chunk-tokens", "30", "--json"]
    runs = [["a"], ["b", "--keep-others"], ["b"]]
    documents = []
    for name, *options in runs:
        result = CliRunner().invoke(app, ["index", str(tmp_path / f"{name}.jsonl"), *asked, *options])
        assert result.exit_code == 0, result.output
        documents.append(json.loads(result.stdout)["documents"])
    assert documents == [1, 2, 1]
    both = CliRunner().invoke(app, ["index", str(tmp_path / "a.jsonl"), *asked, "--keep-others", "--overwrite"])
    assert "give one of them" in str(both.exception)


def test_a_real_model_s_index(saved: str, tmp_path: Path) -> None:
    model = GIRCSE(saved, device="cpu")
    index = SearchIndex.create(tmp_path / "i", model, DOCUMENTS, chunk_tokens=30, instruction="x", num_steps=1)
    made = index.manifest.settings
    assert (made.num_steps, made.document_prompt) == (1, model.format_instruction("x"))
    index.add([{"id": "dogs", "text": "Dogs bark."}])
    assert found(index, "Dogs bark.", instruction="x", mode="vector", top=1) == ["dogs"]
    asked = [
        "search",
        str(tmp_path / "i"),
        "Dogs bark.",
        "--instruction",
        "x",
        "--mode",
        "vector",
        "--top",
        "1",
        "--json",
    ]
    result = CliRunner().invoke(app, asked)  # which finds the model by itself
    assert json.loads(result.stdout)["hits"][0]["document_id"] == "dogs"
