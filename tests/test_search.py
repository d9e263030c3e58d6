"""Search and rerank: the ranking is what a plain computation gives, and what does not fit the index is refused."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gircse.checksum import vectors_checksum
from gircse.errors import GircseError, UsageError
from gircse.model import GIRCSE
from gircse.search import SearchMode, table
from gircse.search.index import IndexProgress
from gircse.search.rerank import rerank
from gircse.search.search import SearchIndex, fuse
from tests.search_model import WordModel, make_index, settings

pytest.importorskip("lancedb")

DOCUMENTS = {
    "ants": {"text": "ants dig nests in the ground", "year": 1999, "kind": "insect"},
    "bees": {"text": "bees build hives and make honey", "year": 2001, "kind": "insect"},
    "cats": {"text": "cats sleep all day", "year": 2005, "kind": "mammal"},
    "dogs": {"text": "dogs bark at cats", "year": 2010},
    "long": {"text": " ".join(f"Filler number {n} about honey and honey again." for n in range(12)) + " Whales sing."},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("search")
    corpus = root / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"id": k, **v}) for k, v in DOCUMENTS.items()), encoding="utf-8")
    model: Any = WordModel()
    make_index(corpus, root / "an.index", model, settings(model_checksum=vectors_checksum(model.encoder)))
    return root / "an.index"


@pytest.fixture
def index(folder: Path) -> SearchIndex:
    model: Any = WordModel()
    return SearchIndex(folder, model)


def ids(hits: list[Any]) -> list[str]:
    return [hit.document_id for hit in hits]


def test_vector_search_is_the_best_chunk_by_cosine(index: SearchIndex) -> None:
    model: Any = index.model
    rows = index.table.rows()
    vectors = np.array([row["vector"] for row in rows])
    query = model.encode_tokenized(model.tokenize_texts(["whales sing honey"], "query: "))[0]
    scores: dict[str, float] = {}
    for row, score in zip(rows, vectors @ (query / np.linalg.norm(query)), strict=True):
        scores[row["document_id"]] = max(scores.get(row["document_id"], -1), float(score))
    hits = index.search("whales sing honey", mode="vector", top=5)
    assert ids(hits) == sorted(scores, key=lambda name: -scores[name])
    assert [hit.score for hit in hits] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-5)
    # A long document fills the first places with its chunks; by document it comes once, by chunk as often as it has.
    assert ids(index.search("honey", mode="vector", top=3)).count("long") == 1
    assert ids(index.search("honey again", mode="vector", top=3, chunks=True)).count("long") > 1


def test_text_search_needs_no_model_and_filters(folder: Path) -> None:
    index = SearchIndex(folder)
    assert ids(index.search("cat", mode="text")) == ["cats", "dogs"]
    assert ids(index.search("cats", mode="text", where="year > 2005")) == ["dogs"]
    hit = index.search("nests", mode="text")[0]
    assert (hit.metadata, hit.similarity) == ({"year": 1999, "kind": "insect"}, None)
    assert index.search("zebra", mode="text") == []
    with pytest.raises(GircseError, match="needs the model"):
        index.search("cats")
    with pytest.raises(UsageError, match=r"colour.*metadata columns: (kind, year|year, kind)"):
        index.search("cats", mode="text", where="colour = 'red'")


@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
def test_metadata_may_be_called_as_what_a_search_adds(tmp_path: Path, mode: SearchMode) -> None:
    names = {"score": 9.5, "similarity": 0.1, "bm25": 7.0, "metadata": "m", "text_": "t"}
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"id": str(n), "text": f"film {n} of honey", **names, "score": n + 0.5} for n in range(3)]
    corpus.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    model: Any = WordModel()
    make_index(corpus, tmp_path / "i", model, settings(model_checksum=vectors_checksum(model.encoder)))
    hit = SearchIndex(tmp_path / "i", model).search("film 2", mode=mode, top=1, where="score > 1 AND bm25 = 7.0")[0]
    assert (hit.document_id, hit.metadata) == ("2", {**names, "score": 2.5})
    assert (hit.similarity is None) == (mode == "text")
    assert hit.similarity != names["similarity"]
    assert hit.score not in (2.5, names["bm25"])


@pytest.mark.filterwarnings("ignore:optimize")
def test_an_index_that_stays_open_follows_its_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_OLD_VERSIONS", timedelta(0))  # as if an hour lay between the updates
    corpus, folder = tmp_path / "corpus.jsonl", tmp_path / "an.index"
    model: Any = WordModel()
    other: Any = WordModel(checksum="another")

    def update(edition: str, documents: int, model: Any = model, **options: Any) -> None:
        rows = [{"id": str(n), "text": f"film {n} {edition}", edition: n} for n in range(documents)]
        corpus.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        made_with = settings(model_checksum=vectors_checksum(model.encoder), **options)
        make_index(corpus, folder, model, made_with, overwrite="num_steps" in options)

    update("first", 5)
    index = SearchIndex(folder, model)
    for edition, documents in (("second", 7), ("third", 4)):
        update(edition, documents)
        for mode in ("vector", "text", "hybrid"):
            hits = index.search(f"film 3 {edition}", mode=mode, where=f"{edition} >= 0")
            assert len(hits) == documents
            assert (hits[0].text, hits[0].metadata) == (f"film 3 {edition}", {edition: 3})
        assert index.manifest.documents == documents

    update("anew", 6, num_steps=1)
    model.calls.clear()
    assert len(index.search("film", num_steps=1)) == 6
    assert model.calls == [1]
    update("other", 3, other, num_steps=1)
    for _ in range(2):
        with pytest.raises(GircseError, match="weights are not those of the model given"):
            index.search("film")
    assert len(index.search("film", mode="text")) == 3
    index.use_model(other)
    assert len(index.search("film")) == 3


def test_filters_come_before_the_ranking(index: SearchIndex) -> None:
    assert ids(index.search("honey", mode="vector", top=1, where="kind = 'mammal'")) == ["cats"]


def test_hybrid_is_the_fusion_of_both_rankings(index: SearchIndex) -> None:
    hits = index.search("cats sleep", top=5)
    ranks = [ids(index.search("cats sleep", mode=mode, top=5)) for mode in ("vector", "text")]
    expected = {name: sum(1 / (61 + r.index(name)) for r in ranks if name in r) for name in ranks[0]}
    assert hits[0].document_id == "cats"
    assert {hit.document_id: hit.score for hit in hits} == pytest.approx(expected)
    assert all(hit.similarity is not None for hit in hits)


def test_an_index_whose_first_run_was_stopped_is_searched_by_meaning(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"id": str(n), "text": f"number{n} honey"} for n in range(300)]
    corpus.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    model: Any = WordModel()

    def stop(progress: IndexProgress) -> None:
        raise KeyboardInterrupt

    made_with = settings(model_checksum=vectors_checksum(model.encoder))
    with pytest.raises(KeyboardInterrupt):
        make_index(corpus, tmp_path / "i", model, made_with, on_progress=stop)
    index = SearchIndex(tmp_path / "i", model)
    assert 0 < index.table.count_chunks() <= 300
    assert not index.table.has_text_index
    found = index.search("number7 honey", top=3)
    assert found[0].document_id == "7"
    assert found == index.search("number7 honey", mode="vector", top=3)
    assert index.search("number7 honey", rerank_steps=4)[0].document_id == "7"
    with pytest.raises(GircseError, match="needs a finished index"):
        index.search("honey", mode="text")


def test_fusion_by_hand() -> None:
    a, b, c = ({"id": name} for name in "abc")
    fused = fuse([[a, b], [b, c]], "id")
    assert [row["id"] for row in fused] == ["b", "a", "c"]
    assert fused[0]["score"] == pytest.approx(1 / 62 + 1 / 61)


def test_an_instruction_moves_the_query(index: SearchIndex) -> None:
    plain, steered = (index.search("animals", mode="vector", top=1, instruction=i) for i in (None, "dogs bark"))
    assert steered[0].document_id == "dogs"
    assert steered[0].score > plain[0].score


def test_reranking_uses_more_steps_on_the_candidates_only(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    rows = {"x": "honey stepnoise", "y": "honey and bread", "z": "nothing alike"}
    corpus.write_text("\n".join(json.dumps({"id": k, "text": v}) for k, v in rows.items()), encoding="utf-8")
    model: Any = WordModel()
    made_with = settings(model_checksum=vectors_checksum(model.encoder), num_steps=0)
    make_index(corpus, tmp_path / "an.index", model, made_with)
    index = SearchIndex(tmp_path / "an.index", model)
    first = index.search("honey bread", mode="vector", top=2)
    model.embedded.clear()
    model.calls.clear()
    again = index.search("honey", mode="vector", top=2, rerank_steps=4, candidates=2)
    assert model.calls == [0, 4, 4], "the query with few steps, then query and candidates with more"
    assert "nothing alike" not in model.embedded
    assert ids(first)[0] == "y"
    one_stage = index.search("honey", mode="vector", top=2)
    assert again[0].document_id == "x"
    assert again[0].score > max(hit.score for hit in one_stage if hit.document_id == "x")


def test_other_models_and_steps_are_refused(folder: Path, index: SearchIndex) -> None:
    other: Any = WordModel(checksum="another")
    with pytest.raises(GircseError, match="weights are not those of the model given"):
        SearchIndex(folder, other)
    with pytest.raises(UsageError, match="made with 2 refinement steps, not 5"):
        index.search("cats", num_steps=5)
    assert index.search("cats", num_steps=2)
    with pytest.raises(UsageError, match="query is empty"):
        index.search(" ")
    with pytest.raises(UsageError, match="top and candidates"):
        index.search("cats", top=0)
    with pytest.raises(UsageError, match="is no index"):
        SearchIndex(folder.parent)


def test_rerank_texts() -> None:
    model: Any = WordModel()
    texts = ["cats sleep", "ants dig", "bees fly", "ants dig nests"]
    ranked = rerank(model, "ants dig nests", texts, num_steps=3)
    assert model.calls == [3, 3]
    assert ranked[0].index == 3
    assert ranked[0].text == texts[3]
    filler = " ".join(["unrelated filler text here."] * 20)
    best, other = rerank(model, "ants dig nests", [filler, f"{filler} Ants dig nests."])
    assert best.index == 1, "a long text counts by its best chunk"
    assert best.score > other.score + 0.05
    assert len(rerank(model, "ants", texts, top=2)) == 2
    assert rerank(model, "ants", []) == []
    assert rerank(model, "ants", texts, instruction="cats sleep")[0].index == 0
    with pytest.raises(UsageError, match="query is empty"):
        rerank(model, " ", texts)


def test_vectors_cut_short_are_indexed_searched_and_ranked(backbone: Path, tmp_path: Path) -> None:
    whole = GIRCSE.from_backbone(str(backbone), num_steps=1, max_seq_length=48, device="cpu")
    whole.truncate_dim = 8
    whole.save_pretrained(str(tmp_path / "saved"))
    model, whole.truncate_dim = GIRCSE(str(tmp_path / "saved"), device="cpu"), None
    corpus, folder, texts = tmp_path / "corpus.txt", tmp_path / "an.index", ["ants dig", "bees fly", "cats sleep"]
    corpus.write_text("\n".join(texts), encoding="utf-8")
    facts = {"model_checksum": vectors_checksum(model.encoder), "num_steps": 1, "dimension": 8, "id_column": None}
    make_index(corpus, folder, model, settings(**facts))
    index = SearchIndex(folder, model)
    query, documents = model.encode("bees fly"), model.encode(texts)
    cosines = documents @ query / np.linalg.norm(documents, axis=1) / np.linalg.norm(query)
    best = [texts[place] for place in np.argsort(-cosines)]
    model.prompts["query"] = ""
    for hits in (index.search("bees fly", mode="vector"), index.search("bees fly", mode="vector", rerank_steps=1)):
        assert [hit.text for hit in hits] == best
        assert [hit.score for hit in hits] == pytest.approx(sorted(cosines, reverse=True), abs=1e-5)
    ranked = rerank(model, "bees fly", texts)
    assert [document.text for document in ranked] == best
    assert [document.score for document in ranked] == pytest.approx(sorted(cosines, reverse=True), abs=1e-5)
    with pytest.raises(GircseError, match="vectors of 8 numbers, and this model's have 32; set its truncate_dim"):
        SearchIndex(folder, whole)


def test_checksums_tell_models_apart(backbone: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig

    def make() -> GIRCSE:
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        return GIRCSE.from_backbone(str(backbone), num_steps=1, max_seq_length=48, lora=lora, device="cpu")

    plain = GIRCSE.from_backbone(str(backbone), num_steps=1, max_seq_length=48, device="cpu")
    model = make()
    checksum = vectors_checksum(model.encoder)
    assert checksum == vectors_checksum(make().encoder)
    assert checksum != vectors_checksum(plain.encoder)
    model.save(str(tmp_path / "saved"))
    loaded = GIRCSE(str(tmp_path / "saved"), device="cpu")
    loaded.encode("text")  # which may fold the adapter into the weights
    assert vectors_checksum(loaded.encoder) == checksum
    narrow = GIRCSE(str(tmp_path / "saved"), device="cpu", dtype=torch.bfloat16)
    assert vectors_checksum(narrow.encoder) == checksum
    model.encoder.configure(pooling="last")
    assert vectors_checksum(model.encoder) != checksum


def test_one_long_document_does_not_take_the_others_places(tmp_path: Path) -> None:
    rows = {"long": "honey bees " * 200, "a": "honey", "b": "honey bread", "c": "bees"}
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"id": k, "text": v}) for k, v in rows.items()), encoding="utf-8")
    model: Any = WordModel()
    make_index(corpus, tmp_path / "an.index", model, settings(model_checksum=vectors_checksum(model.encoder)))
    index = SearchIndex(tmp_path / "an.index", model)
    for mode in ("vector", "text", "hybrid"):
        hits = index.search("honey bees", mode=mode, top=3, candidates=3, rerank_steps=4)
        assert len(set(ids(hits))) == len(hits) == 3
