"""What Python and the command line refuse, or tell of, instead of answering with something else."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from gircse.cli.common import printable, without_control
from gircse.errors import GircseError, UsageError
from gircse.groups.classify import Classifier
from gircse.groups.clusters import cluster
from gircse.model import GIRCSE
from tests.verbs import run


def test_an_empty_instruction_is_refused(
    model: GIRCSE, saved: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for encode in (model.encode_query, model.encode_document, model.encode_steps, model.explain):
        with pytest.raises(UsageError, match="instruction is empty"):
            encode("a cat", instruction=" ")
    code, out, err = run(monkeypatch, capsys, "similarity", "a", "b", "--model", saved, "--instruction", "")
    assert (code, out) == (2, "")
    assert "instruction is empty" in err


def test_cut_texts_are_told_of_once(saved: str, caplog: pytest.LogCaptureFixture) -> None:
    model = GIRCSE(saved, device="cpu")
    model.max_seq_length = 12
    with caplog.at_level(logging.WARNING, "gircse"):
        model.encode(["short", "x" * 12])
        assert not caplog.messages
        model.tokenize_texts(["x" * 13], max_length=12)
        assert not caplog.messages, "who names a length counts himself"
        model.encode(["short", "x" * 13, "y" * 30])
        model.encode_query("x" * 13, prompt="")
    assert caplog.messages == ["2 of 3 texts were cut to 12 tokens (max_seq_length)"]


@pytest.mark.parametrize("dim", [0, -1, 33])
def test_a_width_that_no_vector_has_is_refused(model: GIRCSE, dim: int) -> None:
    with pytest.raises(UsageError, match="truncate_dim must be between 1 and 32"):
        model.encode("a cat", truncate_dim=dim)
    with pytest.raises(UsageError, match="truncate_dim"), model.truncate_embeddings(dim):
        model.encode("a cat")


def test_classes_and_clusters_that_cannot_be(model: GIRCSE) -> None:
    with pytest.raises(UsageError, match="a list of names, not the one text 'joy'"):
        Classifier.from_labels(model, cast("list[str]", "joy"))
    vectors = np.eye(3, dtype=np.float32)
    for count in (0, 4):
        with pytest.raises(UsageError, match=f"3 vectors make no {count} clusters"):
            cluster(vectors, count)


def test_a_damaged_configuration_is_a_line(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "gircse_config.json").write_text('{"backbone": ')
    with pytest.raises(GircseError, match="model cannot be loaded"):
        GIRCSE(str(folder), device="cpu")
    code, _, err = run(monkeypatch, capsys, "similarity", "a", "b", "--model", folder)
    assert code == 1
    assert "cannot be loaded" in err


@pytest.mark.parametrize("verb", [["classify", "--labels", "cat,dog"], ["cluster", "-k", "2"]])
def test_the_length_that_is_read_changes_the_result(
    verb: list[str], saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("cats purr and sleep\ndogs bark and run\ncows\n")
    asked = [verb[0], source, *verb[1:], "--instruction", "x", "--model", saved, "--dtype", "float32", "--json"]
    results = []
    for options in ([], ["--max-length", "30"]):
        code, out, _ = run(monkeypatch, capsys, *asked, *options)
        assert code == 0
        results.append([row["score" if verb[0] == "classify" else "similarity"] for row in json.loads(out)["results"]])
    assert results[0] != results[1]
    code, out, err = run(monkeypatch, capsys, *asked, "--max-length", "63")
    assert (code, out) == (2, "")
    assert "--max-length (63) and --num-steps (3) exceed" in err.replace("\n", " ")


def test_texts_give_the_terminal_no_commands(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert without_control("a\x1b[31m\x07\x9b b\tc\nd") == "a\ufffd[31m\ufffd\ufffd b\tc\nd"
    assert printable("[bold]x\x1b") == r"\[bold]x" + "\ufffd"
    source = tmp_path / "texts.jsonl"
    rows = [{"id": f"{n}\x1b[2J", "text": f"cat \x1b]0;owned\x07 [b] {n}"} for n in range(3)]
    source.write_text("\n".join(map(json.dumps, rows)))
    for verb in (
        ["classify", source, "--labels", "a\x1b,b"],
        ["cluster", source, "-k", "2"],
        ["rerank", "cat", source],
    ):
        code, out, _ = run(monkeypatch, capsys, *verb, "--id-column", "id", "--model", saved, "--instruction", "x")
        assert code == 0
        assert "\x1b" not in out
        assert "\x07" not in out
        assert "[b]" in out
