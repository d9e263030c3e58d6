"""One thread that owns the model and runs requests through it in batches. Works without HTTP.

Knows token ids, futures and a backend; knows nothing of texts, limits or clients.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gircse.serve.fair_queue import Batch, FairQueue, Job
from gircse.serve.refusals import ModelFailedError, StoppingError

if TYPE_CHECKING:
    from gircse.model import GIRCSE

logger = logging.getLogger("gircse.serve")

UNHEALTHY_AFTER = 20
"""Rows that failed one after the other, each in a batch of its own: then the device is gone, not the input bad."""


class Backend(Protocol):
    """What the engine needs of a model."""

    def embed(self, ids: Sequence[Sequence[int]], num_steps: Sequence[int]) -> np.ndarray:
        """Vectors of length 1, (n, d) float32, each row at its own K."""
        ...


class ModelBackend:
    """A GIRCSE model as the engine's backend: rows of different K share a run, and leave it after their own.

    Args:
        model: The model.
    """

    def __init__(self, model: GIRCSE) -> None:
        self.model = model.eval()

    def embed(self, ids: Sequence[Sequence[int]], num_steps: Sequence[int]) -> np.ndarray:
        """As `Backend.embed`."""
        import torch

        with torch.inference_mode():
            features = self.model.encoder.pad(ids)
            features = {name: value.to(self.model.device) for name, value in features.items()}
            vectors = self.model(features, num_steps=list(num_steps))["sentence_embedding"]
            vectors = vectors[:, : self.model.truncate_dim]
            return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()


@dataclass(frozen=True)
class BatchReport:
    """What one run of the model did, for metrics.

    Attributes:
        rows: Texts.
        tokens: Prompt tokens without padding.
        soft_tokens: Sum of the rows' K.
        padded_tokens: What the batch cost.
        seconds: How long it took.
        waits: Seconds that each row had waited.
        failed: Whether the model raised an error, or returned no vector that is finite.
    """

    rows: int
    tokens: int
    soft_tokens: int
    padded_tokens: int
    seconds: float
    waits: list[float]
    failed: bool


@dataclass
class _Request:
    """A job's other half: its token ids, where the vectors go and who waits for them."""

    ids: Sequence[Sequence[int]]
    future: Future[Any]
    function: Callable[[], Any] | None = None
    submitted: float = field(default_factory=time.monotonic)
    vectors: list[np.ndarray | None] = field(default_factory=list)
    missing: int = 0


