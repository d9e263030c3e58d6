"""From names on the command line to planned tasks: task folders, suites in YAML, tasks and benchmarks of mteb.

Knows names and where tasks come from; knows nothing of models or scores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import yaml
from mteb.abstasks.abstask import AbsTask

from gircse.errors import InputDataError, UsageError
from gircse.evaluate.folders import describe, read_folder
from gircse.evaluate.tasks import OWN_INSTRUCTIONS, PlannedTask, hub_task, known_tasks, local_tasks

_FOLDER = Path(__file__).parent / "suites"

Wording = str | Mapping[str, str]
"""Another wording of a task's instruction, or of those of its facets: facet to wording."""


@dataclass(frozen=True)
class TaskRequest:
    """A task somebody asked for.

    Attributes:
        name: Of a task folder or an mteb task.
        subsets: Of it; all where empty.
        limit: Items to keep.
        task: mteb's own object, where a benchmark brought it.
    """

    name: str
    subsets: tuple[str, ...] = ()
    limit: int | None = None
    task: AbsTask | None = None


def suite_names() -> list[str]:
    """Suites that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def parse_tasks(text: str) -> list[TaskRequest]:
    """Tasks or benchmarks, separated by commas outside brackets; ``Task/subset`` names one subset."""
    requests: list[TaskRequest] = []
    for part in re.split(r",(?![^()]*\))", text):
        name, _, subset = part.strip().partition("/")
        if not name:
            raise UsageError(f"--tasks {text!r} names an empty task; separate names by single commas")
        same = next((i for i, r in enumerate(requests) if subset and r.name == name and r.subsets), None)
        if same is not None:
            requests[same] = TaskRequest(name, (*requests[same].subsets, subset))
        else:
            requests.append(TaskRequest(name, (subset,) if subset else ()))
    return requests


def read_suite(name: str) -> list[TaskRequest]:
    """A suite that comes with the package, a YAML file of the same form, or a benchmark of mteb.

    Raises:
        UsageError: There is none.
        InputDataError: The file is not of that form.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else _FOLDER / f"{name}.yaml"
    if not path.is_file():
        if path.parent != _FOLDER:
            raise UsageError(f"no file {path}")
        if _benchmark(name) is None:
            known = ", ".join(suite_names())
            raise UsageError(f"there is no suite or benchmark {name!r}; suites are {known}, or a file NAME.yaml")
        return [TaskRequest(name)]
    try:
        suite = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = [{"task": entry} if isinstance(entry, str) else dict(entry) for entry in suite["tasks"]]
        return [_entry(entry, suite.get("limit")) for entry in entries]
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        problem = f"no suite ({error}); it needs 'tasks:' with names or {{task, subsets, limit}}"
        raise InputDataError(str(path), None, problem) from error


def _entry(entry: dict[str, Any], limit: int | None) -> TaskRequest:
    if unknown := set(entry) - {"task", "subsets", "limit"}:
        raise ValueError(f"unknown key {', '.join(sorted(unknown))}")
    return TaskRequest(str(entry["task"]), tuple(entry.get("subsets", ())), entry.get("limit", limit))


def expand(requests: Sequence[TaskRequest], data: Path | None) -> list[TaskRequest]:
    """Benchmarks replaced by their tasks, and every name checked before anything is loaded.

    Raises:
        UsageError: A name is neither a folder of `data` nor known to mteb; with `data` only folders count.
    """
    if data is not None and not data.is_dir():
        raise UsageError(f"--data {data}: no such folder")
    found: list[TaskRequest] = []
    for request in requests:
        if data is not None and _is_local(request.name, data):
            found.append(request)
        elif data is None and (task := _mteb_task(request)) is not None:
            found.append(TaskRequest(request.name, request.subsets, request.limit, task))
        elif (tasks := _benchmark(request.name)) is not None:
            found += [TaskRequest(task.metadata.name, (), request.limit, task) for task in tasks]
        elif data is not None:
            folders = ", ".join(sorted(path.name for path in data.iterdir() if path.is_dir())) or "none"
            raise UsageError(f"{data} has no task {request.name!r}; it has {folders}")
        else:
            raise UsageError(f"mteb knows no task or benchmark {request.name!r}; local folders need --data")
    return found


def check_paraphrases(
    paraphrases: Mapping[str, Sequence[Wording]], requests: Sequence[TaskRequest], data: Path | None
) -> None:
    """Check that other wordings can be scored for the tasks that they are given for.

    Args:
        paraphrases: Task to its other wordings; ``*`` stands for all tasks that have one instruction.
        requests: What is to be scored, as `expand` returns it.
        data: Folder of task folders; None for the hub's tasks, which have one instruction each.

    Raises:
        UsageError: A name is none of the requests'; its task has an instruction for every row; or facets are given for
            a task without them, or unknown ones, or none for a task that has them.
        InputDataError: The folder of a name does not say what it is.
    """
    if unasked := set(paraphrases) - {"*"} - {request.name for request in requests}:
        raise UsageError(f"--instructions names {', '.join(sorted(unasked))}, which is none of the tasks to score")
    for name, wordings in sorted(paraphrases.items()):
        _check_wordings(name, wordings, None if data is None or name == "*" else data)


def _check_wordings(name: str, wordings: Sequence[Wording], data: Path | None) -> None:
    description = None if data is None else describe(data / name, known_tasks())
    given = {facet for wording in wordings if isinstance(wording, Mapping) for facet in wording}
    if data is None or description is None or description.kind not in OWN_INSTRUCTIONS:
        if given:
            raise UsageError(f"--instructions gives {name} wordings of facets, which it has none of; give a list")
        return
    per = OWN_INSTRUCTIONS[description.kind]
    if description.kind != "Facets":
        raise UsageError(
            f"--instructions names {name}, but a {description.kind} task has an instruction for {per}, and other "
            "wordings are of one; take it out of the file"
        )
    facets = read_folder(data / (description.folder or name), description).facets
    if not given or not given <= set(facets):
        raise UsageError(
            f"--instructions: {name} has an instruction for {per}; map some of {', '.join(facets)} to lists of wordings"
        )


def plan(request: TaskRequest, data: Path | None, limit: int | None) -> list[PlannedTask]:
    """The mteb tasks of one request; a limit given here replaces the request's own.

    Raises:
        UsageError: The folder or one of its subsets is missing.
        InputDataError: The folder does not say what it is.
    """
    limit = request.limit if limit is None else limit
    if data is not None:
        if not _is_local(request.name, data):
            raise UsageError(f"{data} has no folder {request.name}")
        return local_tasks(data, request.name, request.subsets, limit)
    assert request.task is not None, "a request without data comes from expand()"
    return [hub_task(request.task, limit)]


def _is_local(name: str, data: Path) -> bool:
    known = known_tasks().get(name)
    return (data / name).is_dir() or bool(known and known.folder and (data / known.folder).is_dir())


def _benchmark(name: str) -> list[AbsTask] | None:
    try:
        return list(mteb.get_benchmark(name).tasks)
    except KeyError:
        return None


def _mteb_task(request: TaskRequest) -> AbsTask | None:
    try:
        task = mteb.get_task(request.name)
    except KeyError:
        return None
    if unknown := set(request.subsets) - set(task.metadata.hf_subsets):
        raise UsageError(f"{request.name} has no subset {', '.join(sorted(unknown))}")
    if request.subsets:
        task.hf_subsets = list(request.subsets)
    return task
