"""The HTTP interface over a real socket: OpenAI's contract, limits, refusals, metrics, logs."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from gircse.errors import UsageError
from gircse.groups.classify import Classifier
from gircse.model import GIRCSE
from gircse.serve.app import create_app
from gircse.serve.engine import Engine
from gircse.serve.logs import LineFormatter
from gircse.serve.service import Service
from tests.serving import CLIENT, NAME, HashBackend, error, post, running, tiny_model, tiny_settings, vectors

KEY = "secret-key"


@pytest.fixture(scope="module")
def model(backbone: Path) -> GIRCSE:
    return tiny_model(backbone)


@pytest.fixture(scope="module")
def server(model: GIRCSE) -> Iterator[str]:
    with running(Service(model, tiny_settings(max_body_mb=1.0), NAME)) as url:
        yield url


def hash_service(model: GIRCSE, backend: HashBackend, **settings: Any) -> Service:
    """The tiny model's tokenizer before a backend that is no model."""
    return Service(model, tiny_settings(**settings), NAME, Engine(backend, batch_tokens=64))


def test_embeddings_are_those_of_the_library(server: str, model: GIRCSE) -> None:
    texts = ["a cat sleeps", "x", "why?"]
    response = post(server, {"input": texts, "model": NAME})
    body = response.json()
    assert body["object"] == "list"
    assert body["model"] == NAME
    assert [(item["object"], item["index"]) for item in body["data"]] == [("embedding", n) for n in range(3)]
    assert body["usage"] == {"prompt_tokens": 17, "total_tokens": 17}
    np.testing.assert_allclose(vectors(response), model.encode(texts, normalize_embeddings=True), atol=1e-5)

    for steps in (0, 1, 16):
        expected = model.encode(texts, num_steps=steps, normalize_embeddings=True)
        np.testing.assert_allclose(vectors(post(server, {"input": texts, "num_steps": steps})), expected, atol=1e-5)

    expected = model.encode(texts, prompt=model.format_instruction("find it"), normalize_embeddings=True)
    response = post(server, {"input": texts, "instruction": "find it"})
    np.testing.assert_allclose(vectors(response), expected, atol=1e-5)
    assert response.json()["usage"]["prompt_tokens"] == 17 + 3 * len(model.format_instruction("find it"))

    short = vectors(post(server, {"input": texts, "dimensions": 5}))
    expected = model.encode(texts, truncate_dim=5, normalize_embeddings=True)
    np.testing.assert_allclose(short, expected, atol=1e-5)


def test_queries_and_documents_stand_under_the_models_own_prompts(model: GIRCSE, monkeypatch: Any) -> None:
    monkeypatch.setitem(model.prompts, "document", "text: ")
    texts = ["a cat sleeps", "x"]
    with running(Service(model, tiny_settings(), NAME)) as server:
        for input_type, encode in (("query", model.encode_query), ("document", model.encode_document)):
            response = post(server, {"input": texts, "input_type": input_type})
            np.testing.assert_allclose(vectors(response), encode(texts, normalize_embeddings=True), atol=1e-5)
            told = CLIENT.get(server + "/v1/models").json()["data"][0]["prompts"]
            assert response.json()["usage"]["prompt_tokens"] == 13 + 2 * len(told[input_type])
        assert told == {"query": "query: ", "document": "text: "}
        both = error(post(server, {"input": "a", "input_type": "query", "instruction": "find"}), 400)
        assert both["param"] == "input_type"
        assert "not both" in both["message"]
        assert error(post(server, {"input": [1, 2], "input_type": "query"}), 400)["param"] == "input"
        assert error(post(server, {"input": "a", "input_type": "passage"}), 400)["param"] == "input_type"


