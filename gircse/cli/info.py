"""`gircse info`: versions, device, dtype and why, backbones in the cache, the model."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gircse.cli.common import DebugOption, JsonOption, ModelOption, load_model

_PACKAGES = ("gircse", "torch", "transformers", "sentence-transformers", "peft", "tokenizers", "datasets", "mteb")


def info(
    model: ModelOption = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Do not load the model.")] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Versions, the device and dtype that would be used and why, backbones in the cache, and the model's details.

    [bold]Examples[/bold]

      gircse info
      gircse info --no-model            without loading weights
      gircse info --model runs/mine --json
    """
    facts: dict[str, Any] = {"versions": _versions(), "hardware": _hardware(), "backbones": _backbones()}
    if not no_model:
        facts["model"] = _model(model)
    if json_output:
        print(json.dumps(facts))
        return
    console = Console()
    for title, section in facts.items():
        table = Table(
            show_header=False, box=None, pad_edge=False, title=title, title_justify="left", title_style="bold"
        )
        for key, value in section.items():
            table.add_row(f"{key}  ", str(value))
        console.print(table, "")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _hardware() -> dict[str, str]:
    import torch
    from sentence_transformers.util import get_device_name

    from gircse.fast.step_kernels import bfloat16_library, int8_library, library, matrix_library
    from gircse.hardware import fastest_dtype

    device = get_device_name()
    dtype, reason = fastest_dtype(device)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    more = {"AMX": matrix_library(), "AVX512-BF16": bfloat16_library(), "VNNI": int8_library()}
    *others, last = [what for what, there in more.items() if there is not None] or [""]
    kernels = f"yes, for {' and '.join([', '.join(others), last]) if others else last} too" if last else "yes"
    without = "no, so a CPU is slower; made at installation where there is g++"
    return {
        "device": f"{device} ({name})",
        "threads": str(torch.get_num_threads()),
        "dtype": f"{str(dtype).removeprefix('torch.')}, for {reason}; --dtype chooses another",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "compiled kernels": kernels if library() is not None else without,
    }


def _backbones() -> dict[str, str]:
    from gircse.backbones import cache_home, cached_backbones, known_backbones

    present = cached_backbones()
    return {"cache": str(cache_home())} | {
        name: f"{'present' if name in present else 'fetched on first use'}, {known.licence}"
        for name, known in known_backbones().items()
    }


def _model(model: str | None) -> dict[str, Any]:
    loaded = load_model(model)
    encoder = loaded.encoder
    return {
        "loaded from": model or "the model that ships with gircse",
        "backbone": f"{encoder.reference.name} (sha256 {encoder.reference.sha256[:12]}, {encoder.reference.licence})",
        "parameters": f"{encoder.num_parameters:,}",
        "dimension": loaded.get_embedding_dimension(),
        "num_steps": loaded.num_steps,
        "pooling": encoder.refinement.pooling,
        "attention": encoder.refinement.attention,
        "soft-token temperature": encoder.refinement.temperature,
        "max_seq_length": encoder.refinement.max_seq_length,
        "query prompt": repr(loaded.prompts.get("query")),
        "document prompt": repr(loaded.prompts.get("document")),
    }
