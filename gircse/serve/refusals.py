"""Why a request is not answered. Each kind is one class; the HTTP layer gives it a status code."""

from __future__ import annotations

from gircse.errors import GircseError


class Refusal(GircseError):
    """A request that is not answered.

    Args:
        message: One sentence that says what to do.
        param: The field of the request that is to blame.
        code: A word for programs.
    """

    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or self.code


class InvalidRequestError(Refusal):
    """A field of the request is wrong."""

    code = "invalid_value"


class UnknownModelError(Refusal):
    """The request names a model that is not served here."""

    code = "model_not_found"


class TooLargeError(Refusal):
    """A limit on size is exceeded."""

    code = "too_large"


class BusyError(Refusal):
    """Too much is waiting already.

    Args:
        message: What to do.
        retry_after: Seconds after which it is worth trying again.
    """

    code = "queue_full"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StoppingError(Refusal):
    """The server is shutting down."""

    code = "shutting_down"


class TimedOutError(Refusal):
    """The request took too long."""

    code = "timeout"


class ModelFailedError(Refusal):
    """The model raised an error, or returned something that is no vector.

    Args:
        message: What happened.
        logged: Whether the server's log has more of it.
    """

    code = "model_failed"

    def __init__(self, message: str, *, logged: bool = True) -> None:
        super().__init__(message)
        self.logged = logged
