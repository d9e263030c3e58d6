"""How far one call raises the resident memory of its process. Linux only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def peak_rise(run: Callable[[], object]) -> float:
    """MiB between the resident memory before a call and its peak during it."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far: that of loading a model would hide others
    before = _kibibytes("VmRSS")
    run()
    return (_kibibytes("VmHWM") - before) / 1024


def _kibibytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
