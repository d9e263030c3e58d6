"""docs/tutorial.md does what it says: its commands are taken from the page and run with the real model.

Only the corpus is shorter (its first sentences and those that the page names), and the model is loaded once.
"""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gircse.model import GIRCSE

pytest.importorskip("lancedb")
pytestmark = [pytest.mark.slow, pytest.mark.real_model]

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```sh\n(.*?)\n```", PAGE, re.DOTALL)
SENTENCES = 40


def test_the_five_commands(shipped: GIRCSE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(COMMANDS) == 5
    assert COMMANDS[0] == "make install"
    lines = (ROOT / "gircse" / "data" / "demo_corpus.jsonl").read_text(encoding="utf-8").splitlines()
    named = set(re.findall(r"`([a-z]{2}-\d{3})`", PAGE))
    kept = [line for n, line in enumerate(lines) if n < SENTENCES or any(f'"{name}"' in line for name in named)]
    corpus = tmp_path / "gircse" / "data" / "demo_corpus.jsonl"
    corpus.parent.mkdir(parents=True)
    corpus.write_text("\n".join(kept), encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    outputs: dict[str, str] = {}
    for command in COMMANDS[1:]:
        program, verb, *arguments = shlex.split(command)
        assert program == ".venv/bin/gircse"
        module: Any = import_module(f"gircse.cli.{verb}")
        monkeypatch.setattr(import_module("gircse.cli.search"), "load_model", lambda name, **options: shipped)
        monkeypatch.setattr(module, "load_model", lambda name, **options: shipped, raising=False)
        app = typer.Typer()
        app.command(verb)(getattr(module, verb))
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception}"
        outputs[command] = result.stdout

    assert (tmp_path / "demo.index" / "manifest.json").is_file()
    search, filtered, ask = (outputs[command] for command in COMMANDS[2:])
    assert search.split()[2] == "en-193"
    assert len(search.splitlines()) == 3
    topics = {line.split('"id": "')[1][:6]: "science/technology" in line for line in kept}
    assert all(topics[line.split()[2]] for line in filtered.splitlines())
    assert "heart" in ask.splitlines()[0]
    assert "en-193#0" in ask, "the passage is listed under the answer"
