"""Refusals and failures as OpenAI's error object. Knows status codes; knows nothing of models."""

from __future__ import annotations

import json
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from gircse.serve import refusals

_STATUS: dict[type[refusals.Refusal], int] = {
    refusals.InvalidRequestError: 400,
    refusals.UnknownModelError: 404,
    refusals.TooLargeError: 413,
    refusals.BusyError: 429,
    refusals.ModelFailedError: 500,
    refusals.StoppingError: 503,
    refusals.TimedOutError: 504,
}


def error_response(status: int, message: str, *, param: str | None = None, code: str | None = None) -> Response:
    """An answer with OpenAI's error object. ASCII only: half a surrogate pair from a request can be sent back."""
    kind = "authentication_error" if status == 401 else "rate_limit_error" if status == 429 else "invalid_request_error"
    if not (param and message.startswith(param)):
        message = message[0].upper() + message[1:]
    error = {
        "message": message + ".",
        "type": "server_error" if status >= 500 else kind,
        "param": param,
        "code": code,
    }
    return Response(json.dumps({"error": error}), status, media_type="application/json")


def refusal_response(refusal: refusals.Refusal, request_id: str) -> Response:
    """The answer to a request that the service refused."""
    message = str(refusal)
    if isinstance(refusal, refusals.ModelFailedError) and refusal.logged:
        message += f" under request id {request_id}"
    response = error_response(_STATUS[type(refusal)], message, param=refusal.param, code=refusal.code)
    if isinstance(refusal, refusals.BusyError):
        response.headers["retry-after"] = str(refusal.retry_after)
    return response


def validation_response(error: RequestValidationError, known_fields: list[str]) -> Response:
    """The answer to a body that is no JSON or does not have the right fields: the first problem, in a sentence."""
    problem: dict[str, Any] = error.errors()[0]
    path = [str(part)[:60] for part in problem["loc"][1:]]
    kind = problem["type"]
    if kind == "json_invalid":
        where = f"{problem['ctx']['error']} at character {problem['loc'][-1]}"
        return error_response(400, f"the body is not valid JSON: {where}", code="invalid_json")
    if not path:
        if kind == "missing":
            return error_response(400, "the body is missing; send a JSON object", code="missing_body")
        if isinstance(error.body, bytes):
            return error_response(415, "send the body as JSON, with Content-Type: application/json", code="no_json")
        return error_response(400, "the body must be a JSON object in valid Unicode", code="invalid_type")
    name = ".".join(path)
    if kind == "extra_forbidden":
        message = f"there is no field {name!r} here; the fields are {', '.join(known_fields)}"
    elif kind == "missing":
        message = f"the field {name!r} is missing"
    else:
        message = f"{name}: {problem['msg'].removeprefix('Value error, ').rstrip('.')}"
    return error_response(
        400, message, param=name, code="unknown_field" if kind == "extra_forbidden" else "invalid_value"
    )
