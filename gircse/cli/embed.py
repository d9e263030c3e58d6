"""`gircse embed`: the command's options, its progress bar and its closing words. The work is `gircse.embed`'s."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from gircse.cli.common import (
    BatchTokensOption,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    InstructionOption,
    JsonOption,
    MaxLengthOption,
    ModelOption,
    NumStepsOption,
    Quantize,
    QuantizeOption,
    check_positions,
    concrete_dtype,
    load_model,
    stderr,
)
from gircse.embed import DEFAULT_SHARD_SIZE, InputFormat, Precision
from gircse.errors import GircseError, UsageError

if TYPE_CHECKING:
    from gircse.embed.job import EmbedSettings, EmbedSummary, Progress
    from gircse.model import GIRCSE

_INPUT, _OUTPUT, _RAY = "Input", "Output", "More than one machine"
_LOG_EVERY = 30.0  # seconds between lines where there is no terminal to draw a bar on


def embed(
    source: Annotated[
        str,
        typer.Argument(metavar="INPUT", help=".txt (a text a line), .jsonl, .csv, .parquet, or - for standard input."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUTPUT",
            help=".parquet (id, embedding), .npy or .jsonl; with --ray a folder of .parquet files.",
            rich_help_panel=_OUTPUT,
        ),
    ],
    input_format: Annotated[
        InputFormat | None,
        typer.Option(help="What INPUT is; told by its name where not given, - is txt.", rich_help_panel=_INPUT),
    ] = None,
    column: Annotated[
        str, typer.Option(help="JSON key, CSV header or Parquet column of the text.", rich_help_panel=_INPUT)
    ] = "text",
    id_column: Annotated[
        str | None,
        typer.Option(help="The same of the ids. Row numbers, counted from 1, where not given.", rich_help_panel=_INPUT),
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Leave unusable rows out and report them at the end.", rich_help_panel=_INPUT),
    ] = False,
    dim: Annotated[
        int | None,
        typer.Option(min=1, help="Keep the first so many dimensions, then normalise.", rich_help_panel=_OUTPUT),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(
            help="int8 holds value / scale, the scale is in the metadata; binary packs 8 signs into an int8.",
            rich_help_panel=_OUTPUT,
        ),
    ] = "float32",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that was stopped or killed.", rich_help_panel=_OUTPUT)
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace OUTPUT and drop unfinished work.", rich_help_panel=_OUTPUT),
    ] = False,
    shard_size: Annotated[
        int,
        typer.Option(min=1, help="Texts of a shard: what a kill can cost at most.", rich_help_panel=_OUTPUT),
    ] = DEFAULT_SHARD_SIZE,
    model: ModelOption = None,
    instruction: InstructionOption = None,
    prompt: Annotated[
        str | None, typer.Option(help="Instead of an instruction: put before every text as it stands.")
    ] = None,
    num_steps: NumStepsOption = None,
    max_length: MaxLengthOption = None,
    batch_tokens: BatchTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Embed on Ray: local starts it here, auto finds the running one, else HOST:PORT. Extra ray.",
            rich_help_panel=_RAY,
        ),
    ] = None,
    ray_workers: Annotated[
        int | None,
        typer.Option(min=1, help="Workers; one a GPU, else one a CPU core, where not given.", rich_help_panel=_RAY),
    ] = None,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Embed a corpus of any size: a file of texts in, a file of L2-normalised vectors out, in the order of the input.

    The corpus is streamed: memory does not grow with it. Finished shards are kept in
    OUTPUT.parts and merged into OUTPUT at the end. Stopped or killed at any moment,
    the same command with --resume continues, and the result is the same, byte for byte.
    Other settings or another input are refused then. Nothing is overwritten unasked.

    What made the vectors (model and its checksum, instruction, steps, precision, ...)
    is stored with them: in the schema metadata of a .parquet (key "gircse"), in
    OUTPUT.meta.json beside a .npy or .jsonl. A .npy gets OUTPUT.ids.txt, an id a line,
    where an id column was named or rows were left out.

    A row whose text is empty, null, no string or not UTF-8, a line that is not valid
    JSON or CSV, an id that occurs twice: the run stops, names the line and keeps what is
    done; mend the row and --resume, or go on without such rows with --skip-bad.

    [bold]Examples[/bold]

      gircse embed corpus.txt -o corpus.parquet
      gircse embed corpus.txt -o corpus.parquet --resume
      gircse embed faq.csv --column question --id-column key -o faq.npy
      gircse embed reviews.jsonl -o reviews.parquet --instruction "Find the flaw of the product"
      gircse embed wiki.parquet -o wiki.npy --dim 256 --precision int8
      zcat logs.jsonl.gz | gircse embed - --input-format jsonl --skip-bad -o logs.parquet
      gircse embed s3://bucket/wiki.jsonl --ray auto -o /shared/wiki.vectors
    """
    if instruction is not None and prompt is not None:
        raise UsageError("give either --instruction or --prompt, not both")
    if ray is None and ray_workers is not None:
        raise UsageError("--ray-workers applies to --ray only")
    from gircse.embed.job import EmbedSettings, embed_corpus
    from gircse.embed.reader import CorpusReader
    from gircse.embed.writer import refuse_existing
    from gircse.hardware import default_batch_tokens

    def settings_of(encoder: GIRCSE, environment: dict[str, str | int]) -> EmbedSettings:
        steps, longest = encoder.num_steps if num_steps is None else num_steps, max_length or encoder.max_seq_length
        check_positions(encoder, longest, steps)
        return EmbedSettings(
            model=model or "default",
            model_checksum=_model_checksum(encoder),
            num_steps=steps,
            prompt=prompt if instruction is None else encoder.format_instruction(instruction),
            instruction=instruction,
            dim=dim,
            precision=precision,
            max_length=longest,
            batch_tokens=batch_tokens or default_batch_tokens(encoder.device),
            shard_size=shard_size,
            environment=environment,
        )

    if ray is not None:
        if overwrite:
            raise UsageError(
                "--overwrite does not apply to --ray: choose another OUTPUT, or remove the folder yourself"
            )
        summary, settings = _embed_on_ray(
            source, input_format, column, id_column, skip_bad, output, resume, settings_of,
            load=_WorkerModel(model, device, concrete_dtype(dtype, device), quantize), address=ray, workers=ray_workers,
        )  # fmt: skip
        _close(
            summary,
            settings,
            json_output,
            bad="; ".join(f"{kind} × {count:,}" for kind, count in summary.skipped_by_kind.items()),
        )
        return
    with _interruptible(output):
        reader = CorpusReader(source, input_format, column=column, id_column=id_column, skip_bad=skip_bad)
        refuse_existing(output, resume=resume, overwrite=overwrite)
        reader.peek()
        encoder = load_model(model, device=device, dtype=dtype, quantize=quantize)
        settings = settings_of(encoder, _environment(encoder))
        with _Display(stderr, reader.count_rows()) as display:
            summary = embed_corpus(
                encoder, reader, output, settings, resume=resume, overwrite=overwrite, on_progress=display.update
            )
    _close(summary, settings, json_output, bad=str(reader.bad))


