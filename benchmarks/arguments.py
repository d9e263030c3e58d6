"""Types of the benchmarks' arguments: what is refused is refused in a line, before anything is measured."""

from __future__ import annotations

import argparse
from pathlib import Path


def data_folder(text: str) -> Path:
    """The type of ``--data``: a folder that is there."""
    if not (folder := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return folder


def output_file(text: str) -> Path:
    """The type of ``--output``: a file in a folder that is there."""
    if not (path := Path(text)).parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def at_least_one(text: str) -> int:
    """The type of ``--repeats``: a whole number above 0."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)
