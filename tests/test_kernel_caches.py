"""Kernels that PyTorch keeps for a CPU's products: a program keeps few of them, and says how many once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gircse.fast.kernel_caches import KERNELS, VARIABLES

GROWTH = """
import ctypes, sys, torch
from pathlib import Path
from gircse.fast.kernel_caches import limit_kernel_caches
if sys.argv[1] == "limited":
    limit_kernel_caches()

def resident():
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")) / 1024

x, weight = torch.randn(500, 64).bfloat16(), torch.randn(64, 64).bfloat16()
with torch.inference_mode():
    torch.nn.functional.linear(x[:1], weight)
    before = resident()
    for rows in range(2, 500):
        torch.nn.functional.linear(x[:rows], weight)
    print(resident() - before)
"""

VERSION = """
import os, sys
from gircse.cli import main
names, sys.argv[1:] = sys.argv[1:], ["--version"]
try:
    main()
finally:
    print(*map(os.environ.get, names))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not torch.cpu._is_avx512_bf16_supported(), reason="about oneDNN's bfloat16, and Linux"
)
def test_products_with_ever_other_rows_do_not_fill_the_memory() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    grown = {}
    for how in ("limited", "unlimited"):
        call = [sys.executable, "-c", GROWTH, how]
        grown[how] = float(subprocess.run(call, capture_output=True, text=True, check=True, env=environment).stdout)
    assert grown["limited"] < 0.5 * grown["unlimited"], grown


def test_the_command_line_limits_them_and_heeds_the_environment() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | {VARIABLES[0]: "7"}
    call = [sys.executable, "-c", VERSION, *VARIABLES]
    told = subprocess.run(call, capture_output=True, text=True, check=True, env=environment).stdout
    assert told.splitlines()[-1] == f"7 {KERNELS}"


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_two_commands_at_once_do_not_wait_busily(given: dict[str, str], spins: str) -> None:
    environment = {name: v for name, v in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    call = [sys.executable, "-c", VERSION, "GOMP_SPINCOUNT"]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=environment | given)
    assert done.stdout.splitlines()[-1] == spins


@pytest.mark.parametrize("limit", ["0", "-1", "many", ""])
def test_a_limit_that_would_crash_is_refused_in_a_line(limit: str) -> None:
    call = [sys.executable, "-m", "gircse", "--version"]
    done = subprocess.run(call, capture_output=True, text=True, env=os.environ | {VARIABLES[0]: limit})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "set it to a whole number above 0, or not at all" in done.stderr
