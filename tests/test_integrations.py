"""The ecosystem classes, each by its own test kit where it has one, over a tiny model."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from gircse.errors import MissingExtraError, UsageError
from gircse.integrations import Embedder
from gircse.model import GIRCSE

TEXTS = ["a cat sleeps on the mat", "stocks fell on Monday", "plants eat light"]
SETTINGS: dict[str, Any] = {"instruction": "find", "document_instruction": "say", "num_steps": 2}


@pytest.fixture(scope="module")
def tiny(backbone: Path) -> GIRCSE:
    """A tiny model whose prompts leave room for text."""
    prompts = {"query": "query: ", "document": ""}
    return GIRCSE.from_backbone(str(backbone), num_steps=3, max_seq_length=48, prompts=prompts, device="cpu")


@pytest.fixture(scope="module")
def folder(tiny: GIRCSE, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same, saved."""
    path = tmp_path_factory.mktemp("saved") / "model"
    tiny.save_pretrained(str(path))
    return str(path)


class Vectors(NamedTuple):
    """How an ecosystem embeds."""

    query: Callable[[str], Any]
    documents: Callable[[list[str]], Any]


def _langchain(model: Any, **settings: Any) -> Vectors:
    pytest.importorskip("langchain_core")
    from gircse.integrations.langchain import GIRCSEEmbeddings

    made = GIRCSEEmbeddings(model, **settings)
    return Vectors(made.embed_query, made.embed_documents)


def _llama_index(model: Any, **settings: Any) -> Vectors:
    pytest.importorskip("llama_index.core")
    from gircse.integrations.llama_index import GIRCSEEmbedding

    made = GIRCSEEmbedding(model, **settings)
    return Vectors(made.get_query_embedding, made.get_text_embedding_batch)


def _haystack(model: Any, **settings: Any) -> Vectors:
    haystack = pytest.importorskip("haystack")
    from gircse.integrations.haystack import GIRCSEDocumentEmbedder, GIRCSETextEmbedder

    document_instruction = settings.pop("document_instruction", None)
    query = GIRCSETextEmbedder(model, **settings)
    settings["instruction"] = document_instruction
    documents = GIRCSEDocumentEmbedder(model, **settings)
    return Vectors(
        lambda text: query.run(text)["embedding"],
        lambda texts: [
            document.embedding for document in documents.run([haystack.Document(content=t) for t in texts])["documents"]
        ],
    )


def _chroma(model: Any, **settings: Any) -> Vectors:
    pytest.importorskip("chromadb")
    from gircse.integrations.chroma import GIRCSEEmbeddingFunction

    made = GIRCSEEmbeddingFunction(model, **settings)
    return Vectors(lambda text: made.embed_query([text])[0], made)


def _lancedb(model: Any, **settings: Any) -> Vectors:
    pytest.importorskip("lancedb")
    from gircse.integrations.lancedb import GIRCSEEmbeddingFunction

    made = GIRCSEEmbeddingFunction.create(name=model, **settings)
    return Vectors(lambda text: made.compute_query_embeddings(text)[0], made.compute_source_embeddings)


ECOSYSTEMS = [_langchain, _llama_index, _haystack, _chroma, _lancedb]


@pytest.mark.parametrize("ecosystem", ECOSYSTEMS)
def test_vectors_are_the_model_s_under_the_settings(
    ecosystem: Callable[..., Vectors], tiny: GIRCSE, folder: str
) -> None:
    made = ecosystem(folder, **SETTINGS)
    query = tiny.encode_query(TEXTS[0], instruction="find", num_steps=2, normalize_embeddings=True)
    documents = tiny.encode_document(TEXTS, instruction="say", num_steps=2, normalize_embeddings=True)
    np.testing.assert_allclose(made.query(TEXTS[0]), query, atol=1e-5)
    np.testing.assert_allclose(np.array(made.documents(TEXTS)), documents, atol=1e-5)
    plain = ecosystem(folder)
    np.testing.assert_allclose(plain.query(TEXTS[0]), tiny.encode_query(TEXTS[0], normalize_embeddings=True), atol=1e-5)
    assert np.dot(plain.query(TEXTS[0]), query) < 0.9999, "the settings make a difference"


@pytest.mark.parametrize("ecosystem", [_langchain, _llama_index, _haystack, _chroma])
def test_a_model_object_does_as_well_as_a_path(ecosystem: Callable[..., Vectors], tiny: GIRCSE, folder: str) -> None:
    np.testing.assert_allclose(ecosystem(tiny).query("a cat"), ecosystem(folder).query("a cat"), atol=1e-5)


def test_embedders_of_one_path_share_the_weights(folder: str) -> None:
    first, second = Embedder(folder, num_steps=1), Embedder(folder, num_steps=4)
    assert first.model is second.model
    assert not np.allclose(first.embed_queries(["a cat"]), second.embed_queries(["a cat"]), atol=1e-4)


