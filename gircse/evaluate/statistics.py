"""Bootstrap intervals and paired tests over the items of a task.

Knows arrays of per-item scores; knows nothing of mteb, models or files. Every random draw comes from a stated seed, and
two models on the same items get the same draws, which is what makes the test paired.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

DRAWS = 1000
SEED = 42
_CHUNK = 2_000_000  # counts held at once


@dataclass(frozen=True)
class Items:
    """What a task's score is made of, one entry an item (pair, test text, query).

    Attributes:
        statistic: How the score follows from the items: ``mean``; ``spearman`` and ``ap`` (average precision) of
            `values` against `gold`; ``resamples``, where `values` already are scores of bootstrap samples.
        values: Per-item scores or similarities.
        gold: Gold similarities (``spearman``) or 0/1 labels (``ap``).
    """

    statistic: str
    values: np.ndarray
    gold: np.ndarray | None = None
    _drawn: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def score(self) -> float:
        """The statistic of all items."""
        if self.statistic == "resamples":
            return float(self.values.mean())
        return float(self._weighted(np.ones((1, len(self.values)), dtype=np.int64))[0])

    def samples(self, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
        """The statistic of bootstrap samples, (draws,). Equal lengths and seeds give the same draws of items."""
        if (draws, seed) not in self._drawn:  # a report compares the same items many times
            self._drawn[draws, seed] = self._draw(draws, seed)
        return self._drawn[draws, seed]

    def _draw(self, draws: int, seed: int) -> np.ndarray:
        if self.statistic == "resamples":
            spread = self.values.std(ddof=1) if len(self.values) > 1 else 0.0
            own = zlib.crc32(np.ascontiguousarray(self.values).tobytes())  # else the noise of two tasks would add up
            drawn = np.random.default_rng([seed, own]).normal(self.values.mean(), spread, draws)
            return drawn.clip(0, 1)  # no score is beyond, and few items spread widely
        return np.concatenate([self._weighted(counts) for counts in _draws(len(self.values), draws, seed)])

    def _weighted(self, counts: np.ndarray) -> np.ndarray:
        if self.statistic == "mean":
            return counts @ self.values / counts.sum(axis=1)
        assert self.gold is not None, f"{self.statistic} needs gold values"
        if self.statistic == "spearman":
            return _correlation(_ranks(self.values, counts), _ranks(self.gold, counts), counts)
        return _average_precision(self.values, self.gold, counts)


@dataclass(frozen=True)
class Comparison:
    """One model against another on the same items.

    Attributes:
        difference: Score of the first minus score of the second.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end.
        p: Two-sided p-value of the paired bootstrap: how often the sign of the difference turns.
        n: Items.
        samples: The difference in bootstrap samples, (draws,).
    """

    difference: float
    low: float
    high: float
    p: float
    n: int
    samples: np.ndarray = field(repr=False, compare=False)

    def as_percent(self) -> dict[str, float]:
        """``difference``, ``low`` and ``high`` × 100, ``p`` and ``n``."""
        spread = {"difference": self.difference, "low": self.low, "high": self.high}
        return {name: 100 * value for name, value in spread.items()} | {"p": self.p, "n": self.n}


def interval(samples: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap samples."""
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)


def p_text(p: float) -> str:
    """A p-value in three digits; ``< 0.002`` for the smallest that `DRAWS` can show."""
    return "< 0.002" if p < 0.0021 else f"{p:.3f}"


def compare(a: Sequence[Items], b: Sequence[Items], draws: int = DRAWS, seed: int = SEED) -> Comparison | None:
    """Paired bootstrap test of two models; the score is the mean over subsets.

    All subsets share the draws, as in `Items.samples`: parallel subsets are translations of the same items, and drawn
    apart they would count as that many more items.

    Args:
        a: Items of the first model, an entry a subset.
        b: Items of the second, in the same order.
        draws: Bootstrap samples.
        seed: Of the draws.

    Returns:
        None where the items do not pair: other lengths, other statistics, or resamples of the whole task.
    """
    pairs = list(zip(a, b, strict=False))
    if not pairs or len(a) != len(b) or any(not _paired(x, y) for x, y in pairs):
        return None
    samples = np.mean([x.samples(draws, seed) - y.samples(draws, seed) for x, y in pairs], axis=0)
    difference = float(np.mean([x.score() - y.score() for x, y in pairs]))
    return _comparison(samples, difference, sum(len(x.values) for x, _ in pairs))


def mean_of(comparisons: Sequence[Comparison]) -> Comparison:
    """The test of the mean difference over tasks, from the paired samples of each: one or more, of the same draws."""
    samples = np.mean([each.samples for each in comparisons], axis=0)
    difference = float(np.mean([each.difference for each in comparisons]))
    return _comparison(samples, difference, sum(each.n for each in comparisons))


def _comparison(samples: np.ndarray, difference: float, n: int) -> Comparison:
    below, above = (samples <= 0).sum(), (samples >= 0).sum()
    p = min(1.0, 2 * (min(below, above) + 1) / (len(samples) + 1))  # + 1: never claim less than the draws can show
    return Comparison(difference, *interval(samples), p=float(p), n=n, samples=samples)


def _paired(a: Items, b: Items) -> bool:
    return a.statistic == b.statistic != "resamples" and len(a.values) == len(b.values)


def _draws(n: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each item is drawn, (some draws, n) at a time."""
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // n)
    for start in range(0, draws, step):
        yield generator.multinomial(n, np.full(n, 1 / n), size=min(step, draws - start))


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Average ranks of the items within each bootstrap sample, (draws, n): no sorting per draw."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))
    per_group = np.add.reduceat(counts[:, order], starts, axis=1)  # (draws, groups)
    before = per_group.cumsum(axis=1) - per_group
    return (before + (per_group + 1) / 2)[:, group]


def _correlation(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> np.ndarray:
    total = counts.sum(axis=1, keepdims=True)
    a = a - (counts * a).sum(axis=1, keepdims=True) / total
    b = b - (counts * b).sum(axis=1, keepdims=True) / total
    variance = (counts * a * a).sum(axis=1) * (counts * b * b).sum(axis=1)
    return (counts * a * b).sum(axis=1) / np.sqrt(np.maximum(variance, 1e-30))


def _average_precision(values: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """As scikit-learn's average_precision_score: tied values share one threshold."""
    _, group = np.unique(-values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))
    drawn = np.add.reduceat(counts[:, order], starts, axis=1)
    positive = np.add.reduceat((counts * labels)[:, order], starts, axis=1)
    precision = positive.cumsum(axis=1) / np.maximum(drawn.cumsum(axis=1), 1)
    return (precision * positive).sum(axis=1) / np.maximum(positive.sum(axis=1), 1)
