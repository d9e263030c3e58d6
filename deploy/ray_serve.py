"""The application of `gircse serve` on Ray Serve: replicas that come and go with the load, on one machine or many.

    pip install 'gircse[serve,ray]'
    GIRCSE_API_KEY=... serve run deploy.ray_serve:app model=/shared/model max_replicas=4 num_gpus=1
    serve run deploy.ray_serve:app max_num_steps=20 long_texts=cut        # any field of gircse.serve.settings too
    serve run deploy.ray_serve:app served_names=mine,text-embedding-3-small   # commas between several

Every replica holds a model and answers as `gircse serve` does. Its limits (`max_requests`, `max_queue_texts`) and the
counters of `/metrics` are of one replica. Its log goes to where Ray keeps the standard error of its workers. Host and
port are Ray Serve's own (http://127.0.0.1:8000).
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter
from ray import serve
from ray.serve import Application

from gircse.errors import UsageError
from gircse.serve.settings import ServeSettings


class Arguments(BaseModel):
    """What the deployment can be told besides the fields of `ServeSettings`.

    Attributes:
        model: Folder or hub id, the same on every machine; the model that ships with gircse where None.
        device: cpu, cuda ...; the best there is where None.
        dtype: Of the weights.
        num_cpus: Cores of a replica.
        num_gpus: GPUs of a replica.
        min_replicas: Kept without load.
        max_replicas: Under load.
        target_requests: Requests in progress that a replica should have; more start another replica.
    """

    model: str | None = None
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    num_cpus: float = 1
    num_gpus: float = 0
    min_replicas: int = 1
    max_replicas: int = 4
    target_requests: int = 32


@serve.ingress()
class Replica:
    """A model and its service.

    Args:
        arguments: Which model.
        settings: Limits.
    """

    def __init__(self, arguments: Arguments, settings: ServeSettings) -> None:
        import torch

        from gircse.fast.kernel_caches import limit_kernel_caches
        from gircse.model import GIRCSE
        from gircse.serve.logs import configure_logging
        from gircse.serve.service import Service

        configure_logging(as_json=settings.log_json)
        limit_kernel_caches()
        model = GIRCSE(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype)).pack_weights()
        name = os.path.basename((arguments.model or "gircse-smollm2-135m").rstrip("/"))
        self.service = Service(model, settings, name)

    def __serve_build_asgi_app__(self) -> Any:
        """Ray Serve asks for the application once the replica is there; it also runs its lifespan."""
        from gircse.serve.app import create_app

        return _without_request_id(create_app(self.service))

    def check_health(self) -> None:
        """A replica whose engine has failed is replaced.

        Raises:
            RuntimeError: It has.
        """
        if not self.service.engine.healthy:
            raise RuntimeError("the engine has failed")


def _without_request_id(application: Any) -> Any:
    """The application without its X-Request-ID: Ray Serve gives every answer one, the same that the log has."""

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        async def send_rest(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await application(scope, receive, send_rest)

    return wrapped


def app(args: dict[str, Any]) -> Application:
    """The deployment, as `serve run` builds it.

    Args:
        args: Fields of `Arguments` and of `ServeSettings`; the API key is taken from GIRCSE_API_KEY.

    Raises:
        UsageError: A name is neither's.
    """
    own, limits = set(Arguments.model_fields), {field.name for field in fields(ServeSettings)} - {"host", "port"}
    if unknown := sorted(set(args) - own - limits):
        raise UsageError(f"no argument {unknown[0]!r}; there are {', '.join(sorted(own | limits))}")
    arguments = Arguments(**{name: value for name, value in args.items() if name in own})
    chosen = {"api_key": os.environ.get("GIRCSE_API_KEY"), **{n: value for n, value in args.items() if n in limits}}
    for name in ("served_names", "cors_origins"):  # `serve run` gives strings, which pydantic takes for no tuple
        if isinstance(given := chosen.get(name), str):
            chosen[name] = tuple(part.strip() for part in given.split(",") if part.strip())
    settings = TypeAdapter(ServeSettings).validate_python(chosen)
    deployment = serve.deployment(
        name="gircse",
        max_ongoing_requests=settings.max_requests + 8,  # the service refuses with 429 before Serve lets requests wait
        graceful_shutdown_timeout_s=settings.grace_period + 5,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": arguments.target_requests,
        },
    )(Replica)
    return deployment.bind(arguments, settings)
