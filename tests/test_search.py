"""Search and rerank: the ranking is what a plain computation gives, and what does not fit the index is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gircse.checksum import vectors_checksum
from gircse.errors import GircseError, UsageError
from gircse.model import GIRCSE
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