@dataclass(frozen=True)
class _WorkerModel:
    """Loads the model of a Ray worker, which must be the driver's.

    Attributes:
        model: As --model.
        device: As --device; the worker's own choice where None.
        dtype: Of the weights, as ``auto`` means it where the driver runs: all must have the same.
        quantize: As --quantize.
        checksum: Of the driver's model; not compared where None.
    """

    model: str | None
    device: str | None
    dtype: Dtype
    quantize: Quantize | None = None
    checksum: str | None = None

    def __call__(self) -> GIRCSE:
        loaded = load_model(self.model, device=self.device, dtype=self.dtype, quantize=self.quantize)
        if self.checksum is not None and _model_checksum(loaded) != self.checksum:
            raise GircseError(
                f"the model {self.model or 'default'} of a worker is not that of the driver; copy it there"
            )
        return loaded


def _embed_on_ray(
    source: str,
    input_format: InputFormat | None,
    column: str,
    id_column: str | None,
    skip_bad: bool,
    output: Path,
    resume: bool,
    settings_of: Callable[[GIRCSE, dict[str, str | int]], EmbedSettings],
    *,
    load: _WorkerModel,
    address: str,
    workers: int | None,
) -> tuple[EmbedSummary, EmbedSettings]:
    from gircse.distributed import Corpus, connect, embed_on_ray, format_of
    from gircse.embed.reader import STDIN

    if source == STDIN:
        raise UsageError("--ray reads a file that every worker sees, not standard input")
    if "://" not in source:
        source = os.path.abspath(source)  # workers run in the folder where Ray was started
    if load.model is not None and os.path.exists(load.model):
        load = replace(load, model=os.path.abspath(load.model))
    corpus = Corpus(source, input_format or format_of(source), column, id_column, skip_bad)
    connect(address)
    encoder = replace(load, device="cpu")()  # the driver only needs to know which model it is
    environment = _environment(encoder)
    for what in ("device", "threads"):  # the workers' own
        del environment[what]
    settings = settings_of(encoder, environment)
    load = replace(load, checksum=settings.model_checksum)
    del encoder
    with _Display(stderr, None) as display:
        summary = embed_on_ray(
            load, corpus, output, settings,
            address=address, workers=workers, resume=resume,
            on_progress=display.update, on_plan=display.expect,
        )  # fmt: skip
    return summary, settings


