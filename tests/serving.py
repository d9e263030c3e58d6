"""A tiny model behind a real server on a free port, a backend that is no model at all, and what reads their answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn

from gircse.model import GIRCSE
from gircse.serve.app import create_app
from gircse.serve.service import Service
from gircse.serve.settings import ServeSettings

NAME = "tiny"
CLIENT = httpx.Client(timeout=30)


def tiny_model(backbone: Path) -> GIRCSE:
    """K = 3, 48 tokens a text, characters as tokens."""
    prompts = {"query": "query: ", "document": ""}
    return GIRCSE.from_backbone(str(backbone), num_steps=3, max_seq_length=48, prompts=prompts, device="cpu")


def tiny_settings(**changes: Any) -> ServeSettings:
    """The tiny model has 64 positions: 48 tokens and 16 steps."""
    return ServeSettings(**{"port": 0, "max_num_steps": 16, **changes})


class HashBackend:
    """Vectors that depend on a row's token ids and its own K only.

    Args:
        pause: Seconds a batch takes.
        fail: Raises where this says so of the batch's token ids.
    """

    def __init__(self, pause: float = 0.0, fail: Any = None) -> None:
        self.pause, self.fail = pause, fail
        self.batches: list[list[list[int]]] = []

    def embed(self, ids: Sequence[Sequence[int]], num_steps: Sequence[int]) -> np.ndarray:
        """As `gircse.serve.engine.Backend`."""
        time.sleep(self.pause)
        self.batches.append([list(row) for row in ids])
        if self.fail is not None and self.fail(ids):
            raise RuntimeError("the backend was told to fail")
        return np.stack([self.vector(row, steps) for row, steps in zip(ids, num_steps, strict=True)])

    @staticmethod
    def vector(ids: Sequence[int], num_steps: int) -> np.ndarray:
        """What `embed` gives for one row."""
        vector = np.random.default_rng([num_steps, *ids]).standard_normal(8, dtype=np.float32)
        return vector / np.linalg.norm(vector)


@contextmanager
def running(service: Service) -> Iterator[str]:
    """The address of a server in a thread of this process, which gets SIGTERM's orderly end afterwards."""
    grace = max(1, round(service.settings.grace_period))
    config = uvicorn.Config(
        create_app(service), port=0, log_config=None, lifespan="on", timeout_graceful_shutdown=grace
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline, "the server takes too long to start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        service.begin_stop()
        server.should_exit = True
        thread.join(20)


def post(url: str, body: Any, path: str = "/v1/embeddings", **options: Any) -> httpx.Response:
    return CLIENT.post(url + path, json=body, **options)


def vectors(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.array([item["embedding"] for item in response.json()["data"]], dtype=np.float32)


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, whose shape is OpenAI's whatever the status."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    detail = response.json()["error"]
    assert set(detail) == {"message", "type", "param", "code"}
    assert len(detail["message"]) > 15
    assert detail["message"].endswith(".")
    assert response.headers["x-request-id"]
    return detail