def test_vectors_have_the_dimension_that_the_model_is_said_to_have(model: GIRCSE, monkeypatch: Any) -> None:
    monkeypatch.setattr(model, "truncate_dim", 8)
    with running(Service(model, tiny_settings(), NAME)) as server:
        assert CLIENT.get(server + "/v1/models").json()["data"][0]["dimension"] == 8
        found = vectors(post(server, {"input": ["a cat sleeps"]}))
        np.testing.assert_allclose(found, model.encode(["a cat sleeps"], normalize_embeddings=True), atol=1e-5)
        assert found.shape == (1, 8)
        assert vectors(post(server, {"input": "a", "dimensions": 8})).shape == (1, 8)
        assert "between 1 and 8" in error(post(server, {"input": "a", "dimensions": 9}), 400)["message"]
        ranking = post(server, {"query": "a cat", "documents": ["a cat", "dogs"]}, "/v1/rerank").json()["results"]
        both = model.encode_query("a cat"), model.encode_document(["a cat", "dogs"])
        expected = model.similarity(*both)[0].numpy()
        scores = [result["relevance_score"] for result in ranking]
        assert scores == pytest.approx(sorted(expected, reverse=True), abs=1e-5)


def test_every_form_of_input_and_encoding(server: str, model: GIRCSE) -> None:
    texts = ["a cat", "dogs"]
    ids = model.tokenize_texts(texts).ids
    expected = vectors(post(server, {"input": texts}))
    np.testing.assert_allclose(vectors(post(server, {"input": ids})), expected, atol=1e-6)
    np.testing.assert_allclose(vectors(post(server, {"input": ids[0]})), expected[:1], atol=1e-6)
    np.testing.assert_allclose(vectors(post(server, {"input": texts[0], "user": "me"})), expected[:1], atol=1e-6)
    encoded = post(server, {"input": texts, "encoding_format": "base64"}).json()["data"]
    decoded = np.stack([np.frombuffer(base64.b64decode(item["embedding"]), dtype="<f4") for item in encoded])
    np.testing.assert_allclose(decoded, expected, atol=1e-6)


def test_rerank(server: str, model: GIRCSE) -> None:
    query, documents = "a cat?", ["dogs", "a cat sleeps", "cats!", "x"]
    body = {"query": query, "documents": [documents[0], {"text": documents[1]}, *documents[2:]]}
    scores = model.similarity(model.encode_query(query), model.encode_document(documents))[0].numpy()
    answer = post(server, body, "/v1/rerank").json()
    assert [result["index"] for result in answer["results"]] == np.argsort(-scores).tolist()
    assert [result["relevance_score"] for result in answer["results"]] == pytest.approx(sorted(scores)[::-1], abs=1e-5)
    assert "document" not in answer["results"][0]
    top = post(server, {**body, "top_n": 2, "return_documents": True}, "/v1/rerank").json()["results"]
    assert len(top) == 2
    assert [result["document"]["text"] for result in top] == [documents[r["index"]] for r in top]
    steered = post(server, {**body, "instruction": "find", "num_steps": 1}, "/v1/rerank").json()
    scores = model.similarity(
        model.encode_query(query, instruction="find", num_steps=1), model.encode_document(documents, num_steps=1)
    )[0].numpy()
    assert steered["results"][0]["relevance_score"] == pytest.approx(scores.max(), abs=1e-5)


def test_classify(server: str, model: GIRCSE) -> None:
    texts, labels = ["dogs", "a cat sleeps", "x"], ["cat", "dog", "the_letter_x"]
    body = {"input": [texts[0], {"text": texts[1]}, texts[2]], "labels": labels}
    asked: list[dict[str, Any]] = [{"instruction": "a"}, {"instruction": "find", "num_steps": 1}]
    for options in asked:
        answer = post(server, body | options, "/v1/classify").json()
        expected = Classifier.from_labels(model, labels, **options)
        assigned, scores = expected(texts), expected.scores(texts)
        assert [one["index"] for one in answer["data"]] == [0, 1, 2]
        assert [one["prediction"] for one in answer["data"]] == [own.label for own in assigned]
        assert [one["score"] for one in answer["data"]] == pytest.approx([own.score for own in assigned], abs=1e-5)
        found = [[one["score"] for one in own["predictions"]] for own in answer["data"]]
        np.testing.assert_allclose(found, scores, atol=1e-5)
        assert [one["label"] for one in answer["data"][0]["predictions"]] == labels
    assert error(post(server, body, "/v1/classify"), 400)["param"] == "instruction", "too long for so small a model"
    for path, asking in (("/v1/classify", body), ("/v1/embeddings", {"input": "a"}), ("/v1/explain", {"input": "a"})):
        said = error(post(server, {**asking, "instruction": " "}, path), 400)
        assert (said["param"], said["message"][:24]) == ("instruction", "The instruction is empty")
    assert "model_not_found" in error(post(server, body | {"model": "gpt"}, "/v1/classify"), 404)["code"]


