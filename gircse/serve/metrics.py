"""What a server counts, in Prometheus' terms. Knows batches and answers; knows nothing of models or HTTP servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from gircse.serve.engine import BatchReport

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_COUNTS = tuple(2.0**power for power in range(12))
_TOKENS = tuple(2.0**power for power in range(4, 19))
_STEPS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 32, 64)


class Metrics:
    """Counters and histograms in a registry of their own, so that two servers in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        here = self.registry
        self.requests = Counter("gircse_requests", "Answers.", ["endpoint", "status"], registry=here)
        self.errors = Counter("gircse_errors", "Refusals and failures.", ["kind"], registry=here)
        self.seconds = Histogram(
            "gircse_request_seconds", "From first byte to last.", ["endpoint"], buckets=_SECONDS, registry=here
        )
        self.steps = Histogram("gircse_num_steps", "K of answered requests.", buckets=_STEPS, registry=here)
        self.truncated = Counter("gircse_truncated_texts", "Texts that were cut.", registry=here)
        self.wait = Histogram(
            "gircse_queue_wait_seconds", "A text's wait for its batch.", buckets=_SECONDS, registry=here
        )
        self.batch_texts = Histogram("gircse_batch_texts", "Texts of a batch.", buckets=_COUNTS, registry=here)
        self.batch_tokens = Histogram(
            "gircse_batch_padded_tokens", "Padded tokens of a batch, K included.", buckets=_TOKENS, registry=here
        )
        self.batch_seconds = Histogram(
            "gircse_batch_seconds", "A batch in the model; its rate is how busy the model is.", buckets=_SECONDS,
            registry=here,
        )  # fmt: skip
        self.batch_failures = Counter("gircse_batch_failures", "Batches that the model failed on.", registry=here)
        self.tokens = Counter(
            "gircse_tokens", "Tokens through the model without padding; its rate is tokens/s.", ["kind"], registry=here
        )

    def watch_queue(self, length: Callable[[], tuple[int, int]]) -> None:
        """Show the queue's length as gauges, asked for at every scrape."""

        class Queue(Collector):
            def collect(self) -> Iterator[Metric]:
                texts, tokens = length()
                yield GaugeMetricFamily("gircse_queue_texts", "Texts that wait for a batch.", texts)
                yield GaugeMetricFamily("gircse_queue_tokens", "Their tokens, K included.", tokens)

        self.registry.register(Queue())

    def observe_batch(self, report: BatchReport) -> None:
        """Count a run of the model."""
        self.batch_seconds.observe(report.seconds)
        if report.failed:
            self.batch_failures.inc()
            return
        self.batch_texts.observe(report.rows)
        self.batch_tokens.observe(report.padded_tokens)
        self.tokens.labels("prompt").inc(report.tokens)
        self.tokens.labels("soft").inc(report.soft_tokens)
        for wait in report.waits:
            self.wait.observe(wait)

    def observe_answer(self, endpoint: str, status: int, seconds: float) -> None:
        """Count an answer of any kind."""
        self.requests.labels(endpoint, str(status)).inc()
        self.seconds.labels(endpoint).observe(seconds)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
