"""`gircse serve` as people start and stop it: flags and their environment variables, one-line errors, SIGTERM."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

import gircse.serve.logs
import gircse.serve.run
from gircse.cli.serve import serve
from gircse.errors import GircseError, UsageError
from gircse.serve.run import bind
from gircse.serve.service import Service
from gircse.serve.settings import ServeSettings
from tests.serving import tiny_model, tiny_settings

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(serve)


@pytest.fixture(scope="module")
def saved(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    tiny_model(backbone).save_pretrained(str(folder))
    return str(folder)


def served(monkeypatch: pytest.MonkeyPatch, arguments: list[str], environment: dict[str, str]) -> tuple[Any, Any]:
    """The service that the command would run, and the result of the command."""
    services: list[Any] = []
    formats: list[bool] = []
    monkeypatch.setattr(gircse.serve.logs, "configure_logging", lambda *, as_json: formats.append(as_json))
    monkeypatch.setattr(gircse.serve.run, "run", lambda service, listener, announce: services.append(service))
    result = CliRunner().invoke(app, arguments, env=environment)
    assert not services or formats == [services[0].settings.log_json]
    return (services[0] if services else None), result


def flags() -> dict[str, Any]:
    hints = typing.get_type_hints(serve, include_extras=True)
    return {name: hints[name].__metadata__[0] for name in inspect.signature(serve).parameters}


def test_every_flag_has_an_environment_variable_and_every_setting_a_flag() -> None:
    found = flags()
    variables = [option.envvar for option in found.values()]
    assert all(variables)
    assert len(set(variables)) == len(variables)
    singular = {"served_names": "served_name", "cors_origins": "cors_origin"}
    assert {singular.get(field.name, field.name) for field in fields(ServeSettings)} <= set(found)


def test_flags_and_variables_reach_the_service(monkeypatch: pytest.MonkeyPatch, saved: str) -> None:
    wanted: dict[str, Any] = {
        "host": "127.0.0.2", "port": 0, "api_key": "k", "num_steps": 2, "max_num_steps": 9, "max_tokens": 33,
        "long_texts": "cut", "max_items": 7, "max_body_mb": 0.5, "max_requests": 11, "max_queue_texts": 99,
        "request_timeout": 1.5, "grace_period": 2.5, "batch_tokens": 123, "log_json": True, "log_texts": True,
        "served_names": ("one", "two"), "cors_origins": ("https://a.example", "https://b.example"),
    }  # fmt: skip
    assert set(wanted) == {field.name for field in fields(ServeSettings)}
    names = {"served_names": "served_name", "cors_origins": "cors_origin"}
    arguments, environment = ["--model", saved], {"GIRCSE_SERVE_MODEL": saved}
    for name, value in wanted.items():
        option = flags()[names.get(name, name)]
        values = value if isinstance(value, tuple) else (value,)
        for one in values:
            arguments += ["--" + names.get(name, name).replace("_", "-")] + ([] if value is True else [str(one)])
        environment[option.envvar] = "1" if value is True else ",".join(map(str, values))
    for case in ((arguments, {}), ([], environment)):
        service, result = served(monkeypatch, *case)
        assert service is not None, result.output
        assert service.settings == ServeSettings(**wanted)
        assert service.limits.names == ("one", "two")
        assert service.limits.batch_tokens == 123
    service, _ = served(monkeypatch, ["--dtype", "bfloat16", "--device", "cpu", "--max-num-steps", "9"], environment)
    assert str(next(service.model.parameters()).dtype) == "torch.bfloat16"
    service, result = served(
        monkeypatch, ["--model", saved, "--port", "0", "--max-num-steps", "9", "--host", "0.0.0.0"], {}
    )
    assert service.limits.names == ("tiny",)
    assert "GIRCSE_API_KEY" in result.output
    monkeypatch.chdir(saved)
    service, _ = served(monkeypatch, ["--model", ".", "--port", "0", "--max-num-steps", "9"], {})
    assert service.limits.names == ("tiny",), "a folder has a name, wherever one stands"


def test_sigterm_ends_the_server_while_its_model_loads(monkeypatch: pytest.MonkeyPatch, saved: str) -> None:
    handlers: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Any:
        handlers.append(signal.getsignal(signal.SIGTERM))
        raise GircseError("seen")

    monkeypatch.setattr(import_module("gircse.cli.serve"), "load_model", load)
    before = signal.getsignal(signal.SIGTERM)
    served(monkeypatch, ["--model", saved, "--port", "0", "--max-num-steps", "9"], {})
    assert handlers
    assert handlers[0] not in (before, signal.SIG_DFL, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_empty_secret_does_not_open_the_server(monkeypatch: pytest.MonkeyPatch, saved: str) -> None:
    service, result = served(monkeypatch, ["--model", saved, "--port", "0"], {"GIRCSE_API_KEY": ""})
    assert service is None
    assert "GIRCSE_API_KEY is set and empty" in str(result.exception)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gircse", "serve", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_sigterm_finishes_the_queue_and_exits_with_0(saved: str) -> None:
    process = subprocess.Popen(
        command(
            "--model", saved, "--port", "0", "--max-num-steps", "16", "--batch-tokens", "64", "--log-json",
            "--grace-period", "240",
        ),
        stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert process.stderr is not None
    url, lines = "", []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"http://[0-9.:]+", line):
            url = found[0]
            break
    assert url, "".join(lines)
    # 150 batches of one row: seconds of work (minutes on a busy machine), most of it queued when the signal comes.
    answers: list[httpx.Response] = []
    body = {"input": ["x" * 40] * 150, "num_steps": 16, "encoding_format": "base64"}
    client = threading.Thread(
        target=lambda: answers.append(httpx.post(url + "/v1/embeddings", json=body, timeout=240)), daemon=True
    )
    client.start()
    # The counter stands there from the start; above 0 the first batch is done, and the request has surely arrived.
    while not re.search(
        r'^gircse_tokens_total{kind="prompt"} [1-9]', httpx.get(url + "/metrics", timeout=60).text, flags=re.MULTILINE
    ):
        time.sleep(0.02)
    assert not answers
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=240)
    client.join(30)
    assert answers
    assert answers[0].status_code == 200
    assert len(answers[0].json()["data"]) == 150
    assert process.returncode == 0, rest
    logged = [json.loads(line) for line in rest.splitlines() if line.startswith("{")]
    assert {"stopping: finishing what is queued", "request"} <= {line["message"] for line in logged}
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health")


def test_what_is_wrong_without_the_model_is_one_line_before_it_loads(
    monkeypatch: pytest.MonkeyPatch, saved: str
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(import_module("gircse.cli.serve"), "load_model", lambda *_, **options: loaded.append(options))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["--model", saved, "--max-num-steps", "16", "--port", port])
    assert isinstance(result.exception, GircseError)
    assert re.fullmatch(rf"cannot listen on 127.0.0.1:{port} \(.+\); choose another .+", str(result.exception))
    for steps, arguments in ((3, ["--model", saved]), (5, ["--num-steps", "5"])):  # K of the model, and of the option
        result = CliRunner().invoke(app, [*arguments, "--port", "0", "--max-num-steps", str(steps - 1)])
        assert isinstance(result.exception, UsageError)
        assert f"K = {steps} is above --max-num-steps ({steps - 1})" in str(result.exception)
    assert loaded == []


def test_a_bound_port_takes_no_connections_yet_and_one_of_two_servers_is_told(backbone: Path) -> None:
    with bind("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(address)
            other.listen()
            service = Service(tiny_model(backbone), tiny_settings())
            with pytest.raises(GircseError, match=rf"cannot listen on 127.0.0.1:{address[1]} "):
                gircse.serve.run.run(service, listener, lambda address: None)


def test_the_model_is_loaded_in_a_thread_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lives on beside the thread that embeds makes that one's queries take nearly twice as long."""
    threads: list[threading.Thread] = []

    def load(*_: Any, **__: Any) -> None:
        threads.append(threading.current_thread())
        raise GircseError("no such model")

    monkeypatch.setattr(import_module("gircse.cli.serve"), "load_model", load)
    result = CliRunner().invoke(app, ["--port", "0"])
    assert str(result.exception) == "no such model"
    assert threads[0] is not threading.main_thread()
    threads[0].join(timeout=10)
    assert not threads[0].is_alive()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi_offline", None)
    result = CliRunner().invoke(app, [])
    assert "gircse[serve]" in str(result.exception)
