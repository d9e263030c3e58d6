"""The gate in front of every request: id, key, size, how many at once, log line, metrics. Plain ASGI.

Knows headers and bytes; knows nothing of what a request means.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gircse.serve.errors import error_response
from gircse.serve.metrics import Metrics
from gircse.serve.settings import ServeSettings

logger = logging.getLogger("gircse.serve")

CLIENT_GONE = 499
"""In logs and metrics: nobody waited for the answer."""

_ENDPOINTS = (
    "/v1/embeddings", "/v1/rerank", "/v1/classify", "/v1/explain", "/v1/models", "/health", "/health/live",
    "/health/ready", "/metrics", "/", "/docs", "/openapi.json",
)  # fmt: skip
_PUBLIC = frozenset(
    {"/", "/docs", "/docs/oauth2-redirect", "/openapi.json", "/health", "/health/live", "/health/ready"}
)
"""What may be read without the key; what the API's page loads is public too."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_DRAIN = 4  # times the limit on bodies: a client that is told "too large" has usually to finish sending first
_BODIES = 8  # so many of the largest size are held at once, whoever sends them
_SILENCE = 20.0  # seconds without a byte of the body: whoever is slower keeps places that others wait for


@dataclass
class RequestFacts:
    """What the handlers tell the log about a request.

    Attributes:
        request_id: The client's `X-Request-ID`, or a new one.
        logged: Counts, K, an error's kind; and texts where the operator asked for them.
    """

    request_id: str
    logged: dict[str, Any] = field(default_factory=dict)


def facts_of(scope: Scope) -> RequestFacts:
    """The facts of a request that went through the `Gate`."""
    return scope["gircse.facts"]


@dataclass
class Body:
    """What has been read of a request.

    Attributes:
        chunks: Its bytes.
        size: How many these are.
        gone: Whether the client went before the end.
    """

    chunks: list[bytes] = field(default_factory=list)
    size: int = 0
    gone: bool = False

    def add(self, chunk: bytes) -> int:
        """Keep a chunk, and say how many bytes that is."""
        self.chunks.append(chunk)
        self.size += len(chunk)
        return len(chunk)

    def clear(self) -> int:
        """Forget all, and say how many bytes that was."""
        size, self.size = self.size, 0
        self.chunks.clear()
        return size


