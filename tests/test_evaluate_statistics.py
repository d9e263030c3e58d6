"""Bootstrap, paired test, perturbations and the count of operations, against plain ways to compute them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from gircse import refiner
from gircse.errors import UsageError
from gircse.evaluate.cost import TransformerSize, step_clock, transformer_size
from gircse.evaluate.perturb import DESCRIPTIONS, perturb
from gircse.evaluate.statistics import Items, compare, interval
from gircse.model import GIRCSE

RNG = np.random.default_rng(0)


def _tied(n: int) -> np.ndarray:
    return RNG.integers(0, 6, n).astype(float)


@pytest.mark.parametrize("statistic", ["mean", "spearman", "ap"])
def test_weighted_statistics_equal_resampling(statistic: str) -> None:
    n = 40
    gold = None if statistic == "mean" else _tied(n) if statistic == "spearman" else RNG.integers(0, 2, n)
    items = Items(statistic, _tied(n), gold)
    counts = RNG.multinomial(n, np.full(n, 1 / n), size=5)

    def plain(values: np.ndarray, truth: np.ndarray) -> float:
        if statistic == "spearman":
            return float(spearmanr(values, truth).statistic)  # type: ignore[attr-defined]
        return float(average_precision_score(truth, values)) if statistic == "ap" else float(values.mean())

    truth = items.gold if items.gold is not None else np.zeros(n)
    drawn = [np.repeat(np.arange(n), row) for row in counts]
    expected = [plain(items.values[at], truth[at]) for at in drawn]
    assert items._weighted(counts) == pytest.approx(expected, abs=1e-12)
    assert items.score() == pytest.approx(plain(items.values, truth), abs=1e-12)


def test_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    covered = 0
    for _ in range(200):
        low, high = interval(Items("mean", RNG.normal(size=60)).samples(300))
        covered += low <= 0 <= high
    assert 175 <= covered <= 199


def test_pairing_sees_what_intervals_do_not() -> None:
    difficulty = RNG.normal(size=200)
    a, b = Items("mean", difficulty + 0.1 + 0.05 * RNG.normal(size=200)), Items("mean", difficulty)
    assert interval(a.samples())[0] < interval(b.samples())[1]  # apart they overlap
    found = compare([a], [b])
    assert found is not None
    assert found.difference == pytest.approx(0.1, abs=0.02)
    assert found.low > 0
    assert found.p < 0.01
    same = compare([b], [b])
    assert same is not None
    assert same.p == 1.0
    noise = compare([Items("mean", RNG.normal(size=200))], [Items("mean", RNG.normal(size=200))])
    assert noise is not None
    assert noise.p > 0.01


def test_what_does_not_pair_is_not_compared() -> None:
    assert compare([Items("mean", np.ones(3))], [Items("mean", np.ones(4))]) is None
    resamples = Items("resamples", np.array([0.5, 0.6]))
    assert compare([resamples], [resamples]) is None


def test_the_noise_of_two_clusterings_averages_out() -> None:
    spread = [Items("resamples", RNG.normal(0.5, 0.02, size=10)).samples() for _ in range(4)]
    assert np.mean(spread, axis=0).std() < 0.7 * np.mean([samples.std() for samples in spread])


def test_no_interval_goes_beyond_what_a_score_can_be() -> None:
    samples = Items("resamples", np.array([0.7, 0.95, 1.0, 1.0])).samples()
    assert samples.max() == 1.0


TEXT = "The quick brown fox jumps over the lazy dog while seven wizards quietly watch from the hill."


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_perturbations_change_texts_and_repeat(kind: str) -> None:
    changed = perturb(TEXT, kind, seed=1)
    assert changed != TEXT
    assert changed == perturb(TEXT, kind, seed=1)
    texts = [TEXT + str(i) for i in range(8)]
    assert kind == "truncate" or [perturb(t, kind, 1) for t in texts] != [perturb(t, kind, 2) for t in texts]


def test_perturbations_do_what_they_say() -> None:
    assert perturb("one two three four five six", "truncate", 0) == "one two three four"
    assert perturb(TEXT, "case", 0).lower() == TEXT.lower()
    noisy = iter(perturb(TEXT, "noise", 0))
    assert all(letter in noisy for letter in TEXT)  # only insertions
    assert len(perturb(TEXT, "typos", 0).split()) == len(TEXT.split())
    with pytest.raises(UsageError, match="typos"):
        perturb(TEXT, "sarcasm", 0)


def test_operations_by_hand() -> None:
    size = TransformerSize(parameters=100, layers=2, attention_width=4, vocabulary=50, width=3, causal=True)
    prompt = 2 * 100 * 10 + 4 * 2 * 4 * 100 / 2
    assert size.flops(10, 0) == prompt
    steps = sum(4 * 50 * 3 + 2 * 100 + 4 * 2 * 4 * (10 + k) for k in (1, 2, 3))
    assert size.flops(10, 3) == prompt + steps
    assert size.flops(np.array([10.0, 20.0]), 3)[0] == prompt + steps  # type: ignore[index]


def test_size_and_clock_of_a_model(model: GIRCSE) -> None:
    size = transformer_size(model)
    assert size is not None
    assert (size.layers, size.attention_width, size.width, size.causal) == (2, 32, 32, True)
    everything = sum(p.numel() for p in model.encoder.backbone.parameters())
    assert 0 < size.parameters < everything
    for trained in (False, True):  # by groups of rows, and by the plain loop
        model.encoder.backbone.requires_grad_(trained)
        with step_clock(model, 3) as clock:
            model.encode_states(["one text", "and another one"], num_steps=3)
        assert clock[0] > 0
        assert np.all(np.diff(clock) > 0)  # every further step takes time
        before = clock.copy()
        model.encode_states(["no clock any more"], num_steps=3)
        assert np.array_equal(clock, before)


def test_the_clock_leaves_the_layers_to_what_makes_them_fast(model: GIRCSE, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    own = refiner.takes_groups
    monkeypatch.setattr(refiner, "takes_groups", lambda decoder: taken.append(own(decoder)) or taken[-1])
    model.encode_states(["one text"], num_steps=2)
    without = list(taken)
    with step_clock(model, 2) as clock:
        model.encode_states(["one text"], num_steps=2)
    assert without
    assert taken == without * 2
    assert np.all(clock > 0)
