"""A writer behind HTTP: any endpoint that speaks OpenAI's chat completions protocol, streamed.

Knows that protocol; knows nothing of passages or indices.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from gircse.errors import GircseError, MissingExtraError, UsageError

API_KEY_VARIABLE = "GIRCSE_LLM_API_KEY"
_SECONDS = 120.0  # without a byte from the endpoint; a large model may read the passages for long


class EndpointWriter:
    """Writes replies through ``URL/chat/completions``.

    Args:
        url: Base URL as the endpoint's manual gives it, usually ending in ``/v1``.
        model: Name of the model there.
        max_tokens: Longest reply.
        api_key: Sent as a bearer token; the environment's ``GIRCSE_LLM_API_KEY`` where not given.

    Raises:
        UsageError: The URL is none.
    """

    def __init__(self, url: str, model: str, max_tokens: int, api_key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"--llm takes a URL such as http://localhost:8080/v1, not {url!r}")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.max_tokens = model, max_tokens
        self._api_key = api_key or os.environ.get(API_KEY_VARIABLE)

    def write(self, messages: Sequence[dict[str, str]]) -> Iterator[str]:
        """The reply in pieces.

        Raises:
            GircseError: The endpoint cannot be reached, refuses, or sends something else than a streamed reply.
        """
        try:
            import httpx2
        except ImportError as error:
            raise MissingExtraError("answering through an endpoint", "search") from error

        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
        }
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        try:
            with httpx2.stream("POST", self.url, json=body, headers=headers, timeout=_SECONDS) as response:
                if response.status_code != 200:
                    response.read()
                    raise GircseError(self._refusal(response.status_code, response.text))
                yield from self._pieces(response.iter_lines())
        except httpx2.HTTPError as error:
            raise GircseError(f"{self.url} cannot be reached ({error}); check the URL and that it serves") from error

    def _pieces(self, lines: Iterator[str]) -> Iterator[str]:
        """The text in server-sent events."""
        started = False
        for line in lines:
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            try:
                event: Any = json.loads(data)
                if "error" in event:
                    raise GircseError(self._refusal(200, json.dumps(event["error"])))
                piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
            except (ValueError, KeyError, TypeError, IndexError) as error:
                if isinstance(error, GircseError):
                    raise
                raise GircseError(f"{self.url} sent what is no chat completion: {data[:80]}") from error
            started = True
            if piece:
                yield piece
        if not started:
            raise GircseError(f"{self.url} sent no streamed chat completion; is it OpenAI-compatible?")

    def _refusal(self, status: int, text: str) -> str:
        advice = f"; set {API_KEY_VARIABLE}" if status in (401, 403) else ""
        return f"{self.url} answers {status}: {' '.join(text.split())[:200]}{advice}"