@pytest.mark.parametrize("truncate_dim", [None, 8])
def test_dimensions_are_those_of_the_vectors(tiny: GIRCSE, tmp_path: Path, truncate_dim: int | None) -> None:
    with tiny.truncate_embeddings(truncate_dim):
        tiny.save_pretrained(str(tmp_path))
    embedder = Embedder(str(tmp_path), device="cpu")
    assert embedder.dimensions == (truncate_dim or 32)
    for vectors in (embedder.embed_queries(TEXTS), embedder.embed_documents(TEXTS)):
        assert vectors.shape == (len(TEXTS), embedder.dimensions)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_wrong_arguments_are_refused(tiny: GIRCSE) -> None:
    with pytest.raises(UsageError, match=r"model\.to"):
        Embedder(tiny, device="cpu")
    with pytest.raises(UsageError, match="num_steps"):
        Embedder(num_steps=-1)


@pytest.mark.parametrize(
    ("module", "needs", "extra"),
    [
        ("langchain", "langchain_core.embeddings", "langchain"),
        ("llama_index", "llama_index.core.base.embeddings.base", "llama-index"),
        ("haystack", "haystack", "haystack"),
        ("chroma", "chromadb", "chroma"),
        ("lancedb", "lancedb.embeddings", "search"),
    ],
)
def test_a_missing_ecosystem_names_its_extra(
    module: str, needs: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"gircse.integrations.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, needs, None)
    with pytest.raises(MissingExtraError, match=rf"gircse\[{extra}\]"):
        importlib.import_module(name)


# LangChain's own kits

try:
    from langchain_tests.integration_tests import EmbeddingsIntegrationTests
    from langchain_tests.unit_tests import EmbeddingsUnitTests
except ImportError:
    pass
else:

    class _OverTheTinyModel:
        @pytest.fixture(autouse=True)
        def _use(self, folder: str) -> None:
            self.folder = folder

        @property
        def embeddings_class(self) -> Any:
            from gircse.integrations.langchain import GIRCSEEmbeddings

            return GIRCSEEmbeddings

        @property
        def embedding_model_params(self) -> dict[str, Any]:
            return {"model": self.folder, "num_steps": 2, "instruction": "find"}

    class TestLangChainUnit(_OverTheTinyModel, EmbeddingsUnitTests):
        """LangChain's unit suite."""

    @pytest.mark.anyio
    class TestLangChainIntegration(_OverTheTinyModel, EmbeddingsIntegrationTests):
        """LangChain's integration suite."""

        @pytest.fixture
        def anyio_backend(self) -> str:
            """The event loop of its coroutines."""
            return "asyncio"


def test_langchain_retrieves_from_many_threads(tiny: GIRCSE) -> None:
    vectorstores = pytest.importorskip("langchain_core.vectorstores")
    from gircse.integrations.langchain import GIRCSEEmbeddings

    embeddings = GIRCSEEmbeddings(tiny, instruction="find", document_instruction="find")
    store = vectorstores.InMemoryVectorStore(embeddings)
    store.add_texts(TEXTS)

    async def ask_all() -> list[Any]:
        return await asyncio.gather(*(store.asimilarity_search(text, k=1) for text in TEXTS * 3))

    assert [hits[0].page_content for hits in asyncio.run(ask_all())] == TEXTS * 3


def test_llama_index_stores_its_settings_and_embeds_nodes(folder: str) -> None:
    schema = pytest.importorskip("llama_index.core.schema")
    from gircse.integrations.llama_index import GIRCSEEmbedding

    made = GIRCSEEmbedding(folder, embed_batch_size=2, **SETTINGS)
    again = GIRCSEEmbedding.from_dict(made.to_dict())
    assert again.get_query_embedding(TEXTS[0]) == made.get_query_embedding(TEXTS[0])
    assert again.embed_batch_size == 2
    nodes = asyncio.run(made.acall([schema.TextNode(text=text) for text in TEXTS]))
    np.testing.assert_allclose(np.array(nodes[1].embedding), made.get_text_embedding(TEXTS[1]), atol=1e-5)


def test_llama_index_takes_no_model_object_for_another(folder: str, tiny: GIRCSE, backbone: Path) -> None:
    pytest.importorskip("llama_index.core")
    from gircse.integrations.llama_index import GIRCSEEmbedding

    prompts = {name: str(prompt) for name, prompt in tiny.prompts.items()}
    other = GIRCSE.from_backbone(str(backbone), num_steps=2, max_seq_length=48, prompts=prompts, device="cpu")
    made, same, different = (GIRCSEEmbedding(model).to_dict() for model in (tiny, GIRCSE(folder, device="cpu"), other))
    assert made == same
    assert str(made) != str(different), "caches tell them apart by this"
    with pytest.raises(UsageError, match="save the model and give its folder"):
        GIRCSEEmbedding.from_dict(made)
    assert GIRCSEEmbedding.from_dict(made, model=tiny).to_dict() == made
    assert GIRCSEEmbedding.from_dict(GIRCSEEmbedding().to_dict()).to_dict() == GIRCSEEmbedding().to_dict()


def test_haystack_pipelines_run_and_are_stored(folder: str, tiny: GIRCSE) -> None:
    haystack = pytest.importorskip("haystack")
    from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    from gircse.integrations.haystack import GIRCSEDocumentEmbedder, GIRCSETextEmbedder

    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    writer = GIRCSEDocumentEmbedder(folder, instruction="find", num_steps=2, meta_fields_to_embed=["title"])
    documents = [
        haystack.Document(content=text, meta={"title": title}) for title, text in zip("xyz", TEXTS, strict=True)
    ]
    written = writer.run(documents)["documents"]
    assert documents[0].embedding is None, "the input is left as it was"
    assert written[0].meta == {"title": "x"}
    alone = tiny.encode_document(f"x\n{TEXTS[0]}", instruction="find", num_steps=2, normalize_embeddings=True)
    np.testing.assert_allclose(written[0].embedding, alone, atol=1e-5)
    store.write_documents(written)
    pipeline = haystack.Pipeline()
    pipeline.add_component("embedder", GIRCSETextEmbedder(folder, instruction="find", num_steps=2))
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    again = haystack.Pipeline.loads(pipeline.dumps(), allowed_modules=["gircse.integrations.haystack"])
    assert again.get_component("embedder").to_dict() == pipeline.get_component("embedder").to_dict()
    assert GIRCSEDocumentEmbedder.from_dict(writer.to_dict()).to_dict() == writer.to_dict()
    found = pipeline.run({"embedder": {"text": f"y\n{TEXTS[1]}"}})["retriever"]["documents"]
    assert found[0].content == TEXTS[1]
    meta = writer.run([])["meta"]
    assert meta["num_steps"] == 2
    with pytest.raises(UsageError, match="save the model"):
        GIRCSETextEmbedder(tiny).to_dict()
    with pytest.raises(UsageError, match="DocumentEmbedder"):
        GIRCSETextEmbedder(tiny).run(documents)  # type: ignore[arg-type]


def test_chroma_finds_its_function_again(folder: str, tmp_path: Path, tiny: GIRCSE) -> None:
    chromadb = pytest.importorskip("chromadb")
    from gircse.integrations.chroma import GIRCSEEmbeddingFunction

    settings = chromadb.Settings(anonymized_telemetry=False)
    client = chromadb.PersistentClient(str(tmp_path), settings)
    function = GIRCSEEmbeddingFunction(folder, instruction="find", document_instruction="find", num_steps=2)
    collection = client.create_collection("texts", embedding_function=function)
    collection.add(ids=["0", "1", "2"], documents=TEXTS)
    stored = collection.get(ids=["1"], include=["embeddings"])["embeddings"]
    expected = tiny.encode_document(TEXTS[1], instruction="find", num_steps=2, normalize_embeddings=True)
    np.testing.assert_allclose(stored[0], expected, atol=1e-5)

    again = chromadb.PersistentClient(str(tmp_path), settings).get_collection("texts")
    assert again.query(query_texts=[TEXTS[1]], n_results=1)["ids"] == [["1"]]
    rebuilt = GIRCSEEmbeddingFunction.build_from_config(function.get_config())
    assert rebuilt.get_config() == function.get_config()
    with pytest.raises(UsageError, match="num_steps"):
        collection.modify(configuration={"embedding_function": GIRCSEEmbeddingFunction(folder, num_steps=9)})
    unstored = client.create_collection("unstored", embedding_function=GIRCSEEmbeddingFunction(tiny))
    unstored.add(ids=["0", "1", "2"], documents=TEXTS)
    assert unstored.query(query_texts=[TEXTS[2]], n_results=3)["ids"][0], "a model object works too"


def test_lancedb_tables_embed_by_themselves(folder: str, tmp_path: Path) -> None:
    lancedb = pytest.importorskip("lancedb")
    from lancedb.pydantic import LanceModel, Vector

    from gircse.integrations.lancedb import GIRCSEEmbeddingFunction

    function = GIRCSEEmbeddingFunction.create(name=folder, instruction="find", document_instruction="find", num_steps=2)

    class Passage(LanceModel):
        text: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()  # type: ignore[valid-type]

    lancedb.connect(tmp_path).create_table("passages", schema=Passage).add([{"text": text} for text in TEXTS])
    table = lancedb.connect(tmp_path).open_table("passages")
    assert table.search(TEXTS[2]).limit(1).to_list()[0]["text"] == TEXTS[2]
    stored = {row["text"]: row["vector"] for row in table.to_arrow().to_pylist()}
    np.testing.assert_allclose(stored[TEXTS[0]], np.array(function.compute_source_embeddings([TEXTS[0]])[0]), atol=1e-5)
