"""What the pages say is what the program does."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_command_reference_is_the_help() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_cli_reference.py"))
    page = (ROOT / "docs" / "cli-reference.md").read_text(encoding="utf-8")
    assert page == made["render"](), "run `make fix`: docs/cli-reference.md is not what --help says"


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_what_contributors_install_has_all_extras() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {name for extra in ("all", "dev") for entry in extras[extra] for name in re.findall(r"[\w-]+", entry)}
    assert extras.keys() - {"dev"} <= named, "docs/tutorial.md says that `make install` brings all of them"
