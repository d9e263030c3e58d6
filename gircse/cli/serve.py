"""`gircse serve`: the server's options. The work is `gircse.serve`'s."""

from __future__ import annotations

import ipaddress
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from gircse.cli.common import DTYPE_HELP, QUANTIZE_HELP, Dtype, Quantize, load_model, stderr, steps_of
from gircse.errors import MissingExtraError, UsageError
from gircse.serve.settings import MAX_ITEMS, LongTexts, ServeSettings

_MODEL, _ACCESS, _LIMITS, _LOGS = "Model", "Access", "Limits", "Logs"


def _option(name: str, text: str, panel: str, **extra: Any) -> Any:
    """A flag with its environment variable."""
    variable = extra.pop("envvar", "GIRCSE_SERVE_" + name.strip("-").replace("-", "_").upper())
    return typer.Option(name, help=text, rich_help_panel=panel, envvar=variable, **extra)


def serve(
    model: Annotated[
        str | None, _option("--model", "Folder or hub id; the model that ships with gircse where not given.", _MODEL)
    ] = None,
    served_name: Annotated[
        list[str] | None,
        _option("--served-name", "What clients call it, repeatable; the folder's name where not given.", _MODEL),
    ] = None,
    device: Annotated[
        str | None,
        _option("--device", "cpu, cuda, cuda:1, mps ...; the best there is where not given.", _MODEL),
    ] = None,
    dtype: Annotated[Dtype, _option("--dtype", DTYPE_HELP, _MODEL)] = "auto",
    quantize: Annotated[Quantize | None, _option("--quantize", QUANTIZE_HELP, _MODEL)] = None,
    num_steps: Annotated[
        int | None, _option("--num-steps", "K where a request names none; the model's where not given.", _MODEL, min=0)
    ] = None,
    batch_tokens: Annotated[
        int | None,
        _option(
            "--batch-tokens",
            "Padded tokens (prompt and K) of a batch; 4,096 on a CPU, 16,384 elsewhere. "
            "Smaller answers short queries sooner, larger has more throughput.",
            _MODEL,
            min=1,
        ),
    ] = None,
    host: Annotated[
        str, _option("--host", "Address to listen on; 0.0.0.0 lets other machines in.", _ACCESS)
    ] = ServeSettings.host,
    port: Annotated[
        int, _option("--port", "Port; 0 takes a free one.", _ACCESS, min=0, max=65535)
    ] = ServeSettings.port,
    api_key: Annotated[
        str | None,
        _option(
            "--api-key", "Key that clients must send; better set in the environment.", _ACCESS, envvar="GIRCSE_API_KEY"
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        _option("--cors-origin", "Origin whose pages may call from a browser, repeatable; none by default.", _ACCESS),
    ] = None,
    max_num_steps: Annotated[
        int, _option("--max-num-steps", "Largest K of a request.", _LIMITS, min=0)
    ] = ServeSettings.max_num_steps,
    max_tokens: Annotated[
        int | None,
        _option("--max-tokens", "Longest text, instruction included; the model's where not given.", _LIMITS, min=1),
    ] = None,
    long_texts: Annotated[
        LongTexts, _option("--long-texts", "Refuse a longer text with 413, or cut it.", _LIMITS)
    ] = ServeSettings.long_texts,
    max_items: Annotated[
        int, _option("--max-items", "Texts of a request.", _LIMITS, min=1, max=MAX_ITEMS)
    ] = ServeSettings.max_items,
    max_body_mb: Annotated[
        float, _option("--max-body-mb", "Size of a request's body.", _LIMITS)
    ] = ServeSettings.max_body_mb,
    max_requests: Annotated[
        int, _option("--max-requests", "Requests in progress at once; more get 429.", _LIMITS, min=1)
    ] = ServeSettings.max_requests,
    max_queue_texts: Annotated[
        int, _option("--max-queue-texts", "Texts waiting or in progress; more get 429.", _LIMITS, min=1)
    ] = ServeSettings.max_queue_texts,
    request_timeout: Annotated[
        float, _option("--request-timeout", "Seconds that a request may take, waiting included.", _LIMITS)
    ] = ServeSettings.request_timeout,
    grace_period: Annotated[
        float, _option("--grace-period", "Seconds for finishing what is queued after SIGTERM.", _LIMITS, min=0)
    ] = ServeSettings.grace_period,
    log_json: Annotated[bool, _option("--log-json", "Log JSON objects, one a line.", _LOGS)] = False,
    log_texts: Annotated[bool, _option("--log-texts", "Write texts and instructions to the log.", _LOGS)] = False,
    debug: Annotated[
        bool, _option("--debug", "Show the traceback of an error at the start.", _LOGS, envvar="GIRCSE_DEBUG")
    ] = False,
) -> None:
    """Serve embeddings over HTTP: OpenAI's interface, reranking, metrics, and a playground in the browser.

    POST /v1/embeddings, /v1/rerank, /v1/classify, /v1/explain; GET /v1/models, /health, /metrics, /docs, and / for the
    playground.
    The official OpenAI clients work with base_url=http://HOST:PORT/v1. SIGTERM finishes what is queued and exits 0.

    [bold]Examples[/bold]

      gircse serve
      gircse serve --model runs/mine --served-name text-embedding-3-small --port 9000
      GIRCSE_API_KEY=... gircse serve --host 0.0.0.0 --log-json
      gircse serve --device cuda --dtype bfloat16 --long-texts cut
    """
    if api_key is None and "GIRCSE_API_KEY" in os.environ:  # an empty secret would open the server to everybody
        raise UsageError("GIRCSE_API_KEY is set and empty; give it a key, or unset it to serve without one")
    settings = ServeSettings(
        host=host,
        port=port,
        served_names=_between_commas(served_name),
        api_key=api_key,
        cors_origins=_between_commas(cors_origin),
        num_steps=num_steps,
        max_num_steps=max_num_steps,
        max_tokens=max_tokens,
        long_texts=long_texts,
        max_items=max_items,
        max_body_mb=max_body_mb,
        max_requests=max_requests,
        max_queue_texts=max_queue_texts,
        request_timeout=request_timeout,
        grace_period=grace_period,
        batch_tokens=batch_tokens,
        log_json=log_json,
        log_texts=log_texts,
    )
    if not all(map(find_spec, ("fastapi", "fastapi_offline", "prometheus_client", "uvicorn"))):
        raise MissingExtraError("gircse serve", "serve")
    if settings.api_key is None and not _is_loopback(host):
        stderr.print(
            f"[yellow]warning:[/] everybody who reaches {escape(host)} may use this server; set GIRCSE_API_KEY"
        )
    from gircse.hardware import in_own_thread
    from gircse.serve.logs import configure_logging
    from gircse.serve.run import bind, ended_by_sigterm, run
    from gircse.serve.service import Service

    if num_steps is None and (own_steps := steps_of(model)) is not None:
        settings.check_steps(own_steps)
    # The socket is bound before the model loads, which takes longer than to find the port taken.
    with bind(host, port) as listener, ended_by_sigterm():
        # Not in this thread, which lives on, beside the one that embeds.
        loaded = in_own_thread(lambda: load_model(model, device=device, dtype=dtype, quantize=quantize))
        service = Service(loaded, settings, _name_of(model))
        configure_logging(as_json=log_json)
        names = ", ".join(service.limits.names)

        def announce(address: str) -> None:
            words = f"serving {names} on {address} (playground: /, reference: /docs)"
            stderr.print(words, highlight=False, markup=False)

        run(service, listener, announce)


def _between_commas(values: list[str] | None) -> tuple[str, ...]:
    """The values of an option that may be repeated; a variable of the environment has them between commas."""
    return tuple(part.strip() for value in values or () for part in value.split(",") if part.strip())


def _name_of(model: str | None) -> str:
    """What clients call a model where nobody says: as its folder is called."""
    if model is None:
        return "gircse-smollm2-135m"
    return (Path(model).resolve() if Path(model).exists() else Path(model)).name


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
