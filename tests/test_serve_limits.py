"""What a server holds of its clients' bodies, and what one of them can do to the others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from gircse.errors import UsageError
from gircse.serve import middleware
from gircse.serve.engine import Engine
from gircse.serve.schemas import EmbeddingRequest
from gircse.serve.service import Service
from tests.serving import CLIENT, NAME, HashBackend, error, post, running, tiny_model, tiny_settings

JSON = {"content-type": "application/json"}


def begun(url: str, length: int, sent: bytes) -> socket.socket:
    """A connection whose request has not come to its end yet."""
    connection = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=10)
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    )
    connection.sendall(head.encode() + sent)
    return connection


def test_a_body_of_a_hundred_thousand_unknown_fields_is_one_error(backbone: Path) -> None:
    with pytest.raises(ValidationError) as caught:
        EmbeddingRequest.model_validate({"input": "a", **{f"f{n}": n for n in range(1000)}})
    assert [problem["loc"] for problem in caught.value.errors()] == [("f0",)]
    body = '{"input": "a", ' + ", ".join(f'"f{n}": 1' for n in range(100_000)) + "}"
    with running(Service(tiny_model(backbone), tiny_settings(), NAME)) as url:
        response = CLIENT.post(url + "/v1/embeddings", content=body, headers=JSON)
        assert "there is no field 'f0'" in error(response, 400)["message"].replace("There", "there")


def test_unfinished_bodies_have_a_budget_and_take_no_place(backbone: Path) -> None:
    settings = tiny_settings(max_body_mb=0.01, max_requests=1)
    with running(Service(tiny_model(backbone), settings, NAME)) as url:
        with ExitStack() as open_ones:
            for _ in range(8):
                open_ones.enter_context(begun(url, 9000, b" " * 8999))
            deadline = time.monotonic() + 10
            while (response := post(url, {"input": "a" * 9000})).status_code != 429 and time.monotonic() < deadline:
                time.sleep(0.05)  # until the server has read them all
            assert "0.08 MB of other bodies" in error(response, 429)["message"]
            assert response.headers["retry-after"] == "1"
            assert post(url, {"input": "short"}).status_code == 200, "what fits is served"
        deadline = time.monotonic() + 10
        while (response := post(url, {"input": "a" * 9000})).status_code == 429 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert error(response, 413)["code"] == "context_length_exceeded", (
            "the others' bytes are free again; the text is too long"
        )


def test_a_silent_client_is_told_so(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "_SILENCE", 0.3)
    with (
        running(Service(tiny_model(backbone), tiny_settings(), NAME)) as url,
        begun(url, 10, b"{") as connection,
    ):
        assert b"stopped arriving for 0.3 s" in connection.recv(4096)
    settings = tiny_settings(request_timeout=0.2)
    with (
        running(Service(tiny_model(backbone), settings, NAME)) as url,
        begun(url, 10, b"{") as connection,
    ):
        assert b"did not arrive within 0.2 s" in connection.recv(4096)


def test_a_page_may_use_openais_client_and_read_what_was_cut(backbone: Path) -> None:
    page = {"origin": "https://page.example"}
    settings = tiny_settings(cors_origins=("https://page.example",), long_texts="cut")
    with running(Service(tiny_model(backbone), settings, NAME)) as url:
        asked = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,x-stainless-os",
        }
        assert CLIENT.options(url + "/v1/embeddings", headers={**page, **asked}).status_code == 200
        response = post(url, {"input": "a" * 100}, headers=page)
        assert response.headers["x-truncated-texts"] == "1"
        assert "x-truncated-texts" in response.headers["access-control-expose-headers"]


def test_a_model_that_returns_no_vectors_is_not_healthy(backbone: Path) -> None:
    class Broken(HashBackend):
        def embed(self, ids: Sequence[Sequence[int]], num_steps: Sequence[int]) -> np.ndarray:
            return super().embed(ids, num_steps) * np.nan

    service = Service(tiny_model(backbone), tiny_settings(), NAME)
    service.engine = Engine(Broken(), batch_tokens=100, on_batch=service.metrics.observe_batch)
    with running(service) as url:
        for _ in range(20):
            assert CLIENT.get(url + "/health/live").status_code == 200
            assert "request id" not in error(post(url, {"input": "a"}), 500)["message"], "the log has no more of it"
        assert CLIENT.get(url + "/health/live").status_code == 503
        assert "gircse_batch_failures_total 20.0" in CLIENT.get(url + "/metrics").text


def test_explaining_is_counted_like_other_work(backbone: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(Service(tiny_model(backbone), tiny_settings(), NAME)) as url, caplog.at_level("INFO", "gircse.serve"):
        assert post(url, {"input": "a cat", "num_steps": 4}, "/v1/explain").status_code == 200
        told = CLIENT.get(url + "/metrics").text
        lines: list[dict[str, Any]] = [getattr(record, "facts", {}) for record in caplog.records]
    line = next(line for line in lines if line.get("path") == "/v1/explain")
    assert 'gircse_tokens_total{kind="prompt"} 5.0' in told
    assert 'gircse_tokens_total{kind="soft"} 4.0' in told
    assert "gircse_batch_seconds_count 1.0" in told
    assert {name: line[name] for name in ("texts", "tokens", "num_steps")} == {"texts": 1, "tokens": 5, "num_steps": 4}


def test_openai_s_null_format_and_the_limits_in_the_reference(backbone: Path) -> None:
    with running(Service(tiny_model(backbone), tiny_settings(max_items=3), NAME)) as url:
        response = post(url, {"input": "a", "encoding_format": None})
        assert isinstance(response.json()["data"][0]["embedding"], list)
        reference = CLIENT.get(url + "/openapi.json").text
    assert '"maxItems":3' in reference.replace(" ", "")
    assert "2048" not in reference


@pytest.mark.parametrize("name", ["max_body_mb", "request_timeout", "grace_period"])
def test_limits_without_end_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="finite"):
        tiny_settings(**{name: float("inf")})


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_sigterm_ends_a_server_that_still_loads() -> None:
    program = "import os, signal, time\nfrom gircse.serve.run import ended_by_sigterm\nwith ended_by_sigterm():\n"
    program += "    signal.raise_signal(signal.SIGTERM)\n    time.sleep(60)\n"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 128 + signal.SIGTERM


def test_a_client_that_goes_while_sending_has_gone(backbone: Path) -> None:
    with running(Service(tiny_model(backbone), tiny_settings(), NAME)) as url:
        begun(url, 100, b"{").close()
        deadline = time.monotonic() + 10
        while 'kind="client_gone"' not in (told := httpx.get(url + "/metrics").text) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert 'gircse_errors_total{kind="client_gone"} 1.0' in told
