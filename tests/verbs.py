"""Verbs of the command line, called in this process."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import gircse.cli


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Call a verb as the shell does: its exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["gircse", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        gircse.cli.main()
    captured = capsys.readouterr()
    code = stop.value.code
    return (code if isinstance(code, int) else 0 if code is None else 1), captured.out, captured.err