def test_explain(server: str, model: GIRCSE) -> None:
    body = {"input": "a cat", "num_steps": 4, "instruction": "find", "top": 2}
    steps = post(server, body, "/v1/explain").json()["steps"]
    expected = model.explain("a cat", num_steps=4, instruction="find", top=2)
    assert [step["tokens"] for step in steps] == [step.tokens for step in expected]
    assert [step["movement"] for step in steps[1:]] == pytest.approx([step.movement for step in expected[1:]], abs=1e-5)
    assert error(post(server, {"input": "a", "num_steps": 0}, "/v1/explain"), 400)["param"] == "num_steps"


def test_models_health_docs_and_metrics(server: str, model: GIRCSE) -> None:
    card = CLIENT.get(server + "/v1/models").json()["data"][0]
    assert card["id"] == NAME
    assert card["object"] == "model"
    assert card["dimension"] == model.get_embedding_dimension()
    assert CLIENT.get(f"{server}/v1/models/{NAME}").json() == card
    assert error(CLIENT.get(server + "/v1/models/other"), 404)["code"] == "model_not_found"
    for path in ("/health", "/health/live", "/health/ready"):
        assert CLIENT.get(server + path).json() == {"status": "ok", "live": True, "ready": True}
    docs = CLIENT.get(server + "/docs").text
    for link in re.findall(r'(?:src|href)="([^"]+)"', docs):
        assert link.startswith("/"), "the reference needs no network"
        assert CLIENT.get(server + link).status_code == 200
    before = sample(server, 'gircse_tokens_total{kind="prompt"}'), sample(server, 'gircse_tokens_total{kind="soft"}')
    post(server, {"input": ["abc", "de"], "num_steps": 2})
    post(server, {"input": "abc", "dimensions": 1000})
    after = sample(server, 'gircse_tokens_total{kind="prompt"}'), sample(server, 'gircse_tokens_total{kind="soft"}')
    assert (after[0] - before[0], after[1] - before[1]) == (5, 4)
    text = CLIENT.get(server + "/metrics").text
    for name in ("queue_texts", "queue_tokens", "queue_wait_seconds_bucket", "batch_texts_bucket", "num_steps_bucket",
                 "batch_padded_tokens_bucket", "request_seconds_bucket", "batch_seconds_sum"):  # fmt: skip
        assert f"gircse_{name}" in text
    assert 'gircse_requests_total{endpoint="/v1/embeddings",status="400"}' in text
    assert sample(server, 'gircse_errors_total{kind="invalid_value"}') > 0


