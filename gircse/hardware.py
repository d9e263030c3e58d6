"""What a device is fast at, and the memory that is left. Knows processors and containers; knows nothing of models."""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import TypeVar

import psutil
import torch

T = TypeVar("T")

CONTAINER_MEMORY = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Files in which Linux tells what a container may take and has taken: control groups of version 2, then 1."""


def fastest_dtype(device: str | torch.device) -> tuple[torch.dtype, str]:
    """The dtype of weights that a device computes fastest with, and why.

    bfloat16 only where the hardware multiplies it: elsewhere it is emulated and slower than float32. Never float16,
    whose range the hidden states of some decoders exceed.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps`` ...

    Returns:
        The dtype, and the reason in a few words.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU multiplies bfloat16"
        return torch.float32, "this GPU does not multiply bfloat16"
    if kind == "cpu":
        for name, supported in (
            ("AMX", torch.cpu._is_amx_tile_supported),
            ("AVX512-BF16", torch.cpu._is_avx512_bf16_supported),
        ):
            if supported() and torch.backends.cpu.get_cpu_capability() == "AVX512":  # ATEN_CPU_CAPABILITY may forbid it
                return torch.bfloat16, f"this processor has {name}"
        return torch.float32, "this processor has neither AMX nor AVX512-BF16"
    return torch.float32, f"nothing is known of {kind}"


def default_batch_tokens(device: str | torch.device) -> int:
    """Padded tokens of a batch where a call names no budget: so many that the hardware does not wait for rows."""
    return 8192 if torch.device(device).type == "cpu" else 65_536


def prompt_pass_tokens(device: str | torch.device) -> int:
    """Padded tokens of one prompt pass. A batch above it is run in groups of similar length, so padding costs little.

    A GPU launches a pass in the time that it computes thousands of tokens; AMX multiplies more rows at the same pace.
    """
    if torch.device(device).type != "cpu":
        return 49_152
    return 4096 if torch.cpu._is_amx_tile_supported() else 1024


@cache
def is_intel() -> bool:
    """Whether the processor is Intel's own, on which alone MKL takes its fastest paths."""
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        described = platform.processor()
    return "GenuineIntel" in described or "Intel64" in described


def in_own_thread(function: Callable[[], T]) -> T:
    """Call a function in a thread that ends with it, and give what it returns or raises.

    Every thread that computes keeps helpers for as long as it lives. Where those of two threads are more than the
    processors, OpenMP lets all of them sleep at every turn: a short query of another thread takes 1.8 times as long.
    """
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future.result()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on any device: the CPU's is a plain RuntimeError."""
    told = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in told)


def free_memory(device: str | torch.device = "cpu") -> int:
    """Bytes that this process may still take: of a GPU, or the machine's, or its container's where those are fewer."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    for limit, taken in CONTAINER_MEMORY:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(taken).read_text()))
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
    return max(0, free)


def return_freed_memory() -> None:
    """Give back to the system what was freed: glibc keeps hundreds of megabytes of a model's replaced weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if platform.system() == "Linux" else None
    if trim is not None:
        trim(0)
