"""`gircse embed`: options reach the work, results go to standard output, everything else to standard error."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import typer
from typer.testing import CliRunner

from gircse.embed.writer import parts_folder
from gircse.errors import GircseError, InputDataError, UsageError
from tests.hashing_model import DIM, HashingModel

command = import_module("gircse.cli.embed")  # the package's attribute of that name is the function
Invoke = Callable[..., Any]


class CommandModel(HashingModel):
    """What the command reads of a model besides what the pipeline does."""

    num_steps = 2
    max_seq_length = 40
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(self.weights.weight)
        torch.nn.init.zeros_(self.weights.bias)
        self.encoder = self
        self.reference, self.decoder = SimpleNamespace(name="tiny"), SimpleNamespace(max_positions=64)
        self.packed_weights, self.weights_dtype = SimpleNamespace(enabled=True), "float32"

    def get_config_dict(self) -> dict[str, Any]:
        return {"pooling": "mean"}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.weights.state_dict()

    def parameters(self) -> Any:
        return self.weights.parameters()

    def format_instruction(self, instruction: str) -> str:
        return f"Instruct: {instruction}\nQuery:"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> CommandModel:
    model = CommandModel()
    monkeypatch.setattr(command, "load_model", lambda name, **options: model)
    return model


@pytest.fixture
def invoke() -> Invoke:
    app = typer.Typer(rich_markup_mode="rich")
    app.command("embed")(command.embed)
    return lambda *arguments, **options: CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"text number {number} {'x' * number}\n" for number in range(30)))
    return path


@pytest.mark.usefixtures("model")
def test_the_summary_goes_to_stderr_and_as_json_to_stdout(invoke: Invoke, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.parquet"
    quiet = invoke(corpus, "-o", output)
    assert (quiet.exit_code, quiet.stdout) == (0, "")
    assert "30 vectors of 16 dimensions, float32" in quiet.stderr
    cut = sum(len(text) > 40 for text in corpus.read_text().splitlines())
    assert f"texts cut to 40 tokens: {cut}; --max-length" in quiet.stderr

    loud = invoke(corpus, "-o", output, "--json", "--overwrite", "--max-length", "20")
    summary = json.loads(loud.stdout)
    long = sum(len(text) > 20 for text in corpus.read_text().splitlines())
    expected = {"output": str(output), "texts": 30, "dim": DIM, "skipped": 0, "truncated": long, "resumed": 0}
    assert {name: summary[name] for name in expected} == expected
    assert summary["tokens_per_second"] > 0
    assert summary["seconds"] > 0


def test_every_option_reaches_the_vectors(invoke: Invoke, model: CommandModel, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.parquet"
    options = (
        "--instruction Find --num-steps 0 --dim 8 --precision int8 --max-length 50 --batch-tokens 77 --shard-size 9"
    )
    assert invoke(corpus, "-o", output, *options.split()).exit_code == 0
    metadata = json.loads((pq.read_schema(output).metadata or {})[b"gircse"])
    expected = {
        "model": "default", "instruction": "Find", "prompt": "Instruct: Find\nQuery:", "num_steps": 0, "dim": 8,
        "precision": "int8", "max_length": 50, "batch_tokens": 77, "shard_size": 9, "dtype": "float32",
        "backbone": "tiny",
    }  # fmt: skip
    assert {name: metadata[name] for name in expected} == expected
    assert pq.read_metadata(output).num_row_groups == 4
    prompt = [ord(character) for character in "Instruct: Find\nQuery:"]
    assert all(ids[: len(prompt)] == prompt for ids in model.encoded)


@pytest.mark.usefixtures("model")
def test_more_than_the_backbone_s_positions_is_refused_before_the_first_text(
    invoke: Invoke, corpus: Path, tmp_path: Path
) -> None:
    for options in (["--max-length", "63"], ["--num-steps", "25"]):
        result = invoke(corpus, "-o", tmp_path / "a.npy", *options)
        assert isinstance(result.exception, UsageError)
        assert "exceed the backbone's 64 positions together" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]
    assert invoke(corpus, "-o", tmp_path / "a.npy", "--max-length", "62").exit_code == 0


def test_columns_and_streams(invoke: Invoke, model: CommandModel, tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    source.write_text('key,body\nk1,"one, two"\nk2,three\n')
    assert invoke(source, "-o", tmp_path / "a.npy", "--column", "body", "--id-column", "key").exit_code == 0
    assert (tmp_path / "a.npy.ids.txt").read_text() == "k1\nk2\n"
    lines = '{"text": "one"}\n{"text": 2}\n{"text": "three"}\n'
    result = invoke("-", "-o", tmp_path / "b.npy", "--input-format", "jsonl", "--skip-bad", "--json", input=lines)
    assert json.loads(result.stdout)["skipped_by_kind"] == {"not a string": 1}
    assert "bad rows left out: 1; not a string × 1 (line 2)" in result.stderr
    assert len(np.load(tmp_path / "b.npy")) == 2
    assert invoke("-", "-o", tmp_path / "c.npy", input="plain\ntext\n").exit_code == 0
    assert [len(ids) for ids in model.encoded[-2:]] == [5, 4]


def test_errors_come_before_the_model_and_go_out_as_they_are(
    invoke: Invoke, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_model", lambda *arguments, **options: pytest.fail("the model was loaded"))

    def error(*arguments: Any) -> BaseException | None:
        return invoke(*arguments).exception

    output = tmp_path / "a.npy"
    assert isinstance(error(tmp_path / "none.txt", "-o", output), InputDataError)
    assert isinstance(error(corpus, "-o", tmp_path / "a.doc"), UsageError)
    assert isinstance(error(corpus, "-o", output, "--prompt", "a", "--instruction", "b"), UsageError)
    assert isinstance(error(corpus, "-o", output, "--resume", "--overwrite"), UsageError)
    (tmp_path / "a.csv").write_text("body\nx\n")
    assert "no column 'text'" in str(error(tmp_path / "a.csv", "-o", output))
    output.write_text("mine")
    assert "--overwrite" in str(error(corpus, "-o", output))
    assert invoke(corpus, "-o", output, "--dim", "0").exit_code == 2
    assert invoke(corpus, "-o", output, "--precision", "int4").exit_code == 2


@pytest.mark.usefixtures("model")
def test_interrupted_and_resumed(invoke: Invoke, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, whole = tmp_path / "a.parquet", tmp_path / "whole.parquet"
    assert invoke(corpus, "-o", whole, "--shard-size", "8").exit_code == 0

    def interrupt(display: Any, progress: Any) -> None:
        if progress.texts > 16:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command._Display, "update", interrupt)
        stopped = invoke(corpus, "-o", output, "--shard-size", "8")
    assert stopped.exit_code == 130
    assert f"kept in {parts_folder(output)}: go on with --resume" in stopped.stderr

    assert "--resume" in str(invoke(corpus, "-o", output, "--shard-size", "8").exception)
    assert "num_steps was 2, is 1" in str(invoke(corpus, "-o", output, "--num-steps", "1", "--resume").exception)
    resumed = invoke(corpus, "-o", output, "--shard-size", "8", "--resume")
    assert resumed.exit_code == 0
    assert "16 of them in earlier runs" in resumed.stderr
    assert output.read_bytes() == whole.read_bytes()
    again = invoke(corpus, "-o", output, "--shard-size", "8", "--resume", "--json")
    assert "complete already" in again.stderr
    assert json.loads(again.stdout)["already_complete"]


def test_other_weights_under_the_same_name_are_noticed(
    invoke: Invoke, model: CommandModel, corpus: Path, tmp_path: Path
) -> None:
    assert invoke(corpus, "-o", tmp_path / "a.npy").exit_code == 0
    torch.nn.init.constant_(model.weights.bias, 0.5)
    assert "model_checksum was" in str(invoke(corpus, "-o", tmp_path / "a.npy", "--resume").exception)


def test_a_display_shows_texts_speed_and_the_total(corpus: Path) -> None:
    from rich.console import Console

    from gircse.embed.job import Progress

    console = Console(force_terminal=True, width=120, record=True, stderr=True)
    with command._Display(console, 200) as display:
        display.update(Progress("embed", 100, 100, 0, 0.0, 0))
        display.update(Progress("embed", 150, 100, 5000, 2.0, 3))
        assert display.bar.tasks[0].completed == 153
    assert "153/200 texts 2,500 tokens/s" in console.export_text()


def test_help_reads_like_a_manual(invoke: Invoke) -> None:
    text = invoke("--help", env={"COLUMNS": "120", "TERM": "dumb"}).stdout
    for words in ("Examples", "gircse embed corpus.txt -o corpus.parquet --resume", "L2-normalised", "--skip-bad"):
        assert words in text


@pytest.mark.slow
def test_vectors_are_those_of_the_library(
    invoke: Invoke, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gircse.checkpoint import BackboneReference, RefinementConfig
    from gircse.encoder import GenerativeEncoder
    from gircse.model import GIRCSE
    from tests.tiny import tiny_model, tiny_tokenizer

    config = RefinementConfig(num_steps=3, max_seq_length=45)
    encoder = GenerativeEncoder(tiny_model(), tiny_tokenizer(), BackboneReference("tiny", "0"), config)
    model = GIRCSE(modules=[encoder], device="cpu")
    monkeypatch.setattr(command, "load_model", lambda name, **options: model)
    result = invoke(corpus, "-o", tmp_path / "a.npy", "--instruction", "Find", "--shard-size", "7", "--json")
    assert result.exit_code == 0, result.exception
    texts = corpus.read_text().splitlines()
    expected = model.encode(texts, prompt=model.format_instruction("Find"), normalize_embeddings=True)
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected, atol=1e-5)
    assert json.loads(result.stdout)["truncated"] > 0
    with pytest.raises(GircseError, match="instruction alone"):
        raise invoke(corpus, "-o", tmp_path / "b.npy", "--instruction", "Find" * 20).exception
