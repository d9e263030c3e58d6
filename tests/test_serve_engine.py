"""The engine without HTTP: every row gets its own vector, batches are fair and full, failures stay apart."""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from gircse.model import GIRCSE
from gircse.serve.engine import BatchReport, Engine, ModelBackend
from gircse.serve.fair_queue import MIN_FILL, SMALL_BATCH_TOKENS, FairQueue, Job
from gircse.serve.refusals import ModelFailedError, StoppingError
from tests.serving import HashBackend


@pytest.fixture
def engines() -> Iterator[Any]:
    started: list[Engine] = []

    def make(backend: Any, *, batch_tokens: int = 200, start: bool = True, **options: Any) -> Engine:
        engine = Engine(backend, batch_tokens=batch_tokens, **options)
        started.append(engine)
        if start:
            engine.start()
        return engine

    yield make
    for engine in started:
        engine.stop(5)


def expect(ids: list[list[int]], num_steps: int, future: Future[np.ndarray]) -> None:
    expected = np.stack([HashBackend.vector(row, num_steps) for row in ids])
    np.testing.assert_array_equal(future.result(20), expected)


def test_the_queue_gives_every_row_once_in_full_batches_within_the_budget() -> None:
    generator = random.Random(3)
    queue, expected = FairQueue(), set()
    for name in range(40):
        lengths = [generator.randint(1, 120) for _ in range(generator.choice([1, 1, 3, 200]))]
        job = Job(lengths, generator.choice([0, 1, 5, 20]), payload=name)
        queue.add(job)
        expected |= {(name, row) for row in range(len(lengths))}
    taken, padded, useful = set(), 0, 0
    while queue:
        batch = queue.take(2048)
        assert batch.padded_tokens <= 2048
        assert batch.padded_tokens <= SMALL_BATCH_TOKENS or batch.tokens >= MIN_FILL * batch.padded_tokens
        rows = {(job.payload, row) for job, row in batch.rows}
        assert len(rows) == len(batch.rows)
        assert not rows & taken
        taken |= rows
        padded, useful = padded + batch.padded_tokens, useful + batch.tokens
    assert taken == expected
    assert useful / padded > 0.8, "on the whole little of it is padding"


def test_a_single_row_above_the_budget_gets_a_batch_of_its_own() -> None:
    queue = FairQueue()
    queue.add(Job([500, 3], 5))
    assert [row for _, row in queue.take(100).rows] == [0]
    assert [row for _, row in queue.take(100).rows] == [1]
    assert queue.take(100).rows == []


def test_a_large_request_does_not_starve_a_small_one_nor_the_small_ones_it() -> None:
    queue = FairQueue()
    large = Job([40] * 2048, 5)
    queue.add(large)
    queue.take(1000)
    behind = []
    for _ in range(30):  # a stream of single queries, one after the other
        query = Job([8], 5)
        queue.add(query)
        batches = 1
        while query.waiting:
            batch = queue.take(1000)
            batches += query.waiting != []
        behind.append(batches)
        assert {id(job) for job, _ in batch.rows} == {id(query)}, "a short query does not wait for a large one's rows"
    assert max(behind) <= 2
    waiting = len(large.waiting)
    small = [Job([40], 5) for _ in range(200)]
    for job in small:
        queue.add(job)
    for _ in range(20):
        queue.take(1000)
    assert len(large.waiting) < waiting, "the large one goes on as well"


@pytest.mark.parametrize("large", [Job([400], 5), Job([480] * 40, 5), Job([60], 5, exclusive=True)])
def test_an_endless_stream_of_short_queries_does_not_starve_what_is_longer(large: Job) -> None:
    queue = FairQueue()
    queue.add(large)
    rows, batches = len(large.waiting), 0
    while large.waiting:
        for _ in range(2):  # there is never nothing shorter to do
            queue.add(Job([12], 5))
        queue.take(4096)
        batches += 1
        assert batches <= 40 * rows, "a row of 485 tokens waits for so many short queries as have its tokens"


def test_rows_of_different_k_share_a_batch_and_get_their_own_vectors(model: GIRCSE) -> None:
    texts = ["a cat", "dogs and cats!", "x", "a longer text than these", "cats", "why?"]
    ids = model.tokenize_texts(texts).ids
    steps = [0, 3, 1, 5, 0, 2]
    vectors = ModelBackend(model).embed(ids, steps)
    for text, k, vector in zip(texts, steps, vectors, strict=True):
        alone = model.encode(text, num_steps=k, normalize_embeddings=True)
        np.testing.assert_allclose(vector, alone, atol=1e-5)
    np.testing.assert_allclose(
        ModelBackend(model).embed(ids[:1], [0])[0],
        model.encode(texts[0], num_steps=0, normalize_embeddings=True),
        atol=1e-5,
    )