class Gate:
    """ASGI middleware: lets a request in, or answers with OpenAI's error object.

    Args:
        app: What comes after.
        settings: Key and limits.
        metrics: Where answers are counted.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.max_body = int(settings.max_body_mb * 1e6)
        self.in_progress = 0
        self.buffered = 0  # bytes of bodies, until their requests are answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        facts = RequestFacts(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope["gircse.facts"] = facts
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = facts.request_id
            await send(message)

        try:
            await self._answer(scope, receive, send_with_id, headers)
        except asyncio.CancelledError:  # the grace period is over
            facts.logged["error"] = "shutting_down"
            if not status:
                message = "the server stopped before this request was finished; send it again"
                await error_response(503, message, code="shutting_down")(scope, receive, send_with_id)
        except Exception:
            facts.logged["error"] = "internal"
            logger.exception("unexpected error", extra={"facts": {"request_id": facts.request_id}})
            if not status:
                message = f"an unexpected error; the server's log has it under request id {facts.request_id}"
                await error_response(500, message, code="internal")(scope, receive, send_with_id)
        finally:
            self._record(scope, facts, status or CLIENT_GONE, time.monotonic() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        path, work = _route(scope), scope["method"] == "POST"
        public = not work and (path in _PUBLIC or path.startswith("/static-offline-docs/"))
        refusal = None
        if not public and not self._has_key(headers):  # before anything of the body is read
            refusal = error_response(
                401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key"
            )
            refusal.headers["www-authenticate"] = "Bearer"
        elif work:
            await self._answer_body(scope, receive, send, headers)
            return
        if refusal is not None:
            await self._refuse(refusal, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _answer_body(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        """Read the body, whose bytes count until the end, and only then take one of the places."""
        body = Body()
        try:
            refusal = self._full() or await self._read(body, receive, headers) or self._full()
            if body.gone:
                facts_of(scope).logged["error"] = "client_gone"
            elif refusal is not None:
                await self._refuse(refusal, scope, receive, send)
            else:
                whole = b"".join(body.chunks)
                body.chunks.clear()
                self.in_progress += 1
                try:
                    await self.app(scope, _replay(whole, receive), send)
                finally:
                    self.in_progress -= 1
        finally:
            self.buffered -= body.size

    @staticmethod
    async def _refuse(refusal: Response, scope: Scope, receive: Receive, send: Send) -> None:
        kinds = {401: "invalid_api_key", 429: "too_many_requests"}
        facts_of(scope).logged["error"] = kinds.get(refusal.status_code, "body")
        await refusal(scope, receive, send)

    def _full(self) -> Response | None:
        """What to answer where all places are taken."""
        most = self.settings.max_requests
        if self.in_progress < most:
            return None
        return _busy(f"this server works on {most} requests at once and all are taken")

    def _has_key(self, headers: Headers) -> bool:
        if self.settings.api_key is None:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(key.strip().encode(), self.settings.api_key.strip().encode())
        return same and scheme.lower() == "bearer"

    async def _read(self, body: Body, receive: Receive, headers: Headers) -> Response | None:
        """Fill the body; a refusal where it is too large or too slow, or others have all the room."""
        too_large = error_response(
            413,
            f"the body exceeds this server's limit of {self.settings.max_body_mb:g} MB; send fewer texts at once",
            code="too_large",
        )
        too_large.headers["connection"] = "close"
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > _DRAIN * self.max_body:
            return too_large
        limit, received = self.settings.request_timeout, 0
        try:
            async with asyncio.timeout(limit) as whole:
                while True:
                    async with asyncio.timeout(_SILENCE):
                        message = await receive()
                    if message["type"] == "http.disconnect":
                        body.gone = True
                        return None
                    chunk = message.get("body", b"")
                    received += len(chunk)
                    if received > self.max_body:
                        self.buffered -= body.clear()
                    elif self.buffered + len(chunk) > _BODIES * self.max_body:
                        busy = _busy(f"{_BODIES * self.settings.max_body_mb:g} MB of other bodies are held already")
                        busy.headers["connection"] = "close"
                        return busy
                    else:
                        self.buffered += body.add(chunk)
                    if not message.get("more_body") or received > _DRAIN * self.max_body:
                        return too_large if received > self.max_body else None
        except TimeoutError:
            late = f"did not arrive within {limit:g} s" if whole.expired() else f"stopped arriving for {_SILENCE:g} s"
            message = f"the body {late}; send it faster, or fewer texts at once"
            return error_response(408, message, code="timeout")

    def _record(self, scope: Scope, facts: RequestFacts, status: int, seconds: float) -> None:
        path = _route(scope)
        endpoint = path if path in _ENDPOINTS else "/v1/models" if path.startswith("/v1/models/") else "other"
        self.metrics.observe_answer(endpoint, status, seconds)
        if kind := facts.logged.get("error"):
            self.metrics.errors.labels(kind).inc()
        elif status >= 400:
            self.metrics.errors.labels(str(status)).inc()
        # What is asked every few seconds would drown the rest; the metrics count it.
        level = logging.DEBUG if endpoint.startswith(("/health", "/metrics")) and status < 400 else logging.INFO
        line = {
            "request_id": facts.request_id,
            "method": scope["method"],
            "path": endpoint,
            "status": status,
            "ms": round(seconds * 1000, 1),
            **facts.logged,
        }
        logger.log(level, "request", extra={"facts": line})


def _busy(reason: str) -> Response:
    response = error_response(429, f"{reason}; try again in 1 s", code="too_many_requests")
    response.headers["retry-after"] = "1"
    return response


def _route(scope: Scope) -> str:
    """The path below where the application is mounted."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) or "/" if path == root or path.startswith(f"{root}/") else path


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once and then waits for the client to go."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
