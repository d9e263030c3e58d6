"""`gircse evaluate`: the command's options, its progress and its closing table. The work is `gircse.evaluate`'s."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gircse.cli.common import (
    DebugOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    Quantize,
    QuantizeOption,
    WeightsDtype,
    backbone_of,
    check_device,
    prepare_backbone,
    quiet_libraries,
    stderr,
)
from gircse.errors import InputDataError, UsageError

if TYPE_CHECKING:
    from gircse.evaluate.encoder import TextSource
    from gircse.evaluate.run import Event
    from gircse.evaluate.suites import Wording

_WHAT, _HOW = "What is scored", "How"
_LOG_EVERY = 15.0  # seconds between progress lines


def evaluate(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of results; what it holds is not scored again."),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks or MTEB benchmarks, separated by commas; Task/subset is one subset.", rich_help_panel=_WHAT
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="dev, quick, a YAML file like them, or an MTEB benchmark.", rich_help_panel=_WHAT),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of task folders; the hub's tasks where not given.", rich_help_panel=_WHAT
        ),
    ] = None,
    model: ModelOption = None,
    num_steps: Annotated[
        str | None,
        typer.Option(help="K, or several: 0,1,2,5 or 1-20. All from one run; 0 is the encoder-only vector."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Another model, on the same texts: a folder, a hub id or all-minilm-l6-v2. May be repeated.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    instructions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML, task to other wordings of its instruction, or of each facet's: how much depends on the words?",
            rich_help_panel=_HOW,
        ),
    ] = None,
    perturb: Annotated[
        list[str] | None,
        typer.Option(
            help="typos, case, truncate or noise: score perturbed texts too. May be repeated.", rich_help_panel=_HOW
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=2, help="Items of each task (pairs, test texts, queries), sampled by the seed.", rich_help_panel=_HOW
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of samples and perturbations.", rich_help_panel=_HOW)] = 42,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Score again what is scored already.", rich_help_panel=_HOW)
    ] = False,
    device: DeviceOption = None,
    dtype: Annotated[WeightsDtype, typer.Option("--dtype", help="Of the weights.")] = "float32",
    quantize: QuantizeOption = None,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Score embeddings in MTEB's protocol: every K from one run, intervals, other models beside it.

    Scores are mteb's own, results are in mteb's format under DIR/results. With --data
    the tasks are folders of local files: those of the names MTEB knows, and your own with
    a task.yaml beside them (docs/evaluate.md). Tasks that are scored already are skipped;
    a task that fails, or a model that cannot be loaded, is reported, the others go on,
    and the exit code is 1.

    [bold]Examples[/bold]

      gircse evaluate --suite dev --data eval --num-steps 0,1,2,5 --against all-minilm-l6-v2 -o results
      gircse evaluate --tasks STSBenchmark,Banking77Classification -o results
      gircse evaluate --tasks "MTEB(eng, v2)" --num-steps 5 -o results
      gircse evaluate --tasks Tatoeba/deu-eng --data eval --perturb typos -o results
      gircse report results -o report.html
    """
    if (tasks is None) == (suite is None):
        raise UsageError("give either --tasks or --suite")
    steps = parse_steps(num_steps)
    os.environ.setdefault("TQDM_DISABLE", "1")  # mteb's bars; read when tqdm is imported
    from gircse.evaluate.perturb import DESCRIPTIONS

    unknown = set(perturb or ()) - set(DESCRIPTIONS)
    if unknown:
        raise UsageError(f"unknown --perturb {', '.join(sorted(unknown))}; choose from {', '.join(DESCRIPTIONS)}")
    with stderr.status("loading mteb"), quiet_libraries():
        from gircse.evaluate.run import EvaluationSettings, evaluate_model, one_line, write_soft_tokens
        from gircse.evaluate.suites import check_paraphrases, expand, parse_tasks, read_suite

        logging.getLogger("mteb").setLevel(logging.ERROR)  # notes for authors of tasks, not for who runs them
        requests = expand(parse_tasks(tasks) if tasks else read_suite(str(suite)), data)
    settings = EvaluationSettings(
        data=data,
        limit=limit,
        seed=seed,
        perturbations=tuple(dict.fromkeys(perturb or ())),
        paraphrases=_read_instructions(instructions) if instructions else {},
        overwrite=overwrite,
    )
    check_paraphrases(settings.paraphrases, requests, data)
    models = (model, *dict.fromkeys(against or ()))
    for name in models:  # all of them before the hours that scoring one may take
        _check_model(name)
    _check_output(output)
    failed = 0
    unloaded: list[str] = []
    scored: list[Event] = []
    for name in models:
        try:
            source = _load(name, steps, device, dtype, quantize)
        except Exception as error:  # also what a damaged folder or a full GPU raises: the other models go on
            if len(models) == 1:
                raise
            if debug:
                stderr.print_exception()
            unloaded.append(name or "the model")
            _say(f"{unloaded[-1]} failed: {one_line(error)}")
            continue
        with _Display() as display, quiet_libraries():
            failed += evaluate_model(source, requests, output, settings, display.show)
            write_soft_tokens(source, output)
        scored += display.scored
        del source
    if json_output:
        print(json.dumps([_as_json(event) for event in scored], ensure_ascii=False))
    else:
        _print_table(output)
    if failed or unloaded:
        what = [f"{failed} task(s) failed"] if failed else []
        what += [f"{len(unloaded)} model(s) could not be loaded"] if unloaded else []
        stderr.print(f"[bold red]error:[/] {' and '.join(what)}; see above. The others are in {output}")
        raise typer.Exit(1)


