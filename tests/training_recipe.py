"""Training rows and a recipe over them, for tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
import zstandard

ROWS = [
    {
        "task": task,
        "instruction": f"do {task}",
        "query": f"query {i}",
        "pos": [f"pos {i}"],
        "neg": [f"neg {i}", f"bad {i}"],
    }
    for task in ("a", "b")
    for i in range(24)
]


def write_rows(folder: Path) -> None:
    """ROWS as ``folder/data/rows.jsonl.zst``."""
    (folder / "data").mkdir()
    with zstandard.open(folder / "data" / "rows.jsonl.zst", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in ROWS))


def values(folder: Path, backbone: Path) -> dict[str, Any]:
    """A recipe: two sources, four rows a batch."""
    return {
        "backbone": str(backbone),
        "seed": 3,
        "model": {"num_steps": 2, "max_seq_length": 40},
        "lora": {"r": 2, "alpha": 4},
        "data": {
            "folder": str(folder / "data"),
            "max_seq_length": 30,
            "sources": [
                {"file": "rows", "task": "a", "examples": 16, "negatives": 1, "symmetric": True, "licence": "x"},
                {
                    "file": "rows",
                    "task": "b",
                    "examples": 8,
                    "negatives": 2,
                    "in_batch_negatives": False,
                    "licence": "x",
                },
            ],
        },
        "training": {"batch_size": 4, "learning_rate": 0.01, "warmup_steps": 1, "save_every": 2, "log_every": 1},
    }


def write(folder: Path, content: dict[str, Any]) -> Path:
    """The recipe as a file."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