def sample(server: str, name: str) -> float:
    lines = CLIENT.get(server + "/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)


def test_api_key(model: GIRCSE) -> None:
    with running(hash_service(model, HashBackend(), api_key=KEY)) as url:
        for given in (None, "Bearer wrong", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer schlüssel"):
            headers = {"authorization": given.encode()} if given else {}
            response = post(url, {"input": "a"}, headers=headers)
            assert error(response, 401)["code"] == "invalid_api_key"
        good = {"authorization": f"Bearer {KEY}"}
        assert post(url, {"input": "a"}, headers=good).status_code == 200
        assert CLIENT.get(url + "/metrics").status_code == 401
        assert CLIENT.get(url + "/metrics", headers=good).status_code == 200
        for path in ("/", "/health/live", "/health/ready", "/docs", "/openapi.json"):
            assert CLIENT.get(url + path).status_code == 200, path


def test_every_request_with_steps_is_described_with_their_limit(model: GIRCSE) -> None:
    service = hash_service(model, HashBackend())
    schemas = create_app(service).openapi()["components"]["schemas"]
    steps = {name: it["properties"]["num_steps"] for name, it in schemas.items() if "num_steps" in it["properties"]}
    assert {"EmbeddingRequest", "RerankRequest", "ClassifyRequest", "ExplainRequest"} <= steps.keys()
    for name in filter(lambda name: name.endswith("Request"), steps):
        assert steps[name]["anyOf"][0]["maximum"] == service.settings.max_num_steps, name


def test_the_key_is_asked_for_wherever_the_application_is_mounted(model: GIRCSE) -> None:
    app = create_app(hash_service(model, HashBackend(), api_key=KEY + "\n"))  # as a secret from a file has it

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(app=app, root_path="/emb")
        good = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            asked = [
                client.post("/emb/v1/embeddings", json={"input": "a"}),
                client.get("/emb/metrics"),
                client.post("/emb/docs", content=b"x"),
                client.get("/emb/metrics", headers=good),
                client.get("/emb/health/live", headers=good),
            ]
            return [(await answer).status_code for answer in asked]

    assert asyncio.run(ask())[:4] == [401, 401, 401, 200]


def test_a_model_that_takes_the_prompts_mean_has_soft_tokens_too(backbone: Path) -> None:
    model = tiny_model(backbone)
    model.encoder.configure(num_steps=0, pooling="prompt_mean", attention="bidirectional")
    with running(Service(model, tiny_settings(max_num_steps=4), NAME)) as url:
        for num_steps in (0, 2):
            vector = post(url, {"input": "a", "num_steps": num_steps}).json()["data"][0]["embedding"]
            expected = model.encode("a", num_steps=num_steps, normalize_embeddings=True)
            assert vector == pytest.approx(expected.tolist(), abs=1e-5)
        assert CLIENT.get(url + "/v1/models").json()["data"][0]["max_num_steps"] == 4


def test_explain_reads_as_much_as_the_server_takes(backbone: Path) -> None:
    model, text = tiny_model(backbone), "abcdefg " * 7
    with running(Service(model, tiny_settings(max_tokens=58, max_num_steps=4), NAME)) as url:
        steps = post(url, {"input": text, "num_steps": 2, "top": 2}, "/v1/explain").json()["steps"]
    found = [step["weights"] for step in steps]
    whole = [step.weights for step in model.explain(text, num_steps=2, top=2, max_length=58)]
    cut = [step.weights for step in model.explain(text, num_steps=2, top=2)]
    np.testing.assert_allclose(found, whole, rtol=1e-3)
    assert not np.allclose(found, cut, rtol=1e-3)


def test_cors_is_off_unless_asked_for(model: GIRCSE, server: str) -> None:
    page = {"origin": "https://page.example"}
    assert "access-control-allow-origin" not in CLIENT.get(server + "/health", headers=page).headers
    with running(hash_service(model, HashBackend(), cors_origins=("https://page.example",), api_key=KEY)) as url:
        asked = {**page, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        allowed = CLIENT.options(url + "/v1/embeddings", headers=asked)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == page["origin"]
        other = CLIENT.get(url + "/health", headers={"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
        assert post(url, {"input": "a"}, headers=page).headers["access-control-allow-origin"] == page["origin"]


def test_limits_are_the_settings(model: GIRCSE) -> None:
    settings: dict[str, Any] = {
        "max_tokens": 10,
        "long_texts": "cut",
        "max_items": 3,
        "num_steps": 2,
        "max_num_steps": 4,
    }
    with running(Service(model, tiny_settings(**settings, served_names=("one", "two")), NAME)) as url:
        response = post(url, {"input": ["b" * 30, "b" * 10, "b" * 100_000], "model": "two"})
        assert response.headers["x-truncated-texts"] == "2"
        assert response.json()["model"] == "one"
        found = vectors(response)
        np.testing.assert_allclose(found[0], found[1], atol=1e-6)
        np.testing.assert_allclose(found[2], model.encode("b" * 10, num_steps=2, normalize_embeddings=True), atol=1e-5)
        ids = post(url, {"input": model.tokenize_texts(["b" * 30]).ids})
        np.testing.assert_allclose(vectors(ids)[0], found[1], atol=1e-6)
        assert "between 1 and 3" in error(post(url, {"input": ["a"] * 4}), 400)["message"]
        assert "between 0 and 4" in error(post(url, {"input": "a", "num_steps": 5}), 400)["message"]
        assert error(post(url, {"input": "a", "model": NAME}), 404)["param"] == "model"


def test_settings_that_cannot_work_are_refused_at_the_start(model: GIRCSE) -> None:
    for settings, words in (
        ({"max_num_steps": 17}, "64 positions"),
        ({"max_tokens": 49}, "64 positions"),
        ({"num_steps": 5, "max_num_steps": 4}, "--max-num-steps"),
        ({"max_items": 2049}, "2048"),
        ({"max_queue_texts": 10}, "--max-queue-texts"),
        ({"api_key": " "}, "--api-key"),
        ({"request_timeout": 0.0}, "--request-timeout"),
        ({"max_requests": 0}, "--max-requests"),
    ):
        with pytest.raises(UsageError, match=words):
            Service(model, tiny_settings(**settings), NAME)


def test_what_is_too_much_gets_429(model: GIRCSE) -> None:
    service = hash_service(model, HashBackend(pause=0.3), max_items=5, max_queue_texts=6)
    with running(service) as url, ThreadPoolExecutor(4) as pool:
        first = pool.submit(post, url, {"input": ["a"] * 5})
        time.sleep(0.15)
        response = post(url, {"input": ["b"] * 2})
        assert "limit is 6" in error(response, 429)["message"]
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "queue_full"
        assert first.result().status_code == 200
        assert post(url, {"input": ["b"] * 5}).status_code == 200, "the places are free again"
    with running(hash_service(model, HashBackend(pause=0.5), max_requests=1)) as url, ThreadPoolExecutor(4) as pool:
        first = pool.submit(post, url, {"input": "a"})
        time.sleep(0.2)
        response = post(url, {"input": "b"})
        assert error(response, 429)["code"] == "too_many_requests"
        assert response.headers["retry-after"] == "1"
        assert CLIENT.get(url + "/health").status_code == 200, "a busy server is alive"
        assert first.result().status_code == 200


def test_a_request_that_takes_too_long(model: GIRCSE) -> None:
    backend = HashBackend(pause=0.4)
    with running(hash_service(model, backend, request_timeout=0.2)) as url:
        assert "0.2 s" in error(post(url, {"input": "a"}), 504)["message"]
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=5) as slow:
            slow.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
            assert b" 408 " in slow.recv(4096)


def test_a_failing_batch_fails_its_own_request(model: GIRCSE, caplog: pytest.LogCaptureFixture) -> None:
    bad = model.tokenize_texts(["!"]).ids[0][0]
    backend = HashBackend(pause=0.05, fail=lambda ids: any(bad in row for row in ids))
    with running(hash_service(model, backend)) as url, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: post(url, {"input": "bad!" if n == 7 else f"text {n}"}), range(16)))
    assert [answer.status_code for answer in answers] == [500 if n == 7 else 200 for n in range(16)]
    detail = error(answers[7], 500)
    assert detail["type"] == "server_error"
    assert answers[7].headers["x-request-id"] in detail["message"]
    assert "told to fail" not in detail["message"], "what the model said stays in the log"
    for n in set(range(16)) - {7}:
        ids = model.tokenize_texts([f"text {n}"]).ids[0]
        np.testing.assert_allclose(vectors(answers[n])[0], HashBackend.vector(ids, 3), atol=1e-6)


def test_a_dead_backend_shows_in_the_probes(model: GIRCSE) -> None:
    with running(hash_service(model, HashBackend(fail=lambda ids: True))) as url:
        for _ in range(20):
            error(post(url, {"input": "a"}), 500)
        for path in ("/health/live", "/health/ready"):
            response = CLIENT.get(url + path)
            assert (response.status_code, response.json()["status"]) == (503, "failed")


def test_requests_whose_client_has_gone_are_dropped(model: GIRCSE) -> None:
    backend = HashBackend(pause=0.2)
    gone = model.tokenize_texts(["z"]).ids[0][0]
    with running(hash_service(model, backend)) as url, ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, url, {"input": "first"})
        time.sleep(0.1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + "/v1/embeddings", json={"input": ["z" * 40] * 100}, timeout=0.05)
        assert first.result().status_code == 200
        assert post(url, {"input": "last"}).status_code == 200
        assert sum(gone in row for batch in backend.batches for row in batch) <= 2
        assert sample(url, 'gircse_errors_total{kind="client_gone"}') == 1
        assert sample(url, "gircse_queue_texts") == 0


def test_a_lone_query_overtakes_a_large_request(model: GIRCSE) -> None:
    with running(hash_service(model, HashBackend(pause=0.02))) as url, ThreadPoolExecutor(2) as pool:
        started = time.monotonic()
        large = pool.submit(post, url, {"input": ["x" * 40] * 200})
        time.sleep(0.3)
        assert post(url, {"input": "a query"}).status_code == 200
        waited = time.monotonic() - started
        assert not large.done()
        assert waited < 2
        assert large.result().status_code == 200


def test_shutting_down_finishes_what_is_queued(model: GIRCSE) -> None:
    service = hash_service(model, HashBackend(pause=0.1))

    async def scenario() -> None:
        service.start()
        tasks = [asyncio.create_task(service.embed([f"text {n}"])) for n in range(8)]
        await asyncio.sleep(0.15)
        assert service.ready
        service.begin_stop()
        assert not service.ready
        assert await service.stop()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(answer).__name__ for answer in answers] == ["Embedded"] * 8

    asyncio.run(scenario())