def parse_steps(text: str | None) -> list[int] | None:
    """``0,1,2,5`` or ``1-20``, or both mixed, as numbers.

    Raises:
        UsageError: It is neither.
    """
    if text is None:
        return None
    steps: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if found is None or (found[2] and int(found[2]) < int(found[1])):
            raise UsageError(f"--num-steps {text!r} is no list of steps; write 5, 0,1,2,5 or 1-20")
        steps |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    return sorted(steps)


def _check_output(folder: Path) -> None:
    """Make the folder of results and write into it once, before the hours whose scores would have no place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--output {folder}: nothing can be written there ({error.strerror})") from error


def _check_model(name: str | None) -> None:
    """What can be known of a model without loading it: its folder or package, or that the hub has one of the name."""
    from gircse.other_models import MINILM, is_on_hub, minilm_folder

    if name is None or Path(name).is_dir():
        return
    if name.lower() == MINILM:
        minilm_folder()
    elif is_on_hub(name) is False:  # where the hub does not answer, loading will say so
        where = "there is no such folder, and none of that name on the hub or, offline, in its cache"
        raise UsageError(f"no model {name!r}: {where}; a known name is {MINILM}")


def _load(
    name: str | None, steps: Sequence[int] | None, device: str | None, dtype: WeightsDtype, quantize: Quantize | None
) -> TextSource:
    from gircse.evaluate.encoder import load_source

    check_device(device)
    prepare_backbone(backbone_of(name))
    with stderr.status(f"loading {name or 'the model'}"), quiet_libraries():
        return load_source(name, steps, device=device, dtype=dtype, quantize=quantize)


def _read_instructions(path: Path) -> dict[str, list[Wording]]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"--instructions {path}: no such file") from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        raise InputDataError(str(path), None if line is None else line + 1, "no valid YAML") from error
    values = {"*": values} if isinstance(values, list) else values
    if not isinstance(values, Mapping):
        raise InputDataError(str(path), None, "must be a list of instructions, or map tasks to such lists")
    return {str(task): _wordings(entry, path, str(task)) for task, entry in values.items()}


def _wordings(entry: Any, path: Path, task: str) -> list[Wording]:
    """A list of instructions as it is; of a mapping of facets to lists the first of each, the second of each and on."""
    lists = list(entry.values()) if isinstance(entry, Mapping) else [entry]
    for texts in lists or [None]:
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise InputDataError(
                str(path), None, f"{task}: must be a list of instructions, or map facets to such lists"
            )
    if not isinstance(entry, Mapping):
        return list(entry)
    if len({len(texts) for texts in lists}) > 1:
        raise InputDataError(str(path), None, f"{task}: every facet needs the same number of wordings")
    return [dict(zip(map(str, entry), texts, strict=True)) for texts in zip(*lists, strict=True)]


def _say(text: str) -> None:
    stderr.print(text, markup=False, highlight=False, soft_wrap=True)


class _Display:
    """What is going on, a line now and then on standard error. A context manager."""

    def __init__(self) -> None:
        self.scored: list[Event] = []
        self.status = stderr.status("") if stderr.is_terminal else None
        self.started = self.logged = time.monotonic()

    def __enter__(self) -> _Display:
        if self.status:
            self.status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.status:
            self.status.stop()

    def show(self, event: Event) -> None:
        """Show an event."""
        model = event.model.split("/")[-1]
        where = f"{model} {event.task}"
        if event.stage == "task":
            self.started = self.logged = time.monotonic()
            if self.status:
                self.status.update(where)
        elif event.stage == "texts":
            self._progress(f"{where}: {event.done:,}/{event.total:,} texts")
        elif event.stage == "failed":
            _say(f"{where} failed: {event.message}")
        else:
            self.scored.append(event)
            steps = {step: f"{100 * score:.1f}" for step, score in event.scores.items()}
            shown = " ".join(text if step is None else f"K={step}: {text}" for step, text in steps.items())
            took = "already scored" if event.stage == "skipped" else f"{time.monotonic() - self.started:.0f} s"
            _say(f"{where} {shown} ({took})")

    def _progress(self, text: str) -> None:
        if self.status:
            self.status.update(text)
        elif time.monotonic() - self.logged > _LOG_EVERY:
            self.logged = time.monotonic()
            _say(text)


def _as_json(event: Event) -> dict[str, Any]:
    scores = [{"num_steps": step, "score": score} for step, score in event.scores.items()]
    return {"model": event.model, "task": event.task, "scores": scores, "new": event.stage == "scored"}


def _print_table(output: Path) -> None:
    from rich.console import Console

    from gircse.cli.report import terminal_table
    from gircse.errors import GircseError
    from gircse.evaluate.results import read_results

    try:
        results = read_results(output)
    except GircseError:  # every task failed, which has been said already
        return
    width = None if sys.stdout.isatty() else 200
    Console(width=width).print(terminal_table(results))
