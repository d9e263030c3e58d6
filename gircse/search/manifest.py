"""What an index remembers of its making: model, prompts, steps, chunks and columns, in INDEX/manifest.json.

Knows JSON and which differences spoil an index; knows nothing of tables or of how vectors are made.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from gircse._version import __version__
from gircse.errors import GircseError, UsageError
from gircse.search import DEFAULT_CHUNK_OVERLAP, DEFAULT_CHUNK_TOKENS, DEFAULT_EXACT_BELOW, TEXT_LANGUAGES
from gircse.search.chunks import check_sizes

if TYPE_CHECKING:
    from gircse.search.corpus import MetadataType

FORMAT = 1
_FILE = "manifest.json"


def text_language_named(name: str) -> str:
    """A language as full-text search calls it, whichever letters of the name are capitals.

    Raises:
        UsageError: Full-text search does not know it.
    """
    if name.capitalize() not in TEXT_LANGUAGES:
        raise UsageError(f"full-text search knows no language {name!r}; choose from {', '.join(TEXT_LANGUAGES)}")
    return name.capitalize()


@dataclass(frozen=True)
class IndexSettings:
    """Everything that all documents of an index have in common; a document made otherwise would not be comparable.

    Attributes:
        model: Folder or hub id to load it from; None is the model that ships with the package. Not compared.
        model_checksum: Of what vectors depend on; see `gircse.checksum`.
        num_steps: K, of documents and queries alike.
        document_prompt: Put before every chunk.
        dimension: Length of a vector.
        chunk_tokens: Longest chunk.
        chunk_overlap: Tokens shared by neighbouring chunks.
        column: Of the text in the corpus.
        id_column: Of the ids; None: ids are row numbers.
        text_language: Whose word endings full-text search ignores; see `text_language_named`.

    Raises:
        UsageError: Chunks would overlap by half or more, or full-text search does not know the language.
    """

    model: str | None
    model_checksum: str
    num_steps: int
    document_prompt: str
    dimension: int
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    chunk_overlap: int = DEFAULT_CHUNK_OVERLAP
    column: str = "text"
    id_column: str | None = None
    text_language: str = "English"

    def __post_init__(self) -> None:
        check_sizes(self.chunk_tokens, self.chunk_overlap)
        object.__setattr__(self, "text_language", text_language_named(self.text_language))

    def differences(self, other: IndexSettings) -> list[str]:
        """What differs, as ``name (mine, not theirs)``."""
        found = []
        for name in (each.name for each in fields(self) if each.name != "model"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                shown = "model weights" if name == "model_checksum" else f"{name} ({mine!r}, not {theirs!r})"
                found.append(shown)
        return found


@dataclass(frozen=True)
class Manifest:
    """INDEX/manifest.json.

    Attributes:
        settings: What made the vectors.
        metadata: Type of every metadata column.
        exact_below: Chunks from which on vectors are searched approximately.
        complete: Whether the last run came to its end.
        documents: Documents in the index when it last did.
        chunks: Their chunks.
        gircse_version: Of the last run.
        format: Of this file and the table.
    """

    settings: IndexSettings
    metadata: dict[str, MetadataType] = field(default_factory=dict)
    exact_below: int = DEFAULT_EXACT_BELOW
    complete: bool = False
    documents: int = 0
    chunks: int = 0
    gircse_version: str = __version__
    format: int = FORMAT

    @classmethod
    def find(cls, folder: Path) -> Manifest | None:
        """The manifest of an index; None where there is none yet.

        Raises:
            GircseError: It is not readable by this version.
        """
        try:
            values = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise GircseError(f"{folder / _FILE} is damaged ({error}); make the index anew with --overwrite") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise GircseError(f"{folder} was made by another version of gircse; make it anew with --overwrite")
        try:
            settings = IndexSettings(**values["settings"])
        except UsageError as error:
            raise GircseError(f"{folder}: {error}; make the index anew with --overwrite") from error
        return cls(**{**values, "settings": settings})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of an index that must be there."""
        found = cls.find(folder)
        if found is None:
            raise UsageError(f"{folder} is no index; make one with: gircse index CORPUS -o {folder}")
        return found

    def write(self, folder: Path) -> None:
        """Replace the file in one step: a kill leaves the old one or the new one.

        Raises:
            GircseError: It cannot be written.
        """
        temporary = folder / f"{_FILE}.new"
        try:
            with temporary.open("w", encoding="utf-8") as stream:
                json.dump(asdict(self), stream, indent=2, ensure_ascii=False)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(folder / _FILE)
        except OSError as error:  # of a full disk it names no file
            mend = "mend that, and run the same command again"
            raise GircseError(f"{folder / _FILE} cannot be written: {error.strerror}; {mend}") from error

    @staticmethod
    def remove(folder: Path) -> None:
        """Make the folder no index any more."""
        (folder / _FILE).unlink(missing_ok=True)
