"""The corpus pipeline: right vectors, and the same bytes however often it is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from gircse.embed.job import INT8_SCALE, EmbedSummary, Progress, embed_corpus, store_as
from gircse.embed.reader import CorpusReader
from gircse.embed.writer import ShardFolder, companions, parts_folder
from gircse.errors import GircseError, InputDataError, UsageError
from tests.hashing_model import DIM, HashingModel, settings

ROOT = Path(__file__).parent.parent


@pytest.fixture
def texts() -> list[str]:
    generator = random.Random(7)
    return ["".join(generator.choices("abcdefgh ", k=generator.randint(3, 60))) + "." for _ in range(50)]


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(texts) + "\n")
    return path


def run(source: Path, output: Path, *, model: HashingModel | None = None, **options: Any) -> EmbedSummary:
    flags = {key: options.pop(key) for key in ("resume", "overwrite", "on_progress") if key in options}
    reading = {key: options.pop(key) for key in ("skip_bad", "column", "id_column") if key in options}
    reader = CorpusReader(str(source), **reading)
    return embed_corpus(model or HashingModel(), reader, output, settings(**options), **flags)


def contents(output: Path) -> dict[str, str]:
    """Everything there is of an output, by name."""
    files = [path for path in [output, parts_folder(output), *companions(output).values()] if path.exists()]
    return {path.name: "a folder" if path.is_dir() else sha256(path.read_bytes()).hexdigest() for path in files}


def stop_after(shards: int) -> Callable[[Progress], None]:
    """Interrupt a run as Ctrl-C does, once so many shards of 16 rows are finished."""

    def on_progress(progress: Progress) -> None:
        if progress.texts > shards * 16 or progress.stage == "write":
            raise KeyboardInterrupt

    return on_progress


# Vectors and files


def test_every_text_gets_its_own_vector_in_input_order(corpus: Path, texts: list[str], tmp_path: Path) -> None:
    model = HashingModel()
    summary = run(corpus, tmp_path / "a.npy", prompt="p: ", max_length=40)
    vectors = np.load(tmp_path / "a.npy")
    alone = [
        model.encode_tokenized(model.tokenize_texts([text], "p: ", 40), num_steps=2)[0] for text in texts
    ]  # fmt: skip
    expected = np.stack(alone)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert vectors.dtype == np.float32
    assert (summary.texts, summary.dim, summary.resumed) == (50, DIM, 0)
    assert summary.truncated == sum(len(text) > 37 for text in texts) > 0
    assert summary.tokens == sum(min(40, len(text) + 3) for text in texts)


@pytest.mark.parametrize("padded", [True, False])
def test_batches_keep_to_the_budget_and_never_cross_a_shard(corpus: Path, tmp_path: Path, padded: bool) -> None:
    class Recording(HashingModel):
        pads_batches = padded

        def encode_tokenized(self, tokenized: Any, **options: Any) -> np.ndarray:
            batches.append([len(ids) + 2 for ids in tokenized.ids])
            return super().encode_tokenized(tokenized, **options)

    batches: list[list[int]] = []
    run(corpus, tmp_path / "a.npy", model=Recording(), batch_tokens=150, shard_size=20)
    assert all((max(batch) * len(batch) if padded else sum(batch)) <= 150 for batch in batches)
    assert padded == all(max(batch) * len(batch) <= 150 for batch in batches), "padding counts where there is some"
    ends = np.cumsum([len(batch) for batch in batches])
    assert {20, 40, 50} <= set(ends.tolist())


def test_a_finished_run_leaves_nothing_but_its_output(corpus: Path, tmp_path: Path) -> None:
    for name in ("a.npy", "b.parquet", "c.jsonl"):
        run(corpus, tmp_path / name)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"corpus.txt", "a.npy", "a.npy.meta.json", "b.parquet", "c.jsonl", "c.jsonl.meta.json"}


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_every_format_holds_every_precision(corpus: Path, tmp_path: Path, precision: Any) -> None:
    for name in ("a.npy", "a.parquet", "a.jsonl"):
        run(corpus, tmp_path / name, precision=precision)
    vectors = np.load(tmp_path / "a.npy")
    table = pq.read_table(tmp_path / "a.parquet")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert table.schema.field("embedding").type.list_size == vectors.shape[1]
    assert table["id"].to_pylist() == [line["id"] for line in lines] == list(range(1, 51))
    stored = np.stack(table["embedding"].to_numpy())
    assert stored.dtype == vectors.dtype
    np.testing.assert_array_equal(stored, vectors)
    np.testing.assert_array_equal(np.array([line["embedding"] for line in lines], dtype=vectors.dtype), vectors)

    run(corpus, tmp_path / "whole.npy")
    whole = np.load(tmp_path / "whole.npy")
    expected = {
        "float32": whole,
        "float16": whole.astype(np.float16),
        "int8": np.rint(whole * 127).astype(np.int8),
        "binary": (np.packbits(whole > 0, axis=1).astype(int) - 128).astype(np.int8),
    }[precision]
    assert vectors.dtype == expected.dtype
    np.testing.assert_array_equal(vectors, expected)


def test_storing_as() -> None:
    vectors = np.random.default_rng(0).standard_normal((40, 24), dtype=np.float32)
    unit = store_as(vectors, "float32")
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(store_as(vectors, "int8") * INT8_SCALE, unit, atol=INT8_SCALE / 2 + 1e-7)
    np.testing.assert_array_equal(store_as(np.zeros((1, 8), np.float32), "float32"), np.zeros((1, 8)))
    assert store_as(np.eye(4, dtype=np.float32) * -3, "int8").min() == -127
    np.testing.assert_array_equal(store_as(vectors[:1], "int8"), store_as(vectors, "int8")[:1])
    bits = np.unpackbits((store_as(vectors, "binary").astype(np.int16) + 128).astype(np.uint8), axis=1)
    np.testing.assert_array_equal(bits, vectors > 0)


@pytest.mark.slow
def test_binary_is_that_of_sentence_transformers() -> None:
    from sentence_transformers.util import quantize_embeddings

    vectors = np.random.default_rng(0).standard_normal((9, 20), dtype=np.float32)
    np.testing.assert_array_equal(store_as(vectors, "binary"), quantize_embeddings(vectors, precision="binary"))


def test_dim_cuts_and_then_normalises(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "a.npy")
    run(corpus, tmp_path / "b.npy", dim=5)
    cut = np.load(tmp_path / "a.npy")[:, :5]
    np.testing.assert_allclose(np.load(tmp_path / "b.npy"), cut / np.linalg.norm(cut, axis=1, keepdims=True), rtol=1e-5)
    with pytest.raises(UsageError, match="17 is more than the 16 dimensions"):
        run(corpus, tmp_path / "c.npy", dim=17)


def test_the_output_says_what_made_it(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "a.parquet", precision="int8", instruction="Find x", environment={"device": "cpu"})
    run(corpus, tmp_path / "a.npy", precision="int8", instruction="Find x", environment={"device": "cpu"})
    inside = json.loads((pq.read_schema(tmp_path / "a.parquet").metadata or {})[b"gircse"])
    assert json.loads((tmp_path / "a.npy.meta.json").read_text()) == inside
    expected = {"model": "hashing", "instruction": "Find x", "num_steps": 2, "rows": 50, "dimensions": DIM}
    assert {name: inside[name] for name in expected} == expected
    assert inside["device"] == "cpu"
    assert inside["int8_scale"] == INT8_SCALE
    assert str(tmp_path) not in json.dumps(inside)


def test_ids_lie_beside_a_npy_where_positions_do_not_tell(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "one", "id": "x"}\n{"text": ""}\n{"text": "three", "id": 3}\n')
    run(source, tmp_path / "a.npy", id_column="id", skip_bad=True)
    assert (tmp_path / "a.npy.ids.txt").read_text() == "x\n3\n"
    summary = run(source, tmp_path / "b.npy", skip_bad=True)
    assert (tmp_path / "b.npy.ids.txt").read_text() == "1\n3\n"
    assert (summary.skipped, summary.skipped_by_kind) == (1, {"empty text": 1})
    source.write_text('{"text": "one"}\n')
    run(source, tmp_path / "b.npy", overwrite=True)
    assert not (tmp_path / "b.npy.ids.txt").exists()


def test_an_infinite_vector_is_an_error_that_names_its_line(corpus: Path, texts: list[str], tmp_path: Path) -> None:
    class Broken(HashingModel):
        def encode_tokenized(self, tokenized: Any, **options: Any) -> np.ndarray:
            vectors = super().encode_tokenized(tokenized, **options)
            vectors[[ids == [ord(c) for c in texts[20]] for ids in tokenized.ids], 3] = np.inf
            return vectors

    with pytest.raises(GircseError, match=r"corpus\.txt:21: .*--dtype"):
        run(corpus, tmp_path / "a.npy", model=Broken())


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    class Forgetful(HashingModel):
        def encode_tokenized(self, tokenized: Any, **options: Any) -> np.ndarray:
            self.encoded.clear()
            return super().encode_tokenized(tokenized, **options)

    def peak(count: int) -> int:
        source = tmp_path / f"{count}.txt"
        source.write_text("".join(f"this is text number {number:06d}\n" for number in range(count)))
        tracemalloc.start()
        try:
            run(source, tmp_path / f"{count}.npy", model=Forgetful(), shard_size=128, batch_tokens=4096)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(256)  # what is imported or cached once
    small = peak(512)
    assert peak(4096) < 1.25 * small


# Nothing is overwritten, nothing is lost


def test_an_existing_file_is_not_touched_unasked(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.npy"
    output.write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        run(corpus, output)
    with pytest.raises(UsageError, match="not made by gircse embed"):
        run(corpus, output, resume=True)
    assert output.read_text() == "mine"
    run(corpus, output, overwrite=True)
    assert len(np.load(output)) == 50

    (tmp_path / "b.npy.meta.json").write_text("mine")
    with pytest.raises(UsageError, match=r"b\.npy\.meta\.json exists"):
        run(corpus, tmp_path / "b.npy")
    parts_folder(tmp_path / "c.npy").mkdir()
    (parts_folder(tmp_path / "c.npy") / "part-00000.parquet").write_text("mine")
    with pytest.raises(UsageError, match="something else"):
        run(corpus, tmp_path / "c.npy", overwrite=True)


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "one"}\n')
    with pytest.raises(UsageError, match="the input itself"):
        run(source, source, overwrite=True)
    with pytest.raises(UsageError, match="give one of them"):
        run(source, tmp_path / "b.npy", overwrite=True, resume=True)
    with pytest.raises(UsageError, match=r"\.parquet, \.npy, \.jsonl"):
        run(source, tmp_path / "b.csv")


def test_overwriting_keeps_the_old_output_until_the_new_one_is_whole(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.npy"
    run(corpus, output)
    before = output.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(corpus, output, overwrite=True, num_steps=3, on_progress=stop_after(1))
    assert output.read_bytes() == before
    with pytest.raises(UsageError, match="unfinished work"):
        run(corpus, output, num_steps=3)
    run(corpus, output, resume=True, num_steps=3)
    assert output.read_bytes() != before


def test_resuming_embeds_only_what_is_missing(corpus: Path, texts: list[str], tmp_path: Path) -> None:
    run(corpus, tmp_path / "whole.npy")
    output = tmp_path / "a.npy"
    with pytest.raises(KeyboardInterrupt):
        run(corpus, output, on_progress=stop_after(2))
    model = HashingModel()
    summary = run(corpus, output, model=model, resume=True)
    assert summary.resumed == 32
    assert len(model.encoded) == 18
    assert summary.tokens == sum(map(len, texts))
    assert output.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_resuming_a_complete_output_says_so_and_does_nothing(corpus: Path, tmp_path: Path) -> None:
    for name in ("a.npy", "a.parquet"):
        first = run(corpus, output := tmp_path / name, resume=True)
        assert not first.already_complete
        before, model = contents(output), HashingModel()
        again = run(corpus, output, model=model, resume=True)
        assert again.already_complete
        assert (again.texts, again.tokens, again.resumed) == (50, first.tokens, 50)
        assert model.encoded == []
        with pytest.raises(UsageError, match="num_steps was 2, is 3"):
            run(corpus, output, resume=True, num_steps=3)
        assert contents(output) == before
    corpus.write_text(corpus.read_text() + "more\n")
    with pytest.raises(InputDataError, match="the input has changed"):
        run(corpus, output, resume=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_steps": 3}, "num_steps was 2, is 3"),
        ({"dim": 4}, "dim was null, is 4"),
        ({"model_checksum": "1"}, 'model_checksum was "0", is "1"'),
        ({"prompt": "Instruct", "instruction": "I"}, 'instruction was null, is "I"'),
        ({"precision": "int8"}, 'precision was "float32", is "int8"'),
        ({"batch_tokens": 999}, "batch_tokens was 400, is 999"),
        ({"shard_size": 8}, "shard_size was 16, is 8"),
        ({"max_length": 8}, "max_length was null, is 8"),
        ({"environment": {"threads": 3}}, "threads was null, is 3"),
    ],
)
def test_other_settings_are_refused_by_name(corpus: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "a.npy", on_progress=stop_after(1))
    with pytest.raises(UsageError) as caught:
        run(corpus, tmp_path / "a.npy", resume=True, **change)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_changed_input_is_refused(corpus: Path, texts: list[str], tmp_path: Path) -> None:
    output = tmp_path / "a.npy"
    with pytest.raises(KeyboardInterrupt):
        run(corpus, output, on_progress=stop_after(2))
    status = corpus.stat()
    changed = [*texts[:20], texts[20][::-1], *texts[21:]]
    corpus.write_text("\n".join(changed) + "\n")
    os.utime(corpus, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and time tell nothing; the rows do
    with pytest.raises(InputDataError, match="the input has changed") as caught:
        run(corpus, output, resume=True)
    assert caught.value.line == 17
    corpus.write_text("\n".join(texts[:16]) + "\n")
    with pytest.raises(InputDataError, match="ends before"):
        run(corpus, output, resume=True)
    (tmp_path / "other.txt").write_text("x\n")
    with pytest.raises(UsageError, match=r"input was .*corpus\.txt.* is .*other\.txt"):
        run(tmp_path / "other.txt", output, resume=True)


def test_a_bad_row_loses_nothing(corpus: Path, texts: list[str], tmp_path: Path) -> None:
    run(corpus, tmp_path / "whole.parquet")
    corpus.write_text("\n".join([*texts[:40], "", *texts[41:]]) + "\n")
    output = tmp_path / "a.parquet"
    with pytest.raises(InputDataError, match="kept: afterwards go on with --resume") as caught:
        run(corpus, output)
    assert caught.value.line == 41
    corpus.write_text("\n".join(texts) + "\n")
    assert run(corpus, output, resume=True).resumed == 32
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_skipping_can_be_decided_after_the_first_bad_row(corpus: Path, texts: list[str], tmp_path: Path) -> None:
    corpus.write_text("\n".join([*texts[:40], "", *texts[41:]]) + "\n")
    run(corpus, tmp_path / "whole.parquet", skip_bad=True)
    with pytest.raises(InputDataError):
        run(corpus, tmp_path / "a.parquet")
    summary = run(corpus, tmp_path / "a.parquet", skip_bad=True, resume=True)
    assert (summary.resumed, summary.texts, summary.skipped) == (32, 49, 1)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_an_error_before_the_first_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n")
    with pytest.raises(InputDataError, match="empty"):
        run(tmp_path / "a.txt", tmp_path / "a.npy")
    (tmp_path / "b.txt").write_text("\n\n")
    with pytest.raises(InputDataError, match=r"no texts to embed .2 bad rows: empty text × 2"):
        run(tmp_path / "b.txt", tmp_path / "a.npy", skip_bad=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_a_damaged_shard_is_made_again(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "whole.npy")
    output = tmp_path / "a.npy"
    with pytest.raises(KeyboardInterrupt):
        run(corpus, output, on_progress=stop_after(2))
    part = parts_folder(output) / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:100])
    assert run(corpus, output, resume=True).resumed == 16
    assert output.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_two_processes_do_not_write_one_output(corpus: Path, tmp_path: Path) -> None:
    with ShardFolder(tmp_path / "a.npy", {}), pytest.raises(GircseError, match="another process"):
        run(corpus, tmp_path / "a.npy", resume=True)


def test_a_replayed_stream_can_be_resumed(texts: list[str], tmp_path: Path) -> None:
    import io

    def stream(lines: list[str], **options: Any) -> EmbedSummary:
        reader = CorpusReader("-", stream=io.BytesIO("\n".join(lines).encode()))
        return embed_corpus(HashingModel(), reader, tmp_path / "a.npy", settings(), **options)

    with pytest.raises(KeyboardInterrupt):
        stream(texts, on_progress=stop_after(1))
    with pytest.raises(InputDataError, match="standard input:1: the input has changed"):
        stream(texts[1:], resume=True)
    assert stream(texts, resume=True).resumed == 16


def test_progress_counts_up_and_tells_resumed_texts(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "a.npy", on_progress=stop_after(1))
    seen: list[Progress] = []
    run(corpus, tmp_path / "a.npy", resume=True, on_progress=seen.append)
    embedding = [progress.texts for progress in seen if progress.stage == "embed"]
    assert embedding == sorted(embedding)
    assert embedding[0] == 16
    assert embedding[-1] == 50
    assert [progress.texts for progress in seen if progress.stage == "write"] == [16, 32, 48, 50]
    assert {progress.resumed for progress in seen} == {16}


# Killed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, to be quick")
@pytest.mark.parametrize(("name", "overwrite"), [("a.npy", False), ("a.npy", True), ("a.parquet", False)])
def test_killed_at_every_file_operation(tmp_path: Path, texts: list[str], name: str, overwrite: bool) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"id": f"k{i}", "text": text}) + "\n" for i, text in enumerate(texts[:40])))
    (tmp_path / "whole").mkdir()
    run(source, tmp_path / "whole" / name, id_column="id")
    expected = contents(tmp_path / "whole" / name)

    for count in range(1, 1000):
        output = tmp_path / str(count) / name
        output.parent.mkdir()
        if overwrite:
            run(source, output, num_steps=9)
        old = output.read_bytes() if overwrite else b""
        if not _killed_at_operation(count, source, output, overwrite=overwrite):
            assert count > 20, "the operations of at least three shards and a merge were seen"
            assert contents(output) == expected
            return
        if overwrite and output.read_bytes() == old and not (parts_folder(output) / "job.json").exists():
            run(source, output, id_column="id", overwrite=True)  # killed before anything was done
        else:
            run(source, output, id_column="id", resume=True)
        assert contents(output) == expected, f"killed at operation {count}"
    pytest.fail("it never ended")


def _killed_at_operation(count: int, source: Path, output: Path, *, overwrite: bool) -> bool:
    """Embed in a child that kills itself just before its `count`-th operation on files of the output."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return True
        assert status == 0
        return False
    code = 1
    try:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or event == "open"
            if changes and str(output.parent) in str(arguments[0]):
                seen += 1
                if seen == count:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        run(source, output, id_column="id", overwrite=overwrite)
        code = 0
    finally:
        os._exit(code)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_at_random_moments(corpus: Path, texts: list[str], tmp_path: Path) -> None:
    corpus.write_text("\n".join(texts * 8) + "\n")
    run(corpus, tmp_path / "whole.parquet")
    output, generator, kills = tmp_path / "a.parquet", random.Random(3), 0
    command = [sys.executable, "-m", "tests.hashing_model", str(corpus), str(output), "0.01"]
    while not (output.exists() and not parts_folder(output).exists()):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(generator.randint(1, 30)):
                process.stdout.readline()  # a batch; nothing where it has ended
            try:
                assert process.wait(generator.uniform(0, 0.02)) == 0
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
        assert kills < 60, "it makes no headway"
    assert kills >= 3
    assert contents(output)["a.parquet"] == contents(tmp_path / "whole.parquet")["whole.parquet"]
