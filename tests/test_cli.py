"""The verbs as people call them: results on stdout, errors in a line, exit codes. `embed` has its own file."""

from __future__ import annotations

import itertools
import json
import logging
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import gircse.cli
from gircse.cli.common import quiet_libraries
from gircse.fast import step_kernels
from gircse.model import GIRCSE
from tests.verbs import run


def test_similarity(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: str) -> None:
    code, out, _ = run(monkeypatch, capsys, "similarity", "a cat", "a cat", "--model", saved)
    assert (code, out) == (0, "1.0000\n")
    scores = []
    asked = ["similarity", "a cat", "dogs!", "--model", saved, "--dtype", "float32", "--json"]  # else by the processor
    for options in ([], ["--instruction", "find"], ["--num-steps", "0"]):
        code, out, _ = run(monkeypatch, capsys, *asked, *options)
        facts = json.loads(out)
        assert code == 0
        assert facts["num_steps"] == (0 if "--num-steps" in options else 3)
        scores.append(facts["similarity"])
    assert len({round(score, 5) for score in scores}) == 3, "every option changes the result"
    model = GIRCSE(saved, device="cpu")
    a, b = model.encode(["a cat", "dogs!"], prompt="")
    assert scores[0] == pytest.approx(float(model.similarity(a, b)), abs=1e-5)


def test_explain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: str, backbone: Path
) -> None:
    code, out, _ = run(
        monkeypatch, capsys, "explain", "a cat", "--model", saved, "--json", "--top", "2", "--num-steps", "4"
    )
    steps = json.loads(out)["steps"]
    assert code == 0
    assert [len(step["tokens"]) for step in steps] == [2] * 4
    code, table, _ = run(monkeypatch, capsys, "explain", "a cat", "--model", saved)
    assert code == 0
    assert re.search(r"^1\s", table, re.MULTILINE)
    assert re.search(r"^3\s", table, re.MULTILINE)
    _, untrained, _ = run(
        monkeypatch, capsys, "explain", "a cat", "--backbone", str(backbone), "--json", "--num-steps", "4"
    )
    assert json.loads(untrained)["steps"] != steps


def test_info(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: str) -> None:
    code, out, _ = run(monkeypatch, capsys, "info", "--model", saved, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["model"]["num_steps"] == 3
    assert facts["versions"]["torch"]
    assert "smollm2-135m" in facts["backbones"]
    _, out, _ = run(monkeypatch, capsys, "info", "--no-model", "--json")
    assert "model" not in json.loads(out)
    names = "library", "matrix_library", "bfloat16_library", "int8_library"
    for found, told in (
        ((1, 1, 1, 1), "yes, for AMX, AVX512-BF16 and VNNI too"),
        ((1, None, 1, 1), "yes, for AVX512-BF16 and VNNI too"),
        ((1, None, None, 1), "yes, for VNNI too"),
        ((1, None, None, None), "yes"),
        ((None, None, None, None), "no, so a CPU is slower; made at installation where there is g++"),
    ):
        for name, library in zip(names, found, strict=True):
            monkeypatch.setattr(step_kernels, name, lambda library=library: library)
        _, out, _ = run(monkeypatch, capsys, "info", "--no-model", "--json")
        assert json.loads(out)["hardware"]["compiled kernels"] == told


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["similarity", "", "b"], 2, "text A is empty"),
        (["explain", " "], 2, "the text is empty"),
        (["explain", "x", "--model", "a", "--backbone", "b"], 2, "not both"),
        (["similarity", "a", "b", "--model", "SAVED", "--instruction", "x" * 80], 2, "the instruction alone takes"),
        (["similarity", "a", "b", "--model", "/nowhere/at/all"], 1, "nowhere"),
        (["explain", "x", "--backbone", "no-such-backbone"], 1, "no-such-backbone"),
        (["train", "nowhere.yaml", "-o", "x"], 1, "nowhere.yaml"),
        (["similarity", "a"], 2, "B"),
        (["similarity", "a", "b", "--num-steps", "-1"], 2, "num-steps"),
    ],
)
def test_errors_are_a_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    saved: str,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    arguments = [saved if argument == "SAVED" else argument for argument in arguments]
    got, out, err = run(monkeypatch, capsys, *arguments)
    assert (got, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_help_is_quick_and_every_verb_has_examples() -> None:
    script = "import sys, gircse.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0, "help must not wait for torch"
    for command in gircse.cli.app.registered_commands:
        assert command.callback is not None
        assert "[bold]Examples[/bold]" in (command.callback.__doc__ or "")
        assert command.help is not None
        for line, following in itertools.pairwise(command.help.splitlines()):
            assert not line or not following or following.startswith(" "), "the terminal breaks lines, not we"
    helped = subprocess.run([sys.executable, "-m", "gircse", "--help"], capture_output=True, text=True, check=False)
    assert helped.returncode == 0
    for verb in gircse.cli.VERBS:
        assert verb.__name__ in helped.stdout


@pytest.mark.slow
@pytest.mark.real_model
def test_demo_tells_what_it_computed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(monkeypatch, capsys, "demo", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["passages"] >= 300
    assert len(facts["questions"]) == 5
    assert sum(question["ranks"]["5"] <= 3 for question in facts["questions"]) >= 3, "the shipped model finds answers"
    topic, language = facts["facets"]["topic"], facts["facets"]["language"]
    assert topic["topic"] > language["topic"] + 0.1, "each instruction finds what it asks for better than the other"
    assert language["language"] > topic["language"] + 0.1
    assert facts["answer"]["text"] in " ".join(err.split()), "what was written is what is told"
    assert "en-193" in facts["answer"]["cited"], "the answer cites the passage that answers"
    for text in ("coldest place", "soft tokens", "gircse embed"):
        assert text in err


def test_the_hubs_retries_stay_off_the_terminal() -> None:
    hub = logging.getLogger("huggingface_hub")
    before = hub.level
    hub.setLevel(logging.WARNING)
    with quiet_libraries():
        assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
    hub.setLevel(before)


def test_ctrl_c_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: str) -> None:
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("gircse.cli.similarity"), "load_model", stop)
    code, out, err = run(monkeypatch, capsys, "similarity", "a", "b", "--model", saved)
    assert (code, out, err) == (130, "", "error: stopped by Ctrl-C\n")


def test_a_file_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere/out.html")

    monkeypatch.setattr(import_module("gircse.cli.similarity"), "load_model", fail)
    code, _, err = run(monkeypatch, capsys, "similarity", "a", "b", "--model", saved)
    assert (code, err) == (1, "error: /somewhere/out.html: Permission denied\n")
