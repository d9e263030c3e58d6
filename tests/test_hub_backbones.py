"""Backbones from the hub: what is fetched, what is taken from its cache, and what is said when neither works."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_backbones import write_model_files


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a snapshot download needs, for the one model `owner/model`."""

    folder: Path
    commit = "c" * 40

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = {p.name: p.read_bytes() for p in self.folder.iterdir()}
        if path.endswith("/revision/nope"):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif not path.removeprefix("/api/models").startswith("/owner/model"):
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(b), "oid": self._oid(b)} for n, b in files.items()]
            self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/api/"):
            info = {"id": "owner/model", "sha": self.commit, "siblings": [{"rfilename": name} for name in files]}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        else:
            body = files[path.rpartition("/")[2]]
            self._send(200, body, {"ETag": f'"{self._oid(body)}"', "X-Repo-Commit": self.commit})

    do_HEAD = do_GET

    def _oid(self, body: bytes) -> str:
        return hashlib.sha1(body).hexdigest()

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(address, folder that it serves) of a hub on this machine."""
    served = write_model_files(tmp_path / "served")
    handler = type("Handler", (FakeHub,), {"folder": served})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", served
        server.shutdown()


def from_hub(address: str, tmp_path: Path, *calls: str) -> list[Any]:
    """What `resolve_backbone(...)` returns or raises, in a process whose hub and hub cache are given."""
    code = "from gircse.backbones.resolve import resolve_backbone\nresults = []\n"
    for call in calls:
        code += f"try: results.append(vars(resolve_backbone({call})))\n"
        code += "except Exception as error: results.append(f'{type(error).__name__}: {error}')\n"
    code += "import json; print(json.dumps(results, default=str))"
    environment = {
        name: value for name, value in os.environ.items() if name not in {"GIRCSE_OFFLINE", "HF_HUB_OFFLINE"}
    }
    environment |= {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "GIRCSE_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert run.stderr == "", "nothing is drawn"
    return json.loads(run.stdout)


def test_hub_id_is_fetched_then_taken_from_its_cache(hub: tuple[str, Path], tmp_path: Path) -> None:
    address, served = hub
    (served / "README.md").write_text("---\nlicense: mit\n---\n")
    (served / "pytorch_model.bin").write_bytes(b"the same weights, pickled")
    (served / "model.onnx").write_bytes(b"the same weights again")
    online, unknown, no_revision = from_hub(
        address, tmp_path, "'owner/model'", "'owner/other'", "'owner/model', revision='nope'"
    )
    assert (online["name"], online["licence"]) == ("owner/model", "mit")
    assert online["sha256"] == hashlib.sha256((served / "model.safetensors").read_bytes()).hexdigest()
    assert {p.name for p in Path(online["path"]).iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "tokenizer.json")
    }
    assert unknown.startswith("UsageError: owner/other is no folder")
    assert "smollm2-135m" in unknown
    assert no_revision.startswith("UsageError: owner/model has no revision nope")
    nowhere = "http://127.0.0.1:9"
    cached, unreachable = from_hub(nowhere, tmp_path, "'owner/model'", "'owner/other'")
    assert cached == online
    assert unreachable.startswith("GircseError: owner/other")
    assert "check the network" in unreachable
    assert "\n" not in unreachable


def test_pickled_weights_only_where_there_are_no_others(hub: tuple[str, Path], tmp_path: Path) -> None:
    address, served = hub
    (served / "model.safetensors").rename(served / "pytorch_model.bin")
    (found,) = from_hub(address, tmp_path, "'owner/model'")
    assert found["sha256"] == hashlib.sha256((served / "pytorch_model.bin").read_bytes()).hexdigest()
    (served / "pytorch_model.bin").unlink()
    (refused,) = from_hub(address, tmp_path / "other", "'owner/model'")
    assert refused.startswith("UsageError: owner/model on the hub cannot serve as a backbone")