def _close(summary: EmbedSummary, settings: EmbedSettings, json_output: bool, *, bad: str) -> None:
    for line in _closing_words(summary, bad, settings):
        stderr.print(line, markup=False, highlight=False, soft_wrap=True)
    if json_output:
        print(json.dumps(asdict(summary), ensure_ascii=False))


def _model_checksum(model: GIRCSE) -> str:
    """SHA-256 of everything a vector depends on: configuration and weights as they were loaded, adapter included."""
    import torch

    digest = sha256(json.dumps(model.encoder.get_config_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _environment(model: GIRCSE) -> dict[str, str | int]:
    """What else there is to know of a vector's making, down to what decides its last bits."""
    import torch

    kind = model.device.type
    chip = torch.cuda.get_device_name(model.device) if kind == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "backbone": model.encoder.reference.name,
        "device": f"{kind} ({chip})",
        "dtype": model.encoder.weights_dtype,
        "packed_weights": str(model.encoder.packed_weights.enabled),
        "threads": torch.get_num_threads(),
        "torch_version": torch.__version__,
        "transformers_version": version("transformers"),
    }


@contextmanager
def _interruptible(output: Path) -> Iterator[None]:
    from gircse.embed.writer import parts_folder

    try:
        yield
    except KeyboardInterrupt:
        kept = parts_folder(output)
        what = f"what is done is kept in {kept}: go on with --resume" if kept.exists() else "nothing was done yet"
        stderr.print(f"stopped; {what}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


class _Display:
    """Texts, tokens/s and time left: a bar on a terminal, a line now and then elsewhere. A context manager.

    Args:
        console: On standard error.
        total: Rows of the input; None where it is a stream.
    """

    def __init__(self, console: Console, total: int | None) -> None:
        self.console, self.total = console, total
        self.bar = ProgressBar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=600,  # texts come longest first within a shard; a short window would mislead
        )
        self.task: TaskID = self.bar.add_task("embedding", total=total, counts="")
        self.resumed, self.logged = 0, time.monotonic()

    def __enter__(self) -> _Display:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def expect(self, total: int) -> None:
        """Say how many rows there are, where that is known only after the start."""
        self.total = total
        self.bar.update(self.task, total=total)

    def update(self, progress: Progress) -> None:
        """Show how far the work is."""
        done = progress.texts + progress.skipped  # the total counts bad rows too
        rate = f" {progress.tokens / progress.seconds:,.0f} tokens/s" if progress.seconds else ""
        of = "" if self.total is None else f"/{self.total:,}"
        counts = f"{done:,}{of} texts{rate}"
        stage = {"embed": "embedding", "write": "writing"}[progress.stage]
        if progress.resumed != self.resumed:
            # What an earlier run did must not count as speed of this one.
            self.resumed = progress.resumed
            self.bar.reset(self.task, completed=done, counts=counts)
        self.bar.update(self.task, description=stage, completed=done, counts=counts)
        if not self.console.is_terminal and time.monotonic() - self.logged > _LOG_EVERY:
            self.logged = time.monotonic()
            self.console.print(f"{stage} {counts}", highlight=False, soft_wrap=True)


def _closing_words(summary: EmbedSummary, bad: str, settings: EmbedSettings) -> Iterator[str]:
    what = f"{summary.texts:,} vectors of {summary.dim} dimensions, {summary.precision}"
    if summary.already_complete:
        yield f"{summary.output} is complete already: {what}"
    else:
        before = f", {summary.resumed:,} of them in earlier runs" if summary.resumed else ""
        speed = f" ({summary.tokens_per_second:,.0f} tokens/s)" if summary.tokens_per_second else ""
        took = timedelta(seconds=round(summary.seconds))
        yield f"{summary.output}: {what}{before}; {summary.tokens:,} tokens in {took}{speed}"
    if summary.truncated:
        yield f"texts cut to {settings.max_length} tokens: {summary.truncated:,}; --max-length raises the limit"
    if summary.skipped:
        yield f"bad rows left out: {summary.skipped:,}; {bad}"
