"""Texts into classes by the names of the classes, and by eight examples of each: accuracy at several K.

    python benchmarks/classes.py --data DATA/eval

`gircse.groups.classify` on samples of test sets, with the shipped model, and the same with all-MiniLM-L6-v2, which
reads no instructions. ``general`` is the instruction that `gircse classify` has where nobody gives one. Examples are
drawn from the training sets. The gain over K = 0 is paired over texts, its 95 % interval a bootstrap.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
from arguments import at_least_one, data_folder, output_file
from rich.console import Console
from rich.table import Table

from gircse.groups import DEFAULT_INSTRUCTION
from gircse.groups.classify import Classifier
from gircse.model import GIRCSE
from gircse.other_models import MINILM, load_other_model

TASKS = {
    "EmotionClassification": "Identify the emotion",
    "NewsClassification": "Identify the topic of the news article",
    "Banking77Classification": "Identify the intent of the customer",
    "SIB200Classification/eng_Latn": "Identify the topic of the sentence",
}
NAMES = {"NewsClassification": {"0": "World", "1": "Sports", "2": "Business", "3": "Sci/Tech"}}
"""Where the files have numbers: as the data set's own page calls them."""
EXAMPLES = 8
STEPS = (0, 1, 5, 20)
DRAWS = 2000


class Remembering:
    """The shipped model for a `Classifier`: a text is embedded once under a prompt, and gives its vectors of all K."""

    def __init__(self, model: GIRCSE) -> None:
        self._model = model
        self._known: dict[tuple[str, str], np.ndarray] = {}  # (21, d): K = 0, 1, ... 20
        self.format_instruction = model.format_instruction

    def encode(self, texts: list[str], *, prompt: str, num_steps: int, **_: Any) -> np.ndarray:
        if new := [text for text in dict.fromkeys(texts) if (prompt, text) not in self._known]:
            plain = self._model.encode(new, prompt=prompt, num_steps=0)
            steps = self._model.encode_steps(new, prompt=prompt, num_steps=STEPS[-1])
            vectors = np.concatenate([plain[:, None], steps], axis=1)  # (n, 21, d)
            vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
            self._known |= {(prompt, text): own for text, own in zip(new, vectors, strict=True)}
        return np.stack([self._known[prompt, text][num_steps] for text in texts])


class Uninstructed:
    """A SentenceTransformer for a `Classifier`: no instruction, no K."""

    def __init__(self, name: str) -> None:
        self._model = load_other_model(name)

    def format_instruction(self, instruction: str) -> str:
        return ""

    def encode(
        self, texts: list[str], *, prompt: str, num_steps: int | None, normalize_embeddings: bool, **_: Any
    ) -> np.ndarray:
        return self._model.encode(texts, normalize_embeddings=normalize_embeddings)


def read(path: Path, names: dict[str, str]) -> list[tuple[str, str]]:
    """Texts and the names of their classes."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(row["text"], names.get(str(row["label"]), str(row["label"]))) for row in rows]


def shown_of(rows: list[tuple[str, str]], labels: list[str], seed: int) -> list[tuple[str, str]]:
    """So many examples of each class."""
    drawn = random.Random(seed).sample(rows, len(rows))
    return [row for label in labels for row in [own for own in drawn if own[1] == label][:EXAMPLES]]


def right(classifier: Classifier, rows: list[tuple[str, str]]) -> np.ndarray:
    """Which texts got their class, (n,) bool."""
    return np.array(
        [own.label == label for own, (_, label) in zip(classifier([text for text, _ in rows]), rows, strict=True)]
    )


def interval(difference: np.ndarray) -> list[float]:
    """The 95 % interval of a mean by bootstrap, in points."""
    generator = np.random.default_rng(0)
    means = difference[generator.integers(0, len(difference), (DRAWS, len(difference)))].mean(axis=1)
    return [round(100 * float(bound), 1) for bound in np.quantile(means, [0.025, 0.975])]


def measure(model: GIRCSE, other: GIRCSE, folder: Path, task: str, limit: int) -> list[dict[str, Any]]:
    """Accuracies on one task, a dictionary a way to classify."""
    names = NAMES.get(task, {})
    rows = read(folder / task / "test.jsonl", names)
    labels = sorted({label for _, label in rows})
    rows = random.Random(0).sample(rows, min(limit, len(rows)))
    shown = shown_of(read(folder / task / "train.jsonl", names), labels, seed=0)
    texts, classes = [text for text, _ in shown], [label for _, label in shown]
    ways = {
        "names": lambda own, k: Classifier.from_labels(own, labels, instruction=TASKS[task], num_steps=k),
        "names, general": lambda own, k: Classifier.from_labels(own, labels, num_steps=k),
        f"{EXAMPLES} examples": lambda own, k: Classifier.from_examples(
            own, texts, classes, instruction=TASKS[task], num_steps=k
        ),
    }
    results = []
    for way, make in ways.items():
        hits = {k: right(make(model, k), rows) for k in STEPS}
        result: dict[str, Any] = {"task": task, "way": way, "classes": len(labels), "texts": len(rows)}
        result["accuracy"] = {str(k): round(100 * float(own.mean()), 1) for k, own in hits.items()}
        gain = hits[5].astype(float) - hits[0]
        result["gain"], result["gain_interval"] = round(100 * float(gain.mean()), 1), interval(gain)
        if way != "names, general":
            result[MINILM] = round(100 * float(right(make(other, None), rows).mean()), 1)
        results.append(result)
    return results


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=data_folder, required=True, help="folder of the evaluation tasks")
    parser.add_argument("--limit", type=at_least_one, default=500, help="texts of a task (default %(default)s)")
    parser.add_argument("--output", "-o", type=output_file, default=Path("benchmarks/results/classes.json"))
    given = parser.parse_args()
    model, other = cast(GIRCSE, Remembering(GIRCSE().pack_weights())), cast(GIRCSE, Uninstructed(MINILM))
    console = Console()
    table = Table("task", "by", *(f"K={k}" for k in STEPS), "K=5 over K=0", MINILM)
    results = []
    for task in TASKS:
        for result in measure(model, other, given.data, task, given.limit):
            results.append(result)
            low, high = result["gain_interval"]
            scores = [f"{own:.1f}" for own in result["accuracy"].values()]
            table.add_row(
                task, result["way"], *scores, f"{result['gain']} ({low} to {high})", str(result.get(MINILM, ""))
            )
        console.print(f"{task} done", style="dim")
    console.print(table)
    facts = {"command": "python benchmarks/classes.py", "instruction": DEFAULT_INSTRUCTION, "results": results}
    given.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
