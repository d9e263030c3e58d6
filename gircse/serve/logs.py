"""Log lines of the server: JSON objects or `key=value`, one a line, on standard error. Knows nothing of requests."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any


class LineFormatter(logging.Formatter):
    """A record as one line: time, level, message, and what was given as ``extra={"facts": {...}}``.

    Args:
        as_json: JSON objects instead of ``key=value``.
    """

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """One line, also where the message or a traceback has several."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        facts: dict[str, Any] = {"time": at, "level": record.levelname.lower(), "message": record.getMessage()}
        facts |= getattr(record, "facts", {})
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        if self.as_json:
            return json.dumps(facts)
        head = f"{facts.pop('time')} {facts.pop('level'):<7} {' '.join(facts.pop('message').split())}"
        return " ".join([head, *(f"{key}={_plain(value)}" for key, value in facts.items())])


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if text.isascii() and text.isprintable() and not set(text) & set(' "=') else json.dumps(text)


def configure_logging(*, as_json: bool) -> None:
    """Send the server's and uvicorn's lines to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(as_json=as_json))
    for name in ("gircse.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
