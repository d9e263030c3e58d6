"""How far one call raises the memory of its process: what is allocated on a GPU, else what is resident (Linux only)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch


def peak_rise(run: Callable[[], object], device: str = "cpu") -> float:
    """MiB between the memory before a call and its peak during it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far: that of loading a model would hide others
    before = _kibibytes("VmRSS")
    run()
    return (_kibibytes("VmHWM") - before) / 1024


def _kibibytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
