"""Hard negatives for training rows, found with any embedding model.

Knows rows and sentence-transformers' miner; knows nothing of training.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from gircse.checkpoint import INSTRUCTION_TEMPLATE
from gircse.errors import GircseError, MissingExtraError, UsageError
from gircse.train.data import read_rows

try:
    import zstandard
    from datasets import Dataset
except ImportError as error:
    raise MissingExtraError("mining", "train") from error

_SUFFIXES = (".jsonl", ".jsonl.zst")


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
) -> dict[str, int]:
    """Add to every row the passages of its task that the model finds most similar to the query, and write the rows.

    Passages are all positives and negatives of the task. A candidate is left out where it is closer to the query than
    (1 − margin) times the positive (sentence-transformers' relative margin), for it is likely to be an answer too.

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

    Returns:
        By task, the rows that got at least one negative.

    Raises:
        UsageError: The output exists, is no such file or cannot be made, or the depth leaves nothing to choose from.
        InputDataError: A bad row.
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
    rows = list(read_rows(source))
    if not rows:
        raise GircseError(f"{source} holds no rows")
    by_task: dict[tuple[str, str], list[int]] = {}
    passages: dict[str, dict[str, None]] = {}
    for index, row in enumerate(rows):
        by_task.setdefault((row["task"], row["instruction"]), []).append(index)
        passages.setdefault(row["task"], {}).update(dict.fromkeys((*row["pos"], *row["neg"])))
    found: dict[str, int] = {}
    for (task, instruction), indices in by_task.items():
        prompt = None
        if hasattr(model, "format_instruction"):
            prompt = INSTRUCTION_TEMPLATE.format(instruction=instruction) if instruction else model.prompts.get("query")
        mined = _mine_task(
            [rows[index] for index in indices],
            list(passages[task]),
            model,
            query_prompt=prompt,
            corpus_prompt=prompt if task in symmetric_tasks else None,
            negatives=negatives,
            skip_top=skip_top,
            search_depth=search_depth,
            margin=margin,
        )
        for index, texts in zip(indices, mined, strict=True):
            known = {*rows[index]["pos"], *texts}
            rows[index]["neg"] = texts + [text for text in rows[index]["neg"] if text not in known]
        found[task] = found.get(task, 0) + sum(bool(texts) for texts in mined)
    _write(rows, output)
    return found


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
        num_negatives=min(negatives, depth - skip_top),
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
    answers: dict[str, set[str]] = {}
    for row in rows:  # rows that ask the same: an answer to one is no negative of the other
        answers.setdefault(row["query"], set()).update(row["pos"])
    return [
        [text for text in by_query.get(row["query"], []) if text not in answers[row["query"]]][:negatives]
        for row in rows
    ]
