"""Hard negatives for training rows, found with any embedding model.

Knows rows and sentence-transformers' miner; knows nothing of training.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from gircse.checkpoint import INSTRUCTION_TEMPLATE
from gircse.errors import GircseError, InputDataError, MissingExtraError, UsageError
from gircse.train.mined_parts import MinedParts
from gircse.train.rows import read_rows

try:
    import zstandard
    from datasets import Dataset
except ImportError as error:
    raise MissingExtraError("mining", "train") from error

_SUFFIXES = (".jsonl", ".jsonl.zst")


@dataclass(frozen=True)
class MinedTask:
    """A task that has been mined.

    Attributes:
        task: Its name.
        rows_with_negatives: Those that got at least one.
        rows: All of the task.
        number: Of the task among the file's, from 1.
        tasks: Of the file.
    """

    task: str
    rows_with_negatives: int
    rows: int
    number: int
    tasks: int


def mine_file(
    source: Path,
    output: Path,
    model: SentenceTransformer,
    *,
    negatives: int = 4,
    skip_top: int = 0,
    search_depth: int = 50,
    margin: float = 0.05,
    symmetric_tasks: frozenset[str] = frozenset(),
    overwrite: bool = False,
    resume: bool = False,
    model_name: str = "",
    report: Callable[[MinedTask], None] | None = None,
) -> dict[str, int]:
    """Add to every row the passages of its task that the model finds most similar to the query, and write the rows.

    Passages are all positives and negatives of the task. A candidate is left out where it is closer to the query than
    (1 − margin) times the positive (sentence-transformers' relative margin), for it is likely to be an answer too.

    What is found is kept beside the output, in ``OUTPUT.parts``, task by task, until the output is there.

    Args:
        source: ``.jsonl``, ``.jsonl.zst`` or ``.parquet`` rows.
        output: ``.jsonl`` or ``.jsonl.zst``; the negatives found come before those that the row had.
        model: Any SentenceTransformer. A GIRCSE model reads queries under the row's instruction.
        negatives: How many to add at most.
        skip_top: Leave out this many of the nearest candidates that the margin lets through.
        search_depth: Look at this many of the nearest candidates.
        margin: Relative margin below the positive's similarity.
        symmetric_tasks: Tasks whose passages carry the instruction too.
        overwrite: Replace an existing output.
        resume: Go on after the tasks that an interrupted call has mined, if there was one.
        model_name: What the model is called: an interrupted call is gone on with under the same name only.
        report: Called with every task that has been mined.

    Returns:
        By task, the rows that got at least one negative.

    Raises:
        UsageError: The output exists, is no such file or cannot be made; the depth leaves nothing to choose from; an
            interrupted call is not resumed, or was of other rows, settings or another model.
        InputDataError: A bad row, or one that cannot be written.
    """
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists; choose another file or add --overwrite")
    if not output.name.endswith(_SUFFIXES):
        raise UsageError(f"{output}: rows are written as {' or '.join(_SUFFIXES)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)  # now, not after hours of mining
    except OSError as error:
        raise UsageError(f"{output.parent} cannot be made ({error.strerror})") from error
    if search_depth <= skip_top:
        raise UsageError(f"search depth {search_depth} must exceed the {skip_top} candidates that are skipped")
    rows = [_as_json(row, source, number) for number, row in enumerate(read_rows(source), start=1)]
    if not rows:
        raise GircseError(f"{source} holds no rows")
    options = {
        "negatives": negatives,
        "skip_top": skip_top,
        "search_depth": search_depth,
        "margin": margin,
    }
    if unknown := sorted(symmetric_tasks - {row["task"] for row in rows}):
        near = get_close_matches(unknown[0], {row["task"] for row in rows}, n=1)
        raise UsageError(f"{source} has no task {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    parts = MinedParts(
        output,
        {"rows": _checksum(rows), "model": model_name, "symmetric": sorted(symmetric_tasks), **options},
        resume=resume,
        overwrite=overwrite,
    )
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    found: dict[str, int] = {}
    for number, (task, own) in enumerate(by_task.items(), start=1):
        mined = parts.mined.get(task)
        if mined is None:
            mined = _mine_task(own, model, symmetric=task in symmetric_tasks, **options)
            parts.add(task, mined)
        for row, texts in zip(own, mined, strict=True):
            known = {*row["pos"], *texts}
            row["neg"] = texts + [text for text in row["neg"] if text not in known]
        found[task] = sum(map(bool, mined))
        if report is not None:
            report(MinedTask(task, found[task], len(own), number, len(by_task)))
    _write(rows, output)
    parts.remove()
    return found


def _as_json(row: dict[str, Any], source: Path, number: int) -> dict[str, Any]:
    """A row as it will be written; what cannot be is told now, not after hours of mining.

    Raises:
        InputDataError: Bytes that are no text, or half a surrogate pair.
    """
    try:
        written = json.dumps(row, ensure_ascii=False, default=_as_text)
        written.encode()
    except (TypeError, ValueError) as error:
        raise InputDataError(
            str(source), number, f"cannot be written as JSON ({error}); mend or drop the field"
        ) from None
    return json.loads(written)


def _as_text(value: Any) -> str:
    """A Parquet cell of a type that JSON does not have: a time, a decimal number, bytes of text."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _checksum(rows: Sequence[dict[str, Any]]) -> str:
    digest = sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def _write(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """All rows or none: the output may be the file that they were read from."""
    opener = zstandard.open if output.suffix == ".zst" else open
    with tempfile.TemporaryDirectory(prefix=".mined-", dir=output.parent) as folder:
        whole = Path(folder) / output.name
        with opener(whole, "wt", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(whole, output)


def _mine_task(
    rows: list[dict[str, Any]], model: SentenceTransformer, *, symmetric: bool, **options: Any
) -> list[list[str]]:
    """The negatives of every row of a task; rows of one instruction are mined together."""
    corpus = list(dict.fromkeys(text for row in rows for text in (*row["pos"], *row["neg"])))
    by_instruction: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_instruction.setdefault(row["instruction"], []).append(index)
    found: list[list[str]] = [[] for _ in rows]
    for instruction, indices in by_instruction.items():
        prompt = None
        if hasattr(model, "format_instruction"):
            prompt = INSTRUCTION_TEMPLATE.format(instruction=instruction) if instruction else model.prompts.get("query")
        prompts = {"query_prompt": prompt, "corpus_prompt": prompt if symmetric else None}
        for index, texts in zip(
            indices, _mine([rows[index] for index in indices], corpus, model, **prompts, **options), strict=True
        ):
            found[index] = texts
    return found


def _mine(
    rows: list[dict[str, Any]],
    corpus: list[str],
    model: SentenceTransformer,
    *,
    query_prompt: str | None,
    corpus_prompt: str | None,
    negatives: int,
    skip_top: int,
    search_depth: int,
    margin: float,
) -> list[list[str]]:
    """The negatives of every row, nearest first; none where no candidate is far enough below the positive."""
    pairs = Dataset.from_list([{"query": row["query"], "answer": text} for row in rows for text in row["pos"]])
    depth = min(search_depth, max(len(corpus) - 1, 0))
    if depth <= skip_top:
        return [[] for _ in rows]
    mined = mine_hard_negatives(
        pairs,
        model,
        anchor_column_name="query",
        positive_column_name="answer",
        corpus=corpus,
        range_min=skip_top,
        range_max=depth,
        relative_margin=margin,
        num_negatives=min(negatives + 1, depth - skip_top),  # one may be the query itself
        sampling_strategy="top",
        query_prompt=query_prompt,
        corpus_prompt=corpus_prompt,
        output_format="triplet",
        verbose=False,
    )
    by_query: dict[str, list[str]] = {}
    for row in cast("Iterable[dict[str, str]]", mined):
        texts = by_query.setdefault(row["query"], [])
        if row["negative"] not in texts:
            texts.append(row["negative"])
    answers = {row["query"]: {row["query"]} for row in rows}  # nor is what it says itself a negative of a query
    for row in rows:  # rows that ask the same: an answer to one is no negative of the other
        answers[row["query"]].update(row["pos"])
    return [
        [text for text in by_query.get(row["query"], []) if text not in answers[row["query"]]][:negatives]
        for row in rows
    ]
