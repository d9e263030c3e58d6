"""How often questions are refused, and answers cited, and cited rightly.

    gircse index DATA/eval/XQuADRetrieval/en/corpus.jsonl -o xquad.index --id-column id
    python benchmarks/answers.py xquad.index --data DATA/eval

Questions of XQuAD (English), whose passages the index holds, and of FeedbackQA, which it cannot answer. ``refused`` are
those that get no passage at several ``--min-score``, ``lost`` those of XQuAD whose passage was among the best three and
is left out. Citations: by the writer itself, and after `gircse.search.citations` at several thresholds of support;
right is a citation of a passage that answers the question. ``foreign`` are sentences that the passages of another
question would support: no threshold is better than it keeps these out.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arguments import at_least_one, data_folder, output_file
from rerank_gain import Task, retrieval
from rich.console import Console

from gircse.model import GIRCSE
from gircse.search import DEFAULT_MIN_SIMILARITY
from gircse.search.answer import BackboneWriter, Passage, answer
from gircse.search.citations import CITATION, MIN_SUPPORT, cited_numbers, sentences, support
from gircse.search.search import SearchHit, SearchIndex

MIN_SIMILARITIES = (0.76, 0.78, 0.80, 0.82, 0.83, 0.84, 0.85, 0.86)
SUPPORTS = (0.5, 0.6, 0.7, 0.8, 0.9)
TOP = 3


class Recording:
    """A writer that keeps what it wrote, as it was before citations were looked at."""

    def __init__(self, writer: BackboneWriter) -> None:
        self._writer, self.text = writer, ""

    def write(self, messages: Sequence[dict[str, str]]) -> Iterator[str]:
        self.text = ""
        for piece in self._writer.write(messages):
            self.text += piece
            yield piece


def best(hits: list[SearchHit], names: Any = None) -> float:
    """The highest similarity, of all passages or of the named documents; 0 where there is none."""
    found = [hit.similarity or 0.0 for hit in hits if names is None or hit.document_id in names]
    return max(found, default=0.0)


def refusals(own: list[tuple[float, float]], foreign: list[float]) -> list[dict[str, float]]:
    """Shares of questions at several thresholds; `own` are the best similarities, of all and of right passages."""
    rows = []
    for threshold in MIN_SIMILARITIES:
        row = {
            "min_similarity": threshold,
            "refused": np.mean([of_all < threshold for of_all, _ in own]),
            "lost": np.mean([0 < right < threshold for _, right in own]),
            "foreign_refused": np.mean([of_all < threshold for of_all in foreign]),
        }
        rows.append({name: round(float(value), 3) for name, value in row.items()})
    return rows


def counted(citations: list[tuple[set[int], set[int]]]) -> dict[str, int]:
    """Of pairs of cited and right numbers: how many cite at all, and how many cite nothing but right ones."""
    return {
        "cited": sum(bool(cited) for cited, _ in citations),
        "right": sum(bool(cited) and cited <= right for cited, right in citations),
    }


def first_support(text: str, passages: Sequence[str]) -> list[float]:
    """Of an answer's first sentence, without its own citations, by each passage."""
    return [support(sentences(CITATION.sub("", text).strip())[0], passage) for passage in passages]


def measure(index: SearchIndex, writer: BackboneWriter, task: Task, foreign: list[str], answers: int) -> dict[str, Any]:
    """Everything, as JSON."""
    found = {name: index.search(text, top=TOP, chunks=True) for name, text in task.queries.items()}
    own = [(best(hits), best(hits, task.relevant[name])) for name, hits in found.items()]
    others = [best(index.search(text, top=TOP, chunks=True)) for text in foreign]
    recording, written = Recording(writer), []
    for name in list(found)[:answers]:
        result = answer(task.queries[name], found[name], recording, writer.count_tokens)
        if result.passages:
            final = "".join(result.pieces)
            written.append((recording.text, final, result.passages, numbers(result.passages, task.relevant[name])))
    supports = [first_support(raw, [passage.text for passage in passages]) for raw, _, passages, _ in written]
    shifted = [passages for _, _, passages, _ in (*written[1:], written[0])]
    strange = [
        max(first_support(raw, [passage.text for passage in passages]))
        for (raw, *_), passages in zip(written, shifted, strict=True)
    ]
    by_support = []
    for threshold in SUPPORTS:
        pairs = [
            ({own.index(max(own)) + 1} if max(own) >= threshold else set[int](), right)
            for own, (*_, right) in zip(supports, written, strict=True)
        ]
        passing = sum(value >= threshold for value in strange)
        by_support.append({"support": threshold, **counted(pairs), "foreign": passing})
    return {
        "questions": len(own),
        "min_similarity": DEFAULT_MIN_SIMILARITY,
        "refusals": refusals(own, others),
        "answers": len(written),
        "by_the_writer": {
            **counted([(in_range(raw, passages), right) for raw, _, passages, right in written]),
            "cites_what_is_not_there": sum(
                cited_numbers(raw) != in_range(raw, passages) for raw, _, passages, _ in written
            ),
        },
        "min_support": MIN_SUPPORT,
        "finally": counted([(cited_numbers(final), right) for _, final, _, right in written]),
        "first_sentence_by_support": by_support,
    }


def numbers(passages: Sequence[Passage], names: Any) -> set[int]:
    """Of the passages of the named documents."""
    return {passage.number for passage in passages if passage.hit.document_id in names}


def in_range(text: str, passages: Sequence[Passage]) -> set[int]:
    """The numbers a text cites that passages have."""
    return cited_numbers(text) & {passage.number for passage in passages}


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("index", type=data_folder, help="of XQuAD's English passages")
    parser.add_argument("--data", type=data_folder, required=True, help="folder of the evaluation tasks")
    parser.add_argument("--limit", type=at_least_one, default=200, help="questions of either (default %(default)s)")
    parser.add_argument("--answers", type=at_least_one, default=100, help="of them answered (default %(default)s)")
    parser.add_argument("--output", "-o", type=output_file, default=Path("benchmarks/results/answers.json"))
    given = parser.parse_args()
    model = GIRCSE()
    task = retrieval(given.data / "XQuADRetrieval" / "en", given.limit, 0, random.Random(0))
    foreign = retrieval(given.data / "FeedbackQARetrieval", given.limit, 0, random.Random(0))
    facts = {"command": "python benchmarks/answers.py"} | measure(
        SearchIndex(given.index, model),
        BackboneWriter(model.encoder),
        task,
        list(foreign.queries.values()),
        given.answers,
    )
    Console().print_json(data=facts)
    given.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
