"""The clients that people have, unchanged: OpenAI's own, LangChain's, LlamaIndex's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from gircse.model import GIRCSE
from gircse.serve.service import Service
from tests.serving import NAME, running, tiny_model, tiny_settings

KEY = "secret-key"


@pytest.fixture(scope="module")
def model(backbone: Path) -> GIRCSE:
    return tiny_model(backbone)


@pytest.fixture(scope="module")
def server(model: GIRCSE) -> Iterator[str]:
    names = (NAME, "text-embedding-ada-002")
    with running(Service(model, tiny_settings(api_key=KEY, served_names=names), NAME)) as url:
        yield url + "/v1"


def expected(model: GIRCSE, texts: list[str], **options: Any) -> np.ndarray:
    return model.encode(texts, normalize_embeddings=True, **options)


def test_openai(server: str, model: GIRCSE) -> None:
    client = openai.OpenAI(base_url=server, api_key=KEY, max_retries=0)
    texts = ["a cat", "dogs"]
    answer = client.embeddings.create(model=NAME, input=texts)  # asks for base64
    np.testing.assert_allclose([item.embedding for item in answer.data], expected(model, texts), atol=1e-5)
    assert answer.usage.prompt_tokens == 9
    assert answer.model == NAME
    answer = client.embeddings.create(model=NAME, input="a cat", encoding_format="float", dimensions=4)
    np.testing.assert_allclose(answer.data[0].embedding, expected(model, texts[:1], truncate_dim=4)[0], atol=1e-5)
    answer = client.embeddings.create(model=NAME, input=texts, extra_body={"num_steps": 1, "instruction": "find"})
    prompt = model.format_instruction("find")
    found = [item.embedding for item in answer.data]
    np.testing.assert_allclose(found, expected(model, texts, num_steps=1, prompt=prompt), atol=1e-5)
    answer = client.embeddings.create(model=NAME, input=texts, extra_body={"input_type": "query"})
    queries = model.encode_query(texts, normalize_embeddings=True)
    np.testing.assert_allclose([item.embedding for item in answer.data], queries, atol=1e-5)
    assert [card.id for card in client.models.list()] == [NAME, "text-embedding-ada-002"]
    assert client.models.retrieve(NAME).owned_by == "gircse"


def test_openai_errors(server: str) -> None:
    client = openai.OpenAI(base_url=server, api_key=KEY, max_retries=0)
    with pytest.raises(openai.BadRequestError, match="dimensions must be between") as wrong:
        client.embeddings.create(model=NAME, input="a", dimensions=1000)
    assert (wrong.value.param, wrong.value.code) == ("dimensions", "invalid_value")
    assert wrong.value.type == "invalid_request_error"
    assert wrong.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="gpt", input="a")
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client.with_options(api_key="wrong").embeddings.create(model=NAME, input="a")


def test_langchain(server: str, model: GIRCSE) -> None:
    from langchain_openai import OpenAIEmbeddings

    # Without check_embedding_ctx_length=False it sends ids of OpenAI's tokenizers, which are not this model's.
    client = OpenAIEmbeddings(model=NAME, base_url=server, api_key=KEY, check_embedding_ctx_length=False)  # type: ignore[arg-type]
    texts = ["a cat", "dogs"]
    np.testing.assert_allclose(client.embed_documents(texts), expected(model, texts), atol=1e-5)
    np.testing.assert_allclose(client.embed_query("a cat"), expected(model, ["a cat"])[0], atol=1e-5)


def test_langchain_with_queries_as_queries(server: str, model: GIRCSE) -> None:
    from langchain_core.vectorstores import InMemoryVectorStore
    from langchain_openai import OpenAIEmbeddings

    class QueryEmbeddings(OpenAIEmbeddings):
        def embed_query(self, text: str, **options: Any) -> list[float]:
            return super().embed_query(text, extra_body={"input_type": "query"}, **options)

        async def aembed_query(self, text: str, **options: Any) -> list[float]:
            return await super().aembed_query(text, extra_body={"input_type": "query"}, **options)

    client = QueryEmbeddings(model=NAME, base_url=server, api_key=KEY, check_embedding_ctx_length=False)  # type: ignore[arg-type]
    query = model.encode_query("a cat", normalize_embeddings=True)
    documents = expected(model, ["a cat", "dogs"])
    np.testing.assert_allclose(client.embed_query("a cat"), query, atol=1e-5)
    np.testing.assert_allclose(asyncio.run(client.aembed_query("a cat")), query, atol=1e-5)
    np.testing.assert_allclose(client.embed_documents(["a cat", "dogs"]), documents, atol=1e-5)
    store = InMemoryVectorStore(client)
    store.add_texts(["a cat", "dogs"])
    found = {document.page_content: score for document, score in store.similarity_search_with_score("a cat", k=2)}
    assert [found["a cat"], found["dogs"]] == pytest.approx((documents @ query).tolist(), abs=1e-5)


def test_llama_index_with_queries_as_queries(server: str, model: GIRCSE) -> None:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.schema import TextNode
    from llama_index.embeddings.openai import OpenAIEmbedding

    def client(**options: Any) -> OpenAIEmbedding:
        return OpenAIEmbedding(model_name=NAME, api_base=server, api_key=KEY, max_retries=0, **options)

    texts = ["a cat", "dogs"]
    index = VectorStoreIndex([TextNode(text=text) for text in texts], embed_model=client())
    queries = client(additional_kwargs={"extra_body": {"input_type": "query"}})
    found = index.as_retriever(embed_model=queries, similarity_top_k=2).retrieve("a cat")
    query = model.encode_query("a cat", normalize_embeddings=True)
    scores = dict(zip(texts, (expected(model, texts) @ query).tolist(), strict=True))
    assert {node.text: node.score for node in found} == pytest.approx(scores, abs=1e-5)


def test_llama_index(server: str, model: GIRCSE) -> None:
    from llama_index.embeddings.openai import OpenAIEmbedding

    texts = ["a cat", "dogs"]
    named: dict[str, Any] = {"model_name": NAME}
    for options in (named, {}):  # without a name it asks for text-embedding-ada-002
        client = OpenAIEmbedding(api_base=server, api_key=KEY, max_retries=0, **options)
        np.testing.assert_allclose(client.get_text_embedding_batch(texts), expected(model, texts), atol=1e-5)
        np.testing.assert_allclose(client.get_query_embedding("a cat"), expected(model, ["a cat"])[0], atol=1e-5)