def test_what_outlives_the_grace_period_is_told_so(model: GIRCSE) -> None:
    with ThreadPoolExecutor(1) as pool:
        with running(hash_service(model, HashBackend(pause=0.6), grace_period=1.0)) as url:
            request = pool.submit(httpx.post, url + "/v1/embeddings", json={"input": ["x" * 40] * 5}, timeout=20)
            time.sleep(0.3)
        assert error(request.result(), 503)["code"] == "shutting_down"


def test_logs_carry_ids_and_counts_but_no_texts(model: GIRCSE) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.setFormatter(LineFormatter(as_json=True))
    handler.emit = lambda record: lines.append(handler.format(record))  # type: ignore[method-assign]
    logger = logging.getLogger("gircse.serve")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        for log_texts in (False, True):
            lines.clear()
            with running(hash_service(model, HashBackend(), log_texts=log_texts)) as url:
                post(url, {"input": ["hush one", "hush two"], "instruction": "hush", "user": "me", "num_steps": 2})
                post(url, {"input": "hush", "num_steps": 99})
                CLIENT.get(url + "/hush?hush")
                CLIENT.get(url + "/health")
            facts = [json.loads(line) for line in lines if '"request"' in line]
            assert [fact["status"] for fact in facts] == [200, 400, 404], "probes that succeed are not logged"
            assert {"request_id", "time", "level", "method", "path", "ms"} <= facts[0].keys()
            assert (facts[0]["texts"], facts[0]["num_steps"], facts[0]["user"]) == (2, 2, "me")
            assert facts[1]["error"] == "invalid_value"
            assert ("hush" in "".join(lines)) is log_texts
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def test_plain_log_lines_cannot_be_forged() -> None:
    record = logging.makeLogRecord(
        {"msg": "request\nx", "levelname": "INFO", "facts": {"user": "a\nb status=200", "n": 1}}
    )
    line = LineFormatter(as_json=False).format(record)
    assert "\n" not in line
    assert r'user="a\nb status=200"' in line
    assert line.endswith("n=1")


def test_threads_share_the_tokenizer_safely(server: str) -> None:
    """Cutting changes a state of the tokenizer; two threads at once would raise "Already borrowed"."""
    wrong: list[str] = []

    def client(n: int) -> None:
        for _ in range(10):
            response = post(server, {"input": ["y" * (60 if n % 2 else 20)] * 20, "num_steps": 0})
            if response.status_code != (413 if n % 2 else 200):
                wrong.append(response.text)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
