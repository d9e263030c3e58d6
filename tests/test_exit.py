"""How the command ends: with its code, with all that was written, and after what others have to do at the end."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import Any

import pytest

from gircse.cli.common import garbage_kept, load_model


def ended(body: str) -> subprocess.CompletedProcess[str]:
    """`run` with a `main` that does this."""
    program = (
        "import sys\nimport gircse.cli as cli\ndef main():\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
        + "cli.main = main\ncli.run()\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(0)", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit(130)", 130, ""),
        ("sys.exit('in words')", 1, "in words"),
        ("raise ValueError('with a traceback')", 1, "with a traceback"),
    ],
)
def test_the_code_of_the_command(body: str, code: int, error: str) -> None:
    done = ended(body)
    assert done.returncode == code
    assert error in done.stderr
    assert bool(error) == bool(done.stderr)


def test_nothing_is_lost_at_the_end() -> None:
    done = ended("import atexit\natexit.register(print, 'last words')\nprint('x' * 1_000_000)")
    assert done.returncode == 0
    assert done.stdout == "x" * 1_000_000 + "\nlast words\n"


def test_threads_are_waited_for() -> None:
    late = "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.3), print('late'))).start()"
    assert ended(late).stdout == "late\n"


def test_a_reader_that_has_gone_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m gircse --version | true", shell=True, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_garbage_is_kept_while_a_model_loads_and_collected_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def load() -> None:
        seen.append(gc.isenabled())
        raise OSError

    with pytest.raises(OSError), garbage_kept():
        load()
    assert seen == [False]
    assert gc.isenabled()
    monkeypatch.setattr("gircse.cli.common.prepare_backbone", lambda name: load())
    with pytest.raises(OSError):
        load_model("nowhere")
    assert seen == [False, False], "so it is for every verb"
    gc.disable()
    try:
        with garbage_kept():
            pass
        assert not gc.isenabled(), "as it was before"
    finally:
        gc.enable()
