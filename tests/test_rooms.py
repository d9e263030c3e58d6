"""Dependencies point one way, as CONTRIBUTING.md says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gircse"
FLOORS = [
    {"cli"},
    {"train", "embed", "evaluate", "search", "serve", "map", "groups", "merge", "distributed", "integrations"},
    {"model"},
    {"encoder", "checkpoint", "model_card", "explanation"},
    {"refiner"},
]
"""From the roof down; whatever is not named stands on the ground."""


def floor_of(module: str) -> int:
    """The number of a module's floor, 0 for the ground; ``gircse.fast.norms`` is in the room ``fast``."""
    room = module.split(".")[1] if "." in module else ""
    return next((len(FLOORS) - number for number, rooms in enumerate(FLOORS) if room in rooms), 0)


def imported_at_once(source: str) -> list[str]:
    """The modules of ours that importing a file imports: not for the type checker, not in a function."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # A name may be a module of its package, or something inside of the module.
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.split(".")[0] == "gircse"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_room_needs_a_higher_one(path: Path) -> None:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    own = floor_of(".".join(parts))
    for name in imported_at_once(path.read_text(encoding="utf-8")):
        assert floor_of(name) <= own or parts[-1] == "__main__", f"{'.'.join(parts)} imports {name}"


def test_a_wrong_import_would_be_found() -> None:
    assert imported_at_once("from gircse.model import GIRCSE\nfrom torch import nn\n") == ["gircse.model.GIRCSE"]
    assert floor_of("gircse.model.GIRCSE") > floor_of("gircse.fast.norms")
    assert floor_of("gircse.cli.embed") > floor_of("gircse.embed.job") > floor_of("gircse.model")