def test_many_threads_get_what_they_asked_for(engines: Any) -> None:
    reports: list[BatchReport] = []
    backend = HashBackend(pause=0.001)
    engine = engines(backend, on_batch=reports.append)
    wrong: list[Exception] = []

    def client(seed: int) -> None:
        generator = random.Random(seed)
        try:
            for _ in range(15):
                ids = [
                    [generator.randint(0, 99) for _ in range(generator.randint(1, 30))]
                    for _ in range(generator.choice([1, 1, 2, 40]))
                ]
                steps = generator.choice([0, 1, 5])
                expect(ids, steps, engine.submit(ids, steps))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert engine.queue_length == (0, 0)
    assert sum(report.rows for report in reports) == sum(map(len, backend.batches))
    assert max(report.rows for report in reports) > 1
    assert engine.texts_per_second > 0


def test_a_bad_row_fails_its_own_request_only(engines: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine = engines(HashBackend(fail=lambda ids: any(13 in row for row in ids)), start=False)
    good = [[[1, 2]], [[3, 4], [5, 6]], [[7, 8]]]
    futures = [engine.submit(ids, 2) for ids in good]
    bad = engine.submit([[1, 1], [13, 1], [2, 2]], 2)
    engine.start()
    for ids, future in zip(good, futures, strict=True):
        expect(ids, 2, future)
    with pytest.raises(ModelFailedError, match="RuntimeError"):
        bad.result(5)
    expect([[9]], 1, engine.submit([[9]], 1))
    assert engine.healthy


def test_an_error_that_passes_loses_nothing(engines: Any) -> None:
    failures = iter([True])
    engine = engines(HashBackend(fail=lambda ids: next(failures, False)), start=False)
    futures = [engine.submit([[n, n]], 1) for n in range(4)]
    engine.start()
    for n, future in enumerate(futures):
        expect([[n, n]], 1, future)


def test_a_failed_batch_is_freed_before_its_halves_run(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Held:
        """Stands for the activations of a batch."""

    held: list[weakref.ref[Held]] = []
    alive: list[int] = []

    class Full(HashBackend):
        def embed(self, ids: Any, num_steps: Any) -> np.ndarray:
            alive.append(sum(activations() is not None for activations in held))
            own = Held()
            held.append(weakref.ref(own))
            if len(ids) > 1:
                raise RuntimeError("out of memory")
            return super().embed(ids, num_steps)

    monkeypatch.setattr("gircse.serve.engine.logger.disabled", True)  # pytest keeps what is logged, tracebacks too
    engine = engines(Full(), start=False)
    future = engine.submit([[n] for n in range(4)], 1)
    engine.start()
    expect([[n] for n in range(4)], 1, future)
    assert alive == [0] * 7


def test_vectors_that_are_not_finite_are_an_error(engines: Any) -> None:
    class Broken(HashBackend):
        def embed(self, ids: Any, num_steps: Any) -> np.ndarray:
            vectors = super().embed(ids, num_steps)
            vectors[[row == [13] for row in ids]] = np.nan
            return vectors

    engine = engines(Broken(), start=False)
    good, bad = engine.submit([[1]], 1), engine.submit([[13]], 1)
    engine.start()
    expect([[1]], 1, good)
    with pytest.raises(ModelFailedError, match="not finite"):
        bad.result(5)


def test_a_backend_that_always_fails_makes_the_engine_unhealthy(engines: Any) -> None:
    engine = engines(HashBackend(fail=lambda ids: True))
    for n in range(20):
        assert engine.healthy
        with pytest.raises(ModelFailedError):
            engine.submit([[n]], 1).result(5)
    assert not engine.healthy


def test_cancelled_requests_are_dropped(engines: Any) -> None:
    backend = HashBackend(pause=0.2)
    engine = engines(backend, batch_tokens=10)
    first = engine.submit([[1, 1, 1, 1]], 1)
    while engine.queue_length != (0, 0):
        time.sleep(0.01)
    gone = engine.submit([[13] * 8] * 50, 1)
    kept = engine.submit([[2]], 1)
    assert gone.cancel()
    assert engine.queue_length == (1, 2)
    expect([[1, 1, 1, 1]], 1, first)
    expect([[2]], 1, kept)
    assert not any(13 in row for batch in backend.batches for row in batch)


def test_other_work_runs_in_the_engines_thread(engines: Any) -> None:
    engine = engines(HashBackend())
    assert engine.call(lambda: threading.current_thread().name, 5).result(5) == "gircse-engine"
    with pytest.raises(ModelFailedError, match="ZeroDivisionError"):
        engine.call(lambda: 1 / 0, 5).result(5)
    expect([[1]], 1, engine.submit([[1]], 1))


def test_stopping_finishes_the_queue_or_says_so(engines: Any) -> None:
    engine = engines(HashBackend(pause=0.05), batch_tokens=4)
    futures = [engine.submit([[n]], 1) for n in range(6)]
    assert engine.stop(10)
    for n, future in enumerate(futures):
        expect([[n]], 1, future)
    with pytest.raises(StoppingError):
        engine.submit([[1]], 1)

    slow = engines(HashBackend(pause=0.3), batch_tokens=4)
    futures = [slow.submit([[n]], 1) for n in range(4)]
    assert not slow.stop(0.1)
    with pytest.raises(StoppingError):
        futures[-1].result(5)
