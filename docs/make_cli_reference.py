"""Write docs/cli-reference.md from the command line's own help; `make fix` runs it, and a test fails when it drifts."""

from __future__ import annotations

import re
from pathlib import Path

import typer
import typer.main
from typer.cli import get_docs_for_click

from gircse.cli import app

PAGE = Path(__file__).with_name("cli-reference.md")


def render() -> str:
    """The page."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="gircse"), name="gircse")
    text = re.sub(r"\[bold\](.*?)\[/bold\]", r"**\1**", text)
    text = re.sub(r"^  (?=\S)", "    ", text, flags=re.MULTILINE)  # examples become code
    return f"<!-- made by docs/make_cli_reference.py from gircse --help -->\n\n{text.strip()}\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
