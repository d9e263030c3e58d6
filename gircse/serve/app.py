"""The HTTP interface: routes, bodies in and out. Holds no logic: the service decides, the gate guards.

`create_app` gives an ordinary ASGI application, which any server can run.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response

from gircse._version import __version__
from gircse.serve import schemas
from gircse.serve.errors import error_response, refusal_response, validation_response
from gircse.serve.middleware import CLIENT_GONE, Gate, facts_of
from gircse.serve.refusals import ModelFailedError, Refusal
from gircse.serve.service import Classes, Embedded, Service

logger = logging.getLogger("gircse.serve")

T = TypeVar("T")

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A field is wrong"},
    401: {"description": "The API key is missing or wrong"},
    404: {"description": "No such model"},
    408: {"description": "The body did not arrive in time"},
    413: {"description": "A text or the body is too large"},
    415: {"description": "The body is not JSON"},
    429: {"description": "Too much is waiting; Retry-After says when to come back"},
    500: {"description": "The model failed"},
    503: {"description": "The server is shutting down"},
    504: {"description": "The request took too long"},
}
_FIELDS = {
    f"/v1/{name}": list(schema.model_fields)
    for name, schema in (
        ("embeddings", schemas.EmbeddingRequest),
        ("rerank", schemas.RerankRequest),
        ("classify", schemas.ClassifyRequest),
        ("explain", schemas.ExplainRequest),
    )
}
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


def create_app(service: Service) -> FastAPI:
    """The application over a service; its lifespan starts and drains the engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        if not await service.stop():
            logger.warning("the grace period ended before everything was finished")

    app = FastAPIOffline(
        redoc_url=None,
        title="gircse",
        version=__version__,
        summary="Generative text embeddings behind OpenAI's interface.",
        lifespan=lifespan,
        responses={code: {**error, "model": schemas.ErrorResponse} for code, error in _ERRORS.items()},
    )
    app.add_middleware(Gate, settings=service.settings, metrics=service.metrics)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client sends a dozen of its own; there are no cookies to guard
            expose_headers=["x-request-id", "retry-after", "x-truncated-texts"],
        )
    _add_errors(app)
    _add_embedding_routes(app, service)
    _add_other_routes(app, service)
    _document(app, service)
    return app


