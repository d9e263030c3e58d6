"""deploy/ray_serve.py on a local Ray: the contract tests of `gircse serve`, against replicas of Ray Serve."""

from __future__ import annotations

import inspect
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gircse.errors import UsageError
from gircse.model import GIRCSE
from tests import test_serve_hostile, test_serve_http
from tests.local_ray import start_ray
from tests.serving import CLIENT, NAME, tiny_model

pytest.importorskip("ray.serve")
pytestmark = [pytest.mark.slow, pytest.mark.ray]

# Those that ask a server and nothing else; the others look into the process or start servers of their own.
# Request ids are Ray Serve's here, which takes any from the client.
for _name, _test in {**vars(test_serve_http), **vars(test_serve_hostile)}.items():
    asks = _name.startswith("test_") and _name != "test_request_ids"
    if asks and set(inspect.signature(_test).parameters) <= {"server", "model"}:
        globals()[_name] = _test


@pytest.fixture(scope="module")
def model(backbone: Path) -> GIRCSE:
    return tiny_model(backbone)


@pytest.fixture(scope="module")
def server(model: GIRCSE, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import ray
    from ray import serve

    from deploy.ray_serve import app

    folder = tmp_path_factory.mktemp("saved") / NAME
    model.save_pretrained(str(folder))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_ray()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    limits: dict[str, Any] = {"max_num_steps": "16", "max_body_mb": "1.0", "served_names": NAME}
    limits |= {"log_json": "true", "log_texts": "true"}
    serve.run(app({"model": str(folder), "device": "cpu", "max_replicas": "1", **limits}), route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def test_contract_tests_are_found() -> None:
    assert sum(name.startswith("test_") for name in globals()) > 5


def test_an_answer_has_one_request_id(server: str) -> None:
    given = CLIENT.get(server + "/health", headers={"x-request-id": "client-7"})
    assert given.headers.get_list("x-request-id") == ["client-7"]
    assert len(CLIENT.get(server + "/health").headers["x-request-id"]) >= 32


def test_unknown_arguments_are_refused() -> None:
    from deploy.ray_serve import app

    with pytest.raises(UsageError, match="'modell'"):
        app({"modell": "x"})


def test_strings_with_commas_are_several_values() -> None:
    from deploy.ray_serve import app

    deployment: Any = app({"served_names": "mine, other", "cors_origins": "https://a.example"})
    _, settings = deployment._bound_deployment.init_args
    assert (settings.served_names, settings.cors_origins) == (("mine", "other"), ("https://a.example",))


def test_a_replica_logs_as_the_settings_say(server: str) -> None:
    CLIENT.post(server + "/v1/embeddings", json={"model": NAME, "input": "cats"}, headers={"x-request-id": "logged-1"})
    logs = Path("/tmp/ray/session_latest/logs")
    deadline = time.monotonic() + 20
    lines: list[str] = []
    while not lines and time.monotonic() < deadline:
        time.sleep(0.2)
        everything = [line for file in logs.glob("worker-*.err") for line in file.read_text("utf-8").splitlines()]
        lines = [line for line in everything if "logged-1" in line and line.startswith("{")]  # Ray has one of its own
    assert len(lines) == 1
    logged = json.loads(lines[0])
    assert (logged["request_id"], logged["status"], logged["input"]) == ("logged-1", 200, ["cats"])
