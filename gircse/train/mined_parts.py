"""What an interrupted search for negatives had found: kept beside the output, task by task, until that is written.

Knows a file of JSON lines; knows nothing of how negatives are found.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gircse.errors import UsageError


class MinedParts:
    """The negatives of the tasks that have been mined so far, in ``OUTPUT.parts``.

    The first line says of what: rows, model and settings. Every other has a task and the negatives of its rows; a last
    one that a kill has cut off is dropped.

    Args:
        output: The file that all is for.
        made_of: What the negatives depend on.
        resume: Go on with what is there; else what is there must not be.
        overwrite: Drop it instead.

    Attributes:
        mined: By task, the negatives of each of its rows.

    Raises:
        UsageError: There are parts and neither `resume` nor `overwrite`, or they are made of something else.
    """

    def __init__(self, output: Path, made_of: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.path = output.with_name(f"{output.name}.parts")
        self.mined: dict[str, list[list[str]]] = {}
        if self.path.exists() and not resume and not overwrite:
            raise UsageError(f"{output} was begun before; go on with --resume, or begin anew with --overwrite")
        entries = self._read() if resume and self.path.exists() else []
        if entries:
            before = entries[0]
            changed = [key for key, value in made_of.items() if before.get(key) != value]
            if changed:
                raise UsageError(
                    f"{self.path} is of other {', '.join(changed)}; call it as before, or begin anew with --overwrite "
                    "and without --resume"
                )
            self.mined = {entry["task"]: entry["negatives"] for entry in entries[1:]}
        # Written anew, so that nothing is appended to a line that was cut off; whole or not at all.
        fresh = self.path.with_name(f"{self.path.name}.new")
        fresh.write_text("".join(map(_line, entries or [made_of])), encoding="utf-8")
        os.replace(fresh, self.path)

    def _read(self) -> list[dict[str, Any]]:
        lines = self.path.read_bytes().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def add(self, task: str, negatives: list[list[str]]) -> None:
        """Keep those of a task."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line({"task": task, "negatives": negatives}))

    def remove(self) -> None:
        """All is in the output."""
        self.path.unlink()


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
