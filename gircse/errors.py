"""Errors that reach people: one line each, which says what to do.

The command line prints the message of a `GircseError` and exits with its `exit_code`; every other exception is a bug
and shows its traceback under `--debug`.
"""

from __future__ import annotations


class GircseError(Exception):
    """Something failed in a way that the caller can mend. The message is one line that says how."""

    exit_code = 1


class UsageError(GircseError, ValueError):
    """The call itself is wrong: an argument out of range, two options that contradict each other."""

    exit_code = 2


class MissingExtraError(GircseError, ImportError):
    """A feature needs an optional dependency that is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs the extra {extra!r}: pip install 'gircse[{extra}]'")


class InputDataError(GircseError):
    """A row of the user's data is unusable.

    Args:
        source: The file as the user named it.
        line: 1-based line or row number; None where the whole file is meant.
        problem: What is wrong and what to do about it.
    """

    def __init__(self, source: str, line: int | None, problem: str) -> None:
        self.source, self.line, self.problem = source, line, problem
        where = source if line is None else f"{source}:{line}"
        super().__init__(f"{where}: {problem}")


class UnsupportedBackboneError(GircseError):
    """The refinement loop cannot serve this backbone exactly, so it does not serve it at all."""
