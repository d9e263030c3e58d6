"""What a server can be told, and the check that it fits the model. Knows nothing of HTTP or of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Literal

from gircse.errors import UsageError

if TYPE_CHECKING:
    from gircse.model import GIRCSE

MAX_ITEMS = 2048
"""Inputs of one request in OpenAI's contract."""

LongTexts = Literal["refuse", "cut"]

InputType = Literal["query", "document"]
"""What a text is to a search; a model may have a prompt of its own for each."""


@dataclass(frozen=True)
class ServeSettings:
    """Limits and behaviour of a server. The command line has a flag and an environment variable for each.

    Attributes:
        host: Address to listen on.
        port: Port; 0 takes a free one.
        served_names: Names that clients may call the model by; the first is what answers carry. The model's folder
            name where empty.
        api_key: What `Authorization: Bearer` must carry; None lets everybody in.
        cors_origins: Origins whose pages may call from a browser.
        num_steps: K where a request names none; the model's where None.
        max_num_steps: Largest K of a request.
        max_tokens: Longest text in tokens, instruction included; the model's `max_seq_length` where None.
        long_texts: Refuse a longer text (413) or cut it at its end.
        max_items: Texts of a request.
        max_body_mb: Size of a request's body in megabytes (10⁶ bytes).
        max_requests: Requests in progress at once.
        max_queue_texts: Texts waiting or in progress, over all requests.
        request_timeout: Seconds that a request may take, waiting included.
        grace_period: Seconds for finishing what is queued after SIGTERM.
        batch_tokens: Padded tokens of a batch; 4,096 on a CPU and 16,384 elsewhere where None.
        log_json: One JSON object a line.
        log_texts: Write texts and instructions to the log.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    served_names: tuple[str, ...] = ()
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    num_steps: int | None = None
    max_num_steps: int = 20
    max_tokens: int | None = None
    long_texts: LongTexts = "refuse"
    max_items: int = MAX_ITEMS
    max_body_mb: float = 16.0
    max_requests: int = 256
    max_queue_texts: int = 8192
    request_timeout: float = 600.0
    grace_period: float = 30.0
    batch_tokens: int | None = None
    log_json: bool = False
    log_texts: bool = False

    def __post_init__(self) -> None:
        at_least_one = {"max_tokens", "max_items", "max_requests", "max_queue_texts", "batch_tokens"}
        for name in sorted(at_least_one):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{_flag(name)} must be 1 or more, not {value}")
        for name in ("max_body_mb", "request_timeout"):
            if not 0 < getattr(self, name) < inf:
                raise UsageError(f"{_flag(name)} must be above 0 and finite, not {getattr(self, name)}")
        if self.max_num_steps < 0 or not 0 <= self.grace_period < inf:
            raise UsageError("--max-num-steps and --grace-period must be 0 or more, and finite")
        if self.max_items > MAX_ITEMS:
            raise UsageError(f"--max-items is at most {MAX_ITEMS}, the limit of OpenAI's interface")
        if self.max_queue_texts < self.max_items + 1:
            raise UsageError(
                f"--max-queue-texts ({self.max_queue_texts}) must be above --max-items ({self.max_items}): "
                "a full request and a query to rerank by must fit"
            )
        if self.api_key is not None and (not self.api_key.strip() or not self.api_key.isascii()):
            raise UsageError("--api-key must be ASCII and not empty")
        if self.num_steps is not None:
            self.check_steps(self.num_steps)

    def check_steps(self, num_steps: int) -> None:
        """Refuse a K of requests that name none which no request could name.

        Raises:
            UsageError: It is above the largest.
        """
        if num_steps > self.max_num_steps:
            raise UsageError(f"K = {num_steps} is above --max-num-steps ({self.max_num_steps}); raise the latter")


@dataclass(frozen=True)
class ModelLimits:
    """Settings that depend on the model, filled in.

    Attributes:
        names: Served names, never empty.
        num_steps: K where a request names none.
        max_tokens: Longest text in tokens, instruction included.
        batch_tokens: Padded tokens of a batch.
    """

    names: tuple[str, ...]
    num_steps: int
    max_tokens: int
    batch_tokens: int


def fit_to_model(settings: ServeSettings, model: GIRCSE, default_name: str) -> ModelLimits:
    """Fill in what the model decides and refuse limits that it cannot keep.

    Raises:
        UsageError: The model has too few positions, or the default K is above the largest.
    """
    max_tokens = settings.max_tokens or model.max_seq_length or 512
    num_steps = model.num_steps if settings.num_steps is None else settings.num_steps
    settings.check_steps(num_steps)
    positions = model.encoder.decoder.max_positions
    if max_tokens + settings.max_num_steps > positions:
        raise UsageError(
            f"--max-tokens ({max_tokens}) and --max-num-steps ({settings.max_num_steps}) exceed the backbone's "
            f"{positions} positions together; lower one of them"
        )
    batch_tokens = settings.batch_tokens or (4096 if model.device.type == "cpu" else 16384)
    return ModelLimits(settings.served_names or (default_name,), num_steps, max_tokens, batch_tokens)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
