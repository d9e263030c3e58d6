"""Which rows make the next batch: self-clocked fair queueing over requests, then rows of similar cost.

Knows token counts; knows nothing of models, threads or HTTP.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SMALL_BATCH_TOKENS = 512
"""Up to this many padded tokens a batch may mix any lengths and K: padding costs less than another pass."""

MIN_FILL = 0.6
"""Share of a larger batch's padded tokens that are not padding. Its prompts are run in groups of similar length, so
that padding costs less than it counts here."""


class Job:
    """The texts of one request that wait for their batches.

    Args:
        lengths: Prompt tokens of every text.
        num_steps: K of the request.
        exclusive: Not texts to batch but one piece of work that needs the model for itself.
        payload: Whatever the owner needs with it.
    """

    def __init__(self, lengths: Sequence[int], num_steps: int, *, exclusive: bool = False, payload: Any = None) -> None:
        self.num_steps, self.exclusive, self.payload = num_steps, exclusive, payload
        self.lengths = lengths
        self.waiting = sorted(range(len(lengths)), key=lambda row: lengths[row])  # shortest first
        self.tokens = sum(lengths) + num_steps * len(lengths)  # of the rows that wait
        self.served = 0  # tokens, on the queue's clock
        self.arrival = 0

    def priority(self) -> tuple[int, int]:
        """Smallest first: when, on the queue's clock, the next row would be done."""
        return self.served + self.lengths[self.waiting[-1]] + self.num_steps, self.arrival


@dataclass
class Batch:
    """Rows that go through the model together.

    Attributes:
        rows: Jobs and the indices of their texts.
        longest: Prompt tokens of the longest row.
        soft_tokens: Sum of the rows' K.
        tokens: That, and the sum of their prompt tokens.
    """

    rows: list[tuple[Job, int]]
    longest: int = 0
    soft_tokens: int = 0
    tokens: int = 0

    @property
    def padded_tokens(self) -> int:
        """What the batch costs: the longest prompt × rows, and each row's own K."""
        return self.longest * len(self.rows) + self.soft_tokens

    def admits(self, length: int, num_steps: int, budget: int) -> bool:
        """Whether a row would fit the budget without too much padding."""
        padded = max(self.longest, length) * (len(self.rows) + 1) + self.soft_tokens + num_steps
        useful = self.tokens + length + num_steps
        return padded <= budget and (padded <= SMALL_BATCH_TOKENS or useful >= MIN_FILL * padded)

    def add(self, job: Job, row: int) -> None:
        """Put a row in."""
        self.rows.append((job, row))
        self.longest = max(self.longest, job.lengths[row])
        self.soft_tokens += job.num_steps
        self.tokens += job.lengths[row] + job.num_steps


class FairQueue:
    """Jobs, each with a clock of the tokens it was served.

    The job whose longest row would be done first leads the next batch with it, and that is what the clock shows then;
    the others add rows of about that cost in turns. A new job starts at the clock (S. J. Golestani, "A self-clocked
    fair queueing scheme", 1994): it waits for no more than one row of each of those being served, however large they
    are, and as every leader moves the clock on, no stream of short requests overtakes a long one for ever.
    """

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._clock = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def jobs(self) -> list[Job]:
        """Jobs with rows that wait."""
        return list(self._jobs.values())

    def add(self, job: Job) -> None:
        """Queue a job, which has at least one row."""
        self._arrivals += 1
        job.arrival, job.served = self._arrivals, self._clock
        self._jobs[job.arrival] = job

    def discard(self, job: Job) -> None:
        """Forget a job, if it is still here."""
        self._jobs.pop(job.arrival, None)

    def take(self, budget: int) -> Batch:
        """The next batch, of at most `budget` padded tokens unless a single row is larger; empty if nothing waits."""
        heap = [(job.priority(), job) for job in self._jobs.values()]
        heapq.heapify(heap)  # arrivals differ, so jobs themselves are never compared
        batch = Batch([])
        leader_is_small = False
        while heap:
            job = heap[0][1]
            if not batch.rows:
                self._clock = max(self._clock, job.priority()[0])
                leader_is_small = job.tokens <= SMALL_BATCH_TOKENS
                place: int | None = len(job.waiting) - 1
            else:
                place = self._matching_row(job, batch, budget, leader_is_small)
            if place is None:
                heapq.heappop(heap)
                continue
            self._move(job, place, batch)
            if job.exclusive:
                break
            if job.waiting:
                heapq.heapreplace(heap, (job.priority(), job))
            else:
                heapq.heappop(heap)
        return batch

    def _move(self, job: Job, place: int, batch: Batch) -> None:
        row = job.waiting.pop(place)
        cost = job.lengths[row] + job.num_steps
        job.tokens -= cost
        job.served += cost
        batch.add(job, row)
        if not job.waiting:
            self.discard(job)

    @staticmethod
    def _matching_row(job: Job, batch: Batch, budget: int, leader_is_small: bool) -> int | None:
        """Place in `job.waiting` of the row that suits the batch best, if one does."""
        if job.exclusive or (leader_is_small and job.tokens > budget):
            return None  # a short query is answered sooner without a large request's rows beside it
        place = bisect_right(job.waiting, batch.longest, key=lambda row: job.lengths[row]) - 1
        place = max(place, 0)  # all are longer: the shortest of them
        return place if batch.admits(job.lengths[job.waiting[place]], job.num_steps, budget) else None