class Engine:
    """Runs token ids through a backend in batches that are fair to all requests.

    Requests enter by `submit` from any thread; cancelling the future drops what has not started. An error of the
    backend is narrowed down by halving the batch, so that it fails no request but its own.

    Args:
        backend: The model.
        batch_tokens: Padded tokens of a batch.
        on_batch: Called in the engine's thread after each run.
    """

    def __init__(
        self, backend: Backend, *, batch_tokens: int, on_batch: Callable[[BatchReport], None] | None = None
    ) -> None:
        self.backend, self.batch_tokens = backend, batch_tokens
        self._on_batch = on_batch or (lambda report: None)
        self._queue = FairQueue()
        self._changed = threading.Condition()
        self._stopping = False
        self._open: set[Future[Any]] = set()
        self._failures = 0
        self._texts_per_second = 0.0
        self._thread = threading.Thread(target=self._run, name="gircse-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and the backend still works."""
        return self.running and self._failures < UNHEALTHY_AFTER

    @property
    def texts_per_second(self) -> float:
        """Recent speed of the backend; 0 before the first batch."""
        return self._texts_per_second

    @property
    def queue_length(self) -> tuple[int, int]:
        """Texts that wait for a batch, and their tokens with soft tokens."""
        with self._changed:
            return sum(len(job.waiting) for job in self._queue.jobs), sum(job.tokens for job in self._queue.jobs)

    def submit(self, ids: Sequence[Sequence[int]], num_steps: int) -> Future[np.ndarray]:
        """Queue a request.

        Args:
            ids: Token ids of every text, none empty.
            num_steps: K >= 0.

        Returns:
            The future of the vectors, (n, d) float32 of length 1. It fails with `ModelFailedError`.

        Raises:
            StoppingError: The engine is shutting down.
        """
        future: Future[np.ndarray] = Future()
        if not ids:
            raise ValueError("a request needs at least one text")
        request = _Request(ids, future, vectors=[None] * len(ids), missing=len(ids))
        self._enqueue(Job([len(row) for row in ids], num_steps, payload=request))
        return future

    def call(self, function: Callable[[], Any], tokens: int, num_steps: int = 0) -> Future[Any]:
        """Queue any other work that needs the model.

        Args:
            function: Run in the engine's thread, alone.
            tokens: Of the prompt that it reads.
            num_steps: K.
        """
        future: Future[Any] = Future()
        self._enqueue(Job([tokens], num_steps, exclusive=True, payload=_Request([[]], future, function)))
        return future

    def stop(self, timeout: float) -> bool:
        """Finish what is queued, then end the thread.

        Args:
            timeout: Seconds; what is left then fails with `StoppingError`.

        Returns:
            Whether everything was finished.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)
        with self._changed:
            left = [future for future in self._open if not future.done()]
            for job in self._queue.jobs:
                self._queue.discard(job)
        for future in left:
            _finish(future, StoppingError("the server stopped before this request was finished; send it again"))
        return not left

    # The rest runs in the engine's thread, but for _forget

    def _enqueue(self, job: Job) -> None:
        future = job.payload.future
        with self._changed:
            if self._stopping:
                raise StoppingError("the server is shutting down; send the request to another or again later")
            self._queue.add(job)
            self._open.add(future)
            self._changed.notify_all()
        future.add_done_callback(lambda done: self._forget(job))

    def _forget(self, job: Job) -> None:
        """A request is answered or nobody waits for it any more."""
        with self._changed:
            self._queue.discard(job)
            self._open.discard(job.payload.future)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopping)
                if not self._queue:
                    return
                batch = self._queue.take(self.batch_tokens)
            try:
                if batch.rows[0][0].exclusive:
                    self._run_function(batch.rows[0][0])
                else:
                    self._run_rows(batch)
            except Exception as error:  # a mistake of ours must not leave the others waiting for a dead thread
                logger.exception("the engine failed")
                for job, _ in batch.rows:
                    _finish(job.payload.future, _model_failed(error))

    def _run_function(self, job: Job) -> None:
        request: _Request = job.payload
        if request.future.done() or request.function is None:
            return
        started = time.monotonic()
        try:
            outcome = request.function()
        except Exception as error:
            logger.exception("a call of the model failed")
            outcome = _model_failed(error)
        seconds, wait = time.monotonic() - started, started - request.submitted
        tokens, steps, failed = job.lengths[0], job.num_steps, isinstance(outcome, ModelFailedError)
        self._on_batch(BatchReport(1, tokens, steps, tokens + steps, seconds, [wait], failed))
        _finish(request.future, outcome)

    def _run_rows(self, batch: Batch) -> None:
        """Run a batch; after an error its halves, down to the row that is to blame."""
        rows = [(job, row) for job, row in batch.rows if not job.payload.future.done()]
        if not rows:
            return
        started = time.monotonic()
        ids = [job.payload.ids[row] for job, row in rows]
        steps = [job.num_steps for job, _ in rows]
        failed: ModelFailedError | None = None  # not the error itself: its frames would keep the batch in memory
        vectors = np.empty((0, 0), dtype=np.float32)
        try:
            vectors = self.backend.embed(ids, steps)
        except Exception as error:
            failed = _model_failed(error)
            logger.exception("a batch of %d texts failed", len(rows))
        finite = np.isfinite(vectors).all(axis=1) if failed is None else np.ones(len(rows), dtype=bool)
        strange = np.logical_not(finite)
        if strange.any():
            logger.error("%d of %d vectors of a batch are not finite", int(strange.sum()), len(rows))
        useless = failed is not None or bool(strange.all())
        seconds = time.monotonic() - started
        padded = max(map(len, ids)) * len(rows) + sum(steps)
        waits = [started - job.payload.submitted for job, _ in rows]
        self._on_batch(BatchReport(len(rows), sum(map(len, ids)), sum(steps), padded, seconds, waits, useless))
        if failed is None:
            self._failures = self._failures + 1 if useless else 0
            rate = len(rows) / max(seconds, 1e-6)
            self._texts_per_second = 0.8 * self._texts_per_second + 0.2 * rate if self._texts_per_second else rate
            self._deliver(rows, vectors, strange)
        elif len(rows) == 1:
            self._failures += 1
            _finish(rows[0][0].payload.future, failed)
        else:
            middle = len(rows) // 2
            for half in (rows[:middle], rows[middle:]):
                self._run_rows(Batch(half))

    @staticmethod
    def _deliver(rows: list[tuple[Job, int]], vectors: np.ndarray, strange: np.ndarray) -> None:
        for (job, row), vector, is_strange in zip(rows, vectors, strange, strict=True):
            request: _Request = job.payload
            if is_strange:
                words = "the model returned a vector that is not finite"
                _finish(request.future, ModelFailedError(words, logged=False))
                continue
            request.vectors[row] = vector
            request.missing -= 1
            if request.missing == 0:
                _finish(request.future, np.stack([vector for vector in request.vectors if vector is not None]))


def _model_failed(error: Exception) -> ModelFailedError:
    return ModelFailedError(f"the model failed on this request ({type(error).__name__}); the server's log has the rest")


def _finish(future: Future[Any], outcome: Any) -> None:
    """Give a future its result or its error, unless it was cancelled or has failed in the meantime."""
    try:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        pass