def _add_embedding_routes(app: FastAPI, service: Service) -> None:
    settings = service.settings

    @app.post("/v1/embeddings", response_model=schemas.EmbeddingResponse, tags=["embeddings"])
    async def embeddings(body: schemas.EmbeddingRequest, request: Request) -> Response:
        """Vectors of texts, as OpenAI's `/v1/embeddings`."""
        logged = facts_of(request.scope).logged
        logged["texts"] = len(body.input)
        if body.user:
            logged["user"] = body.user
        if settings.log_texts:
            logged |= {"input": body.input, "instruction": body.instruction}
        done = await _while_connected(
            request,
            service.embed(
                body.input,
                model=body.model,
                instruction=body.instruction,
                input_type=body.input_type,
                num_steps=body.num_steps,
                dimensions=body.dimensions,
            ),
        )
        _note(service, request, done.tokens, done.num_steps, done.truncated)
        content = await run_in_threadpool(_render_embeddings, done, body.encoding_format, service.limits.names[0])
        return _json(content, done.truncated)

    @app.post("/v1/rerank", response_model=schemas.RerankResponse, tags=["embeddings"])
    async def rerank(body: schemas.RerankRequest, request: Request) -> Response:
        """Documents in the order of their relevance to a query, as Jina's and Cohere's rerankers."""
        logged = facts_of(request.scope).logged
        logged["texts"] = len(body.documents) + 1
        if settings.log_texts:
            logged |= {"query": body.query, "documents": body.documents, "instruction": body.instruction}
        done = await _while_connected(
            request,
            service.rerank(
                body.query,
                body.documents,
                model=body.model,
                instruction=body.instruction,
                num_steps=body.num_steps,
                top_n=body.top_n,
            ),
        )
        _note(service, request, done.tokens, done.num_steps, done.truncated)
        results = [
            {"index": index, "relevance_score": score}
            | ({"document": {"text": body.documents[index]}} if body.return_documents else {})
            for index, score in zip(done.order, done.scores, strict=True)
        ]
        answer = {
            "id": uuid.uuid4().hex,
            "object": "list",
            "model": service.limits.names[0],
            "results": results,
            "usage": {"prompt_tokens": done.tokens, "total_tokens": done.tokens},
        }
        return _json(to_json(answer), done.truncated)

    @app.post("/v1/classify", response_model=schemas.ClassifyResponse, tags=["embeddings"])
    async def classify(body: schemas.ClassifyRequest, request: Request) -> Response:
        """Texts into classes by the names of the classes alone, as Jina's `/v1/classify`."""
        logged = facts_of(request.scope).logged
        logged["texts"] = len(body.input) + len(body.labels)
        if settings.log_texts:
            logged |= {"input": body.input, "labels": body.labels, "instruction": body.instruction}
        done = await _while_connected(
            request,
            service.classify(
                body.input, body.labels, instruction=body.instruction, model=body.model, num_steps=body.num_steps
            ),
        )
        _note(service, request, done.tokens, done.num_steps, done.truncated)
        content = await run_in_threadpool(_render_classes, done, body.labels, service.limits.names[0])
        return _json(content, done.truncated)

    @app.post("/v1/explain", response_model=schemas.ExplainResponse, tags=["looking inside"])
    async def explain(body: schemas.ExplainRequest, request: Request) -> Response:
        """What each soft token of a text is made of."""
        if settings.log_texts:
            facts_of(request.scope).logged |= {"input": body.input, "instruction": body.instruction}
        facts_of(request.scope).logged["texts"] = 1
        work = service.explain(body.input, instruction=body.instruction, num_steps=body.num_steps, top=body.top)
        done = await _while_connected(request, work)
        _note(service, request, done.tokens, len(done.steps), 0)
        answer = {"model": service.limits.names[0], "steps": [asdict(step) for step in done.steps]}
        return _json(to_json(answer))


