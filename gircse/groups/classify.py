"""Texts into classes: by the names of the classes alone, or by examples of each.

Knows a model's vectors and a logistic regression; knows nothing of files or the terminal. The instruction says what
the classes are about: the same texts have a topic, a mood and a language.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gircse.errors import UsageError
from gircse.groups import DEFAULT_INSTRUCTION

if TYPE_CHECKING:
    from gircse.model import GIRCSE

INVERSE_REGULARISATION = 10.0
"""C of the logistic regression. Vectors have length 1 and lie close together, so scikit-learn's 1.0 learns too little
where classes are many: 67 instead of 75 % on Banking77 with eight examples a class (docs/experiments.md)."""


@dataclass(frozen=True)
class Assignment:
    """The class of a text.

    Attributes:
        label: Its name.
        score: Of classes by name the cosine similarity between text and name; of classes by examples the probability.
        margin: How far the runner-up is behind: near 0 the choice was close.
    """

    label: str
    score: float
    margin: float


class Classifier:
    """Sorts texts into classes; made by `from_labels` or `from_examples`.

    A text's class does not depend on the texts beside it.

    Example:
        >>> from gircse import GIRCSE
        >>> from gircse.groups.classify import Classifier
        >>> moods = Classifier.from_labels(GIRCSE(), ["joy", "anger", "fear"], instruction="Identify the emotion")
        >>> moods(["What a lovely morning!"])[0].label
        'joy'
    """

    def __init__(
        self,
        embed: Callable[..., np.ndarray],
        labels: Sequence[str],
        decide: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        self._embed, self._decide = embed, decide
        self.labels = list(labels)
        """Names of the classes."""

    @classmethod
    def from_labels(
        cls,
        model: GIRCSE,
        labels: Sequence[str],
        *,
        instruction: str = DEFAULT_INSTRUCTION,
        num_steps: int | None = None,
    ) -> Classifier:
        """Classes by their names alone: a text belongs to the name that is nearest, both under the instruction.

        Args:
            model: That embeds texts and names.
            labels: Two names or more. An underscore is read as a space.
            instruction: What the classes are about.
            num_steps: K; the model's where not given.

        Raises:
            UsageError: Fewer than two names, an empty one, or one that is there twice.
        """
        check_labels(labels)
        embed = _embedder(model, instruction, num_steps)
        names = embed(texts_of_labels(labels))  # (C, d)
        return cls(embed, labels, lambda vectors: vectors @ names.T)

    @classmethod
    def from_examples(
        cls,
        model: GIRCSE,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        instruction: str = DEFAULT_INSTRUCTION,
        num_steps: int | None = None,
    ) -> Classifier:
        """Classes by examples: a logistic regression on their vectors. A few of each class are enough to begin with.

        Args:
            model: That embeds examples and texts.
            texts: The examples.
            labels: The class of each.
            instruction: What the classes are about.
            num_steps: K; the model's where not given.

        Raises:
            UsageError: Not as many labels as texts, or all of one class.
        """
        from sklearn.linear_model import LogisticRegression

        if len(texts) != len(labels):
            raise UsageError(f"{len(texts)} examples have {len(labels)} labels; give each example one")
        check_labels(list(dict.fromkeys(labels)))
        embed = _embedder(model, instruction, num_steps)
        regression = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000)
        regression.fit(embed(texts), list(labels))
        return cls(embed, [str(label) for label in regression.classes_], regression.predict_proba)

    def scores(self, texts: Sequence[str], *, show_progress_bar: bool = False) -> np.ndarray:
        """Of every text for every class, (n, C), in the order of `labels`; `Assignment.score` says what they are."""
        if not len(texts):
            return np.zeros((0, len(self.labels)), dtype=np.float32)
        return np.asarray(self._decide(self._embed(texts, show_progress_bar=show_progress_bar)))

    def __call__(self, texts: Sequence[str], *, show_progress_bar: bool = False) -> list[Assignment]:
        """The class of every text; progress is shown on stderr."""
        result = []
        for row in self.scores(texts, show_progress_bar=show_progress_bar):
            second, first = np.argsort(row, kind="stable")[-2:]
            result.append(Assignment(self.labels[first], float(row[first]), float(row[first] - row[second])))
        return result


def _embedder(model: GIRCSE, instruction: str, num_steps: int | None) -> Callable[..., np.ndarray]:
    """Vectors of length 1, (n, d), of texts under the instruction."""
    prompt = model.format_instruction(instruction)

    def embed(texts: Sequence[str], *, show_progress_bar: bool = False) -> np.ndarray:
        return model.encode(
            list(texts),
            prompt=prompt,
            num_steps=num_steps,
            normalize_embeddings=True,
            show_progress_bar=show_progress_bar,
        )

    return embed


def texts_of_labels(labels: Sequence[str]) -> list[str]:
    """What is embedded for the names of classes: an underscore is read as a space."""
    return [label.replace("_", " ") for label in labels]


def check_labels(labels: Sequence[str]) -> None:
    """Refuse names that make no choice.

    Raises:
        UsageError: Fewer than two, an empty one, one that is there twice, or a text instead of a list.
    """
    if isinstance(labels, str):
        raise UsageError(f"classes are a list of names, not the one text {labels!r}")
    if len(labels) < 2:
        raise UsageError(f"give two classes or more, not {len(labels)}")
    if any(not label.strip() for label in labels):
        raise UsageError("a class has no name; give every class one")
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise UsageError(f"class {twice[0]!r} is named twice; name each class once")
