"""`python -m gircse`."""

from __future__ import annotations

from gircse.cli import run

run()