def _add_other_routes(app: FastAPI, service: Service) -> None:
    started = int(time.time())
    page = files("gircse.serve").joinpath("playground.html").read_text(encoding="utf-8")

    def card(name: str) -> schemas.ModelCard:
        return schemas.ModelCard(
            id=name,
            created=started,
            dimension=service.dimension,
            num_steps=service.limits.num_steps,
            max_num_steps=service.settings.max_num_steps,
            max_tokens=service.limits.max_tokens,
            max_items=service.settings.max_items,
            prompts={"query": service.own_prompt("query"), "document": service.own_prompt("document")},
        )

    @app.get("/v1/models", tags=["models"])
    async def models() -> schemas.ModelList:
        """The names that this server's model goes by, and its limits."""
        return schemas.ModelList(data=[card(name) for name in service.limits.names])

    @app.get("/v1/models/{name:path}", tags=["models"])
    async def model(name: str) -> schemas.ModelCard:
        """One of them."""
        service.check_model(name)
        return card(name)

    def health(*, needed: bool) -> Response:
        live, ready = service.engine.healthy, service.ready
        status = "ok" if ready else "stopping" if live else "failed"
        return _json(to_json({"status": status, "live": live, "ready": ready}), status=200 if needed else 503)

    unhealthy: dict[int | str, dict[str, Any]] = {503: {"model": schemas.Health, "description": "It does not"}}

    @app.get("/health", response_model=schemas.Health, responses=unhealthy, tags=["operations"])
    @app.get("/health/ready", response_model=schemas.Health, responses=unhealthy, tags=["operations"])
    async def ready() -> Response:
        """Whether the server takes requests."""
        return health(needed=service.ready)

    @app.get("/health/live", response_model=schemas.Health, responses=unhealthy, tags=["operations"])
    async def live() -> Response:
        """Whether the process works; where it does not, start it again."""
        return health(needed=service.engine.healthy)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}}, tags=["operations"])
    async def metrics() -> Response:
        """Counters and histograms for Prometheus."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": _POLICY, "referrer-policy": "no-referrer"})


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        facts = facts_of(request.scope)
        facts.logged["error"] = error.code
        if isinstance(error, ModelFailedError):
            logger.error("%s", error, extra={"facts": {"request_id": facts.request_id}})
        return refusal_response(error, facts.request_id)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        facts_of(request.scope).logged["error"] = "invalid_request"
        return validation_response(error, _FIELDS.get(request.url.path, []))

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"[:120]
        headers = Headers(error.headers)
        message = {
            404: f"there is no {where}; /docs lists what there is",
            405: f"there is no {where}; the path takes {headers.get('allow', 'another method')}",
            400: "the body could not be read as JSON: it is not UTF-8, nested too deeply, or has too long a number",
        }.get(error.status_code, str(error.detail))
        code = {404: "unknown_url", 405: "method_not_allowed", 400: "invalid_json"}.get(error.status_code)
        response = error_response(error.status_code, message, code=code)
        response.headers.update(headers)
        return response

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        facts_of(request.scope).logged["error"] = "client_gone"
        return Response(status_code=CLIENT_GONE)


def _document(app: FastAPI, service: Service) -> None:
    """OpenAPI as this server is: its limits, its key, and no 422, which it never sends."""
    with_key = service.settings.api_key is not None
    schema = app.openapi()
    for path, operations in schema["paths"].items():
        health = path.startswith("/health")
        for method, operation in operations.items():
            operation["responses"].pop("422", None)
            if method == "get":
                kept = {"200", "503"} if health else {"200", "401", "404"} if "{" in path else {"200", "401"}
                operation["responses"] = {code: it for code, it in operation["responses"].items() if code in kept}
            if with_key and not health:
                operation["security"] = [{"key": []}]
    components = schema["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    limits = {"num_steps": service.settings.max_num_steps, "dimensions": service.dimension}
    requests = [model for name, model in components["schemas"].items() if name.endswith("Request")]
    for model in requests:
        for field in limits.keys() & model["properties"].keys():
            model["properties"][field]["anyOf"][0]["maximum"] = limits[field]
    for part in _parts(requests):
        if part.get("maxItems") == schemas.MAX_ITEMS:
            part["maxItems"] = service.settings.max_items
    if with_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """All objects of a JSON schema, itself included."""
    if isinstance(schema, dict):
        yield schema
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _parts(part)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is dropped when the client goes.

    Raises:
        ClientGoneError: It went.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        watch.cancel()


def _note(service: Service, request: Request, tokens: int, num_steps: int, truncated: int) -> None:
    facts_of(request.scope).logged |= {"tokens": tokens, "num_steps": num_steps, "truncated": truncated}
    service.metrics.steps.observe(num_steps)
    service.metrics.truncated.inc(truncated)


def _render_embeddings(done: Embedded, encoding: str | None, model: str) -> bytes:
    if encoding == "base64":
        values: list[Any] = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in done.vectors]
    else:
        values = done.vectors.tolist()
    data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)]
    usage = {"prompt_tokens": done.tokens, "total_tokens": done.tokens}
    return to_json({"object": "list", "data": data, "model": model, "usage": usage})


def _render_classes(done: Classes, labels: Sequence[str], model: str) -> bytes:
    data = []
    for index, row in enumerate(done.scores.tolist()):
        best = int(np.argmax(row))
        scores = [{"label": label, "score": score} for label, score in zip(labels, row, strict=True)]
        result = {"object": "classification", "index": index, "prediction": labels[best], "score": row[best]}
        data.append(result | {"predictions": scores})
    usage = {"prompt_tokens": done.tokens, "total_tokens": done.tokens}
    return to_json({"object": "list", "data": data, "model": model, "usage": usage})


def _json(content: bytes, truncated: int = 0, status: int = 200) -> Response:
    response = Response(content, status, media_type="application/json")
    if truncated:
        response.headers["x-truncated-texts"] = str(truncated)
    return response
