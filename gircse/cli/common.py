"""What several verbs share: options, and loading a model with its progress shown."""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gircse.embed import InputFormat
from gircse.errors import UsageError

if TYPE_CHECKING:
    from gircse.model import GIRCSE

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Folder or hub id; the model that ships with gircse where not given.")
]
InstructionOption = Annotated[str | None, typer.Option("--instruction", help="What the vector should be about.")]
BatchTokensOption = Annotated[
    int | None,
    typer.Option(min=1, help="Padded tokens of a batch: what bounds memory. If not given 8192, on a GPU 65536."),
]
NumStepsOption = Annotated[
    int | None, typer.Option("--num-steps", min=0, help="Refinement steps K; the model's where not given.")
]
MaxLengthOption = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        min=1,
        help="Longest prompt + text in tokens; the model's where not given. Only the text is cut.",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps ...; the best there is where not given.")
]
WeightsDtype = Literal["float32", "bfloat16", "float16"]
Dtype = Literal["auto", WeightsDtype]
DTYPE_HELP = "Of the weights; auto: bfloat16 where the hardware is fast at it, else float32."
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help=DTYPE_HELP)]
Quantize = Literal["int8"]
QUANTIZE_HELP = "8-bit weights, on a CPU: half of float32's memory, and with VNNI of its time. Vectors change a little."
QuantizeOption = Annotated[Quantize | None, typer.Option("--quantize", help=QUANTIZE_HELP)]
FileArgument = Annotated[
    str, typer.Argument(metavar="FILE", help=".txt (a text a line), .jsonl, .csv, .parquet, or - for stdin.")
]
InputFormatOption = Annotated[InputFormat | None, typer.Option(help="What FILE is; told by its name, - is txt.")]
ColumnOption = Annotated[str, typer.Option(help="JSON key, CSV header or Parquet column of the text.")]
IdColumnOption = Annotated[
    str | None, typer.Option(help="The same of the ids. Row numbers, counted from 1, where not given.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

stderr = Console(stderr=True)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # tabs and ends of lines may stay


def without_control(text: object) -> str:
    """What a file or a model says, for a terminal: without characters that are commands to it."""
    return _CONTROL.sub("\ufffd", str(text))


def printable(text: object) -> str:
    """The same for Rich, whose markup is in brackets."""
    return escape(without_control(text))


def shortened(text: str, limit: int = 160) -> str:
    """A text on one line."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep progress bars and warnings of libraries off the terminal; the hub's client tells of each of its retries."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("sentence_transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def garbage_kept() -> Iterator[None]:
    """No garbage collection: libraries and weights are a million objects that stay, looked through again and again."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@garbage_kept()
def load_model(
    model: str | None,
    *,
    backbone: str | None = None,
    device: str | None = None,
    dtype: Dtype = "auto",
    num_steps: int | None = None,
    max_length: int | None = None,
    quantize: Quantize | None = None,
    pack: bool = True,
) -> GIRCSE:
    """The model that a verb's options name, with a spinner while it loads.

    Its weights are quantised, or else packed where `pack` is not False: a verb that only embeds needs them in no other
    form.

    Raises:
        UsageError: Both a model and a backbone are named, or the machine has no 8-bit products.
        GircseError: The model or its backbone is not to be had.
    """
    if model is not None and backbone is not None:
        raise UsageError("give either --model (a saved model) or --backbone (an untrained one), not both")
    prepare_backbone(backbone or backbone_of(model))
    with stderr.status("loading the model"):
        import torch

        from gircse.model import GIRCSE

        check_device(device)
        weights = getattr(torch, concrete_dtype(dtype, device))
        with quiet_libraries():
            if backbone is not None:
                loaded = GIRCSE.from_backbone(backbone, device=device, dtype=weights)
            else:
                loaded = GIRCSE(model, device=device, dtype=weights)
    if quantize:
        loaded.quantize_weights()
    elif pack:
        loaded.pack_weights()
    if num_steps is not None:
        loaded.num_steps = num_steps
    if max_length is not None:
        check_positions(loaded, max_length, loaded.num_steps)
        loaded.max_seq_length = max_length
    return loaded


def check_positions(model: GIRCSE, longest: int | None, num_steps: int) -> None:
    """Refuse what the first long text would otherwise end in mid-run.

    Raises:
        UsageError: The longest prompt and its soft tokens have no room in the backbone.
    """
    positions = model.encoder.decoder.max_positions
    if (longest or 0) + num_steps > positions:
        raise UsageError(
            f"--max-length ({longest}) and --num-steps ({num_steps}) exceed the backbone's {positions} positions "
            "together; lower one of them"
        )


def check_device(device: str | None) -> None:
    """Refuse a device that PyTorch does not know, or that it does not find here.

    Raises:
        UsageError: It says so in a line.
    """
    import torch

    try:
        wanted = torch.device(device or "cpu")
    except RuntimeError:
        raise UsageError(f"--device {device}: there is no such device; cpu, cuda, cuda:1 and mps are") from None
    found = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (wanted.index or 0) >= found.get(wanted.type, 1):
        raise UsageError(f"--device {device}: PyTorch {torch.__version__} finds none here; leave --device out")


def concrete_dtype(dtype: Dtype, device: str | None) -> WeightsDtype:
    """What ``auto`` means on a device; the best device there is where not given."""
    if dtype != "auto":
        return dtype
    from sentence_transformers.util import get_device_name

    from gircse.hardware import fastest_dtype

    chosen, _ = fastest_dtype(device or get_device_name())
    return "bfloat16" if str(chosen) == "torch.bfloat16" else "float32"


def backbone_of(model: str | None) -> str | None:
    """The backbone that a saved model in a local folder names; None where it has all weights, or is on the hub."""
    values = _saved_config(model)
    return None if values.get("weights") == "full" else values.get("backbone", {}).get("name")


def steps_of(model: str | None) -> int | None:
    """K of a saved model in a local folder; None where it is on the hub."""
    return _saved_config(model).get("refinement", {}).get("num_steps")


def _saved_config(model: str | None) -> dict[str, Any]:
    folder = Path(model) if model else Path(__file__).parents[1] / "pretrained" / "smollm2-135m"
    config = folder / "gircse_config.json"
    try:
        return json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except ValueError:
        return {}  # loading it says so


def prepare_backbone(name: str | None) -> None:
    """Fetch and convert a backbone that is not in the cache yet, with a progress bar and its terms of use."""
    from gircse.backbones import cached_backbones, known_backbones, resolve_backbone

    if name not in known_backbones() or name in cached_backbones():
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
                if not stderr.is_terminal:
                    stderr.print(what, highlight=False)
            bar.update(tasks[what], completed=done, total=total)

        resolve_backbone(name, progress=show, notify=lambda terms: stderr.print(terms, highlight=False))
