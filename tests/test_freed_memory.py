"""Memory that a program has freed: it stays with the process, unless the environment says what the allocator does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CLEARED = """
import ctypes, resource, sys
from gircse.freed_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
elif sys.argv[1] == "program":
    from gircse.cli import main
    sys.argv[1:] = ["--version"]
    try:
        main()
    except SystemExit:
        pass
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes, library.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]

def use(size):
    block = library.malloc(size)
    ctypes.memset(block, 1, size)
    library.free(block)

use(64 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use(64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def cleared_pages(what: str, **environment: str) -> int:
    """Of five blocks of 64 MiB, one after the other, in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    call = [sys.executable, "-c", CLEARED, what]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=clean | environment)
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_what_is_freed_is_used_again_unless_the_environment_decides() -> None:
    given_back = cleared_pages("given back")
    assert cleared_pages("kept") < 0.1 * given_back
    assert cleared_pages("program") < 0.1 * given_back, "the command line does"
    assert cleared_pages("kept", MALLOC_TRIM_THRESHOLD_="0") > 0.9 * given_back
