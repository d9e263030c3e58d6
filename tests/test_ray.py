"""`gircse embed --ray` on a local Ray: the same vectors as one process makes, also when a worker is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gircse.distributed import SUMMARY, Corpus, ShardReader, embed_on_ray, part
from gircse.embed.job import EmbedSummary, embed_corpus
from gircse.embed.reader import CorpusReader
from gircse.errors import GircseError, InputDataError, UsageError
from tests.hashing_model import HashingModel, settings
from tests.local_ray import start_ray

pytestmark = [pytest.mark.slow, pytest.mark.ray]

ROWS = 150  # 10 shards of 16 rows, the last of 6


def write_corpus(path: Path, rows: int = ROWS) -> Path:
    documents = [{"key": f"d{n}", "text": f"text number {n} " + "é" * (n % 7)} for n in range(rows)]
    path.write_text("\n".join(json.dumps(document, ensure_ascii=False) for document in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def single_process(source: Path, output: Path, **options: Any) -> pa.Table:
    embed_corpus(HashingModel(), CorpusReader(str(source), **options), output, settings())
    return pq.read_table(output)


def assert_same(folder: Path, expected: pa.Table) -> None:
    tables = [pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))]
    table = pa.concat_tables([made.replace_schema_metadata() for made in tables])
    assert table.equals(expected.replace_schema_metadata()), "ids and vectors are the same, byte for byte, in order"
    assert {path.name for path in folder.iterdir()} == {SUMMARY, *(f"part-{n:05d}.parquet" for n in range(len(tables)))}


# Without Ray: what a shard is


@pytest.mark.parametrize("form", ["jsonl", "txt", "parquet"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_shards_hold_every_row_once(form: Any, with_ids: bool, corpus: Path, tmp_path: Path) -> None:
    source = tmp_path / f"corpus.{form}"
    documents = [json.loads(line) for line in corpus.read_text("utf-8").splitlines()]
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(documents), source, row_group_size=37)
    elif form == "txt":
        source.write_text("".join(document["text"] + "\n" for document in documents), encoding="utf-8")
    else:
        source.write_text(corpus.read_text("utf-8") + "\n", encoding="utf-8")
    id_column = "key" if with_ids and form != "txt" else None
    whole = Corpus(f"file://{source}", form, id_column=id_column)
    shards = whole.plan(16)
    assert [shard.index for shard in shards] == list(range(10))
    rows = [row for shard in shards for row in ShardReader(whole, shard)]
    assert rows == list(CorpusReader(str(source), id_column=id_column))


def test_blank_lines_at_the_end_make_no_shard(tmp_path: Path) -> None:
    source = tmp_path / "corpus.jsonl"
    source.write_text('{"text": "a"}\n' * 32 + "\n \n")
    whole = Corpus(str(source), "jsonl")
    shards = whole.plan(16)
    assert [len(list(ShardReader(whole, shard))) for shard in shards] == [16, 16]
    source.write_text('{"text": "a"}\n' * 16 + "\n" + '{"text": "a"}\n' * 16)
    with pytest.raises(InputDataError, match=r"corpus\.jsonl:17: .*blank"):
        [list(ShardReader(whole, shard)) for shard in whole.plan(16)]
    assert [shard.first for shard in Corpus(str(source), "txt").plan(16)] == [0, 16, 32], "of text they are rows"


def test_a_bad_row_is_named_by_its_place_in_the_corpus(tmp_path: Path) -> None:
    source = tmp_path / "bad.jsonl"
    lines = ['{"text": "fine"}'] * 40
    lines[33] = '{"text": " "}'
    source.write_text("\n".join(lines), encoding="utf-8")
    whole = Corpus(str(source), "jsonl")
    with pytest.raises(InputDataError, match=r"bad\.jsonl:34: the text is empty"):
        [list(ShardReader(whole, shard)) for shard in whole.plan(16)]
    lenient = replace(whole, skip_bad=True)
    assert sum(len(list(ShardReader(lenient, shard))) for shard in lenient.plan(16)) == 39


def test_binary_columns_are_text_as_in_one_process(tmp_path: Path) -> None:
    source = tmp_path / "binary.parquet"
    texts = [f"téxt {n}".encode() for n in range(20)]
    keys = [f"d{n}".encode() for n in range(20)]
    pq.write_table(pa.table({"key": pa.array(keys, pa.binary()), "text": pa.array(texts, pa.binary())}), source)
    whole = Corpus(str(source), "parquet", id_column="key")
    rows = [row for shard in whole.plan(16) for row in ShardReader(whole, shard)]
    assert rows == list(CorpusReader(str(source), id_column="key"))
    assert (rows[3].id, rows[3].text) == ("d3", "téxt 3")
    texts[17] = "téxt 17".encode("latin-1")
    pq.write_table(pa.table({"text": pa.array(texts, pa.binary())}), source)
    lenient = Corpus(str(source), "parquet", skip_bad=True)
    readers = [ShardReader(lenient, shard) for shard in lenient.plan(16)]
    assert [row.id for reader in readers for row in reader] == [n for n in range(1, 21) if n != 18]
    assert readers[1].bad.counts == {"not UTF-8": 1}


# On Ray


class SlowModel:
    """Makes a model that says who it is before it works slowly."""

    def __init__(self, folder: Path, pause: float = 0.0) -> None:
        self.folder, self.pause = folder, pause

    def __call__(self) -> HashingModel:
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"{os.getpid()}.pid").touch()
        return HashingModel(self.pause)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = start_ray()
    yield ray
    ray.shutdown()


def on_ray(source: Path, folder: Path, load: Any, **options: Any) -> EmbedSummary:
    corpus = Corpus(str(source), "jsonl", id_column=options.pop("id_column", None))
    made = options.pop("settings", settings())
    return embed_on_ray(load, corpus, folder, made, address="local", workers=2, **options)


def test_a_killed_worker_loses_nothing_and_doubles_nothing(ray: Any, corpus: Path, tmp_path: Path) -> None:
    expected = single_process(corpus, tmp_path / "single.parquet")
    folder, pids = tmp_path / "vectors", tmp_path / "pids"
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            running = sorted(pids.glob("*.pid"))
            if len(running) == 2 and len(list(folder.glob("part-*.parquet"))) >= 2:
                killed.append(int(running[0].stem))
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.05)

    killer = threading.Thread(target=kill_one)
    killer.start()
    told: list[int] = []
    summary = on_ray(corpus, folder, SlowModel(pids, 0.5), on_progress=lambda progress: told.append(progress.texts))
    killer.join()
    assert killed, "a worker was killed while parts were missing"
    assert len(list(pids.glob("*.pid"))) == 3, "another took its place"
    assert_same(folder, expected)
    assert summary.texts == ROWS == json.loads((folder / SUMMARY).read_text())["rows"]
    assert told[-1] == ROWS
    assert told == sorted(told)


def test_a_killed_driver_is_taken_up_again(ray: Any, corpus: Path, tmp_path: Path) -> None:
    expected = single_process(corpus, tmp_path / "single.parquet")
    folder, pids = tmp_path / "vectors", tmp_path / "pids"
    root = Path(__file__).parents[1]
    driver = subprocess.Popen([sys.executable, "-m", "tests.ray_driver", str(corpus), str(folder), str(pids)], cwd=root)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("part-*.parquet"))) < 2:
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < deadline, "the driver made no parts"
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    assert not (folder / SUMMARY).exists()
    summary = on_ray(corpus, folder, SlowModel(pids), resume=True)
    assert summary.texts == ROWS
    assert 0 < summary.resumed <= ROWS - 16
    assert_same(folder, expected)


def test_a_run_continues_where_another_stopped(ray: Any, tmp_path: Path) -> None:
    source, folder = write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "vectors"
    expected = single_process(source, tmp_path / "single.parquet", id_column="key")
    load = SlowModel(tmp_path / "pids")
    assert on_ray(source, folder, load, id_column="key").resumed == 0
    kept = part(folder, 0).stat().st_mtime_ns
    part(folder, 4).unlink()
    (folder / SUMMARY).unlink()
    with pytest.raises(UsageError, match="--resume"):
        on_ray(source, folder, load, id_column="key")
    summary = on_ray(source, folder, load, id_column="key", resume=True)
    assert (summary.texts, summary.resumed) == (ROWS, ROWS - 16)
    assert part(folder, 0).stat().st_mtime_ns == kept, "a finished part is not made again"
    assert_same(folder, expected)
    assert on_ray(source, folder, load, id_column="key", resume=True).already_complete
    with pytest.raises(UsageError, match="num_steps was 2, is 3"):
        on_ray(source, folder, load, id_column="key", resume=True, settings=settings(num_steps=3))
    source.write_text(source.read_text("utf-8").replace("number 20 ", "number 21 "), encoding="utf-8")
    with pytest.raises(UsageError, match=r"part-00001.*shard_sha256"):
        on_ray(source, folder, load, id_column="key", resume=True)


def test_bad_rows_and_repeated_ids_stop_the_run_in_one_line(ray: Any, tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus.jsonl", 40)
    lines = source.read_text("utf-8").splitlines()
    source.write_text("\n".join([*lines, '{"key": "d3", "text": "again"}']), encoding="utf-8")
    with pytest.raises(InputDataError, match="'d3' occurs in two shards"):
        on_ray(source, tmp_path / "a", SlowModel(tmp_path / "pids"), id_column="key")
    assert not (tmp_path / "a" / SUMMARY).exists()
    source.write_text("\n".join([*lines, '{"key": "d99"}']), encoding="utf-8")
    with pytest.raises(GircseError, match=r"corpus\.jsonl:41: no key 'text'.*--resume"):
        on_ray(source, tmp_path / "b", SlowModel(tmp_path / "pids"), id_column="key")


def test_the_command_embeds_with_a_real_loop(
    ray: Any, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import typer
    from typer.testing import CliRunner

    from gircse.cli.embed import embed
    from gircse.model import GIRCSE

    GIRCSE.from_backbone(str(backbone), num_steps=3, max_seq_length=48, device="cpu").save_pretrained(
        str(tmp_path / "model")
    )
    source = write_corpus(tmp_path / "corpus.jsonl", 20)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("embed")(embed)
    monkeypatch.chdir(tmp_path)  # where the workers are not: relative paths are the command's
    common = [source.name, "--model", "model", "--shard-size", "8", "--num-steps", "2", "--json"]
    one = CliRunner().invoke(
        app, [*common, "-o", str(tmp_path / "one.parquet"), "--device", "cpu"], catch_exceptions=False
    )
    many = CliRunner().invoke(
        app, [*common, "-o", "many", "--ray", "local", "--ray-workers", "2"], catch_exceptions=False
    )
    assert json.loads(many.stdout)["tokens"] == json.loads(one.stdout)["tokens"]
    expected = pq.read_table(tmp_path / "one.parquet")
    made = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "many").glob("*.parquet"))])
    assert made["id"].to_pylist() == expected["id"].to_pylist()
    vectors = [np.array(table["embedding"].to_pylist()) for table in (made, expected)]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    with pytest.raises(UsageError, match="--ray only"):
        CliRunner().invoke(app, [*common, "-o", "x.parquet", "--ray-workers", "2"], catch_exceptions=False)
