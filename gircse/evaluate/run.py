"""An evaluation: models × tasks × variants × steps, each scored by mteb and filed in mteb's result format.

Knows the order of the work and what is done already; knows nothing of the command line or of how results are shown.
mteb's files are OUT/results/MODEL/REVISION/experiments/SETTINGS/TASK.json; what mteb's format has no place for (items,
intervals, costs, instructions) is in a file of the same path under OUT/details.
"""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache, partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import datasets
import mteb
import numpy as np
from mteb.abstasks import AbsTaskRetrieval
from mteb.cache import ResultCache
from mteb.models import ModelMeta
from mteb.models.model_meta import ScoringFunction

from gircse._version import __version__
from gircse.errors import GircseError
from gircse.evaluate.encoder import GenerativeSource, StepEncoder, StepStore, TextSource, model_meta
from gircse.evaluate.items import items_of
from gircse.evaluate.perturb import DESCRIPTIONS, perturb
from gircse.evaluate.results import unpack_items
from gircse.evaluate.spare import one_thread
from gircse.evaluate.statistics import DRAWS, Items, interval
from gircse.evaluate.suites import TaskRequest, Wording, plan
from gircse.evaluate.tasks import OTHER_INSTRUCTION, OWN_INSTRUCTIONS, PlannedTask

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation does besides models and tasks.

    Attributes:
        data: Folder of task folders; None to take tasks from the hub.
        limit: Items to keep of every task; None for each request's own limit.
        seed: Of samples, perturbations and bootstrap.
        perturbations: Kinds of noise to score besides the clean texts.
        paraphrases: Task to other wordings of its instruction, to score besides its own; of a facet task each maps
            facets to wordings. ``*`` stands for every task with one instruction. See `check_paraphrases`.
        overwrite: Score again what is scored already.
    """

    data: Path | None = None
    limit: int | None = None
    seed: int = 42
    perturbations: tuple[str, ...] = ()
    paraphrases: Mapping[str, Sequence[Wording]] = field(default_factory=dict)
    overwrite: bool = False


@dataclass(frozen=True)
class Variant:
    """One way to ask a model about a task: its own instruction and clean texts, or one of the two changed."""

    perturbation: str | None = None
    paraphrase: int | None = None
    wording: Wording | None = None

    def __str__(self) -> str:
        paraphrase = f" (wording {self.paraphrase})" if self.paraphrase else ""
        return f" ({self.perturbation})" if self.perturbation else paraphrase

    @property
    def settings(self) -> dict[str, Any]:
        """What of it belongs in the experiment's name."""
        named: dict[str, Any] = {}
        if self.perturbation:
            named["perturbation"] = self.perturbation
        if self.wording is not None:
            text = self.wording if isinstance(self.wording, str) else json.dumps(self.wording, sort_keys=True)
            named["instruction"] = sha256(text.encode()).hexdigest()[:8]
        return named

    def reword(self, instructions: Mapping[str, str]) -> dict[str, str]:
        """The instructions of a task's subsets under this variant."""
        if isinstance(self.wording, str):
            return dict.fromkeys(instructions, self.wording)
        return {**instructions, **(self.wording or {})}


@dataclass(frozen=True)
class Event:
    """Something to show while an evaluation runs.

    Attributes:
        stage: ``task`` (begins), ``texts`` (progress), ``scored``, ``skipped`` or ``failed``.
        model: Its name.
        task: Its name; with the variant where it is not the plain one.
        done: Texts embedded (``texts``).
        total: Of so many.
        scores: Step to main score (``scored``, ``skipped``); the step is None for a model without steps.
        message: What went wrong (``failed``).
    """

    stage: str
    model: str
    task: str
    done: int = 0
    total: int = 0
    scores: Mapping[int | None, float] = field(default_factory=dict)
    message: str = ""


OnEvent = Callable[[Event], None]


def evaluate_model(
    source: TextSource, requests: Sequence[TaskRequest], output: Path, settings: EvaluationSettings, on_event: OnEvent
) -> int:
    """Score one model on every task; a task that fails is reported and the others go on.

    Args:
        source: The model.
        requests: Tasks, as `expand` returns them.
        output: Folder of results; what is there and still holds is not scored again.
        settings: The rest.
        on_event: Called as the work goes on.

    Returns:
        How many tasks failed.
    """
    datasets.disable_progress_bars()
    failed = 0
    for request in requests:
        try:
            planned = plan(request, settings.data, settings.limit)
        except Exception as error:
            failed += 1
            on_event(Event("failed", source.name, request.name, message=one_line(error)))
            continue
        with closing(StepStore(source)) as store:  # a facet task's control asks for the same texts again
            for task in planned:
                for variant in _variants(task, source, settings):
                    label = f"{task.name}{variant}"
                    emit = partial(_event, on_event, source.name, label)
                    try:
                        _run_task(store, task, variant, output, settings, emit)
                    except Exception as error:
                        failed += 1
                        logger.debug("%s failed", label, exc_info=True)
                        emit("failed", message=one_line(error))
                task.task.unload_data()
    return failed


def _event(on_event: OnEvent, model: str, task: str, stage: str, **values: Any) -> None:
    on_event(Event(stage, model, task, **values))


def one_line(error: Exception) -> str:
    """An error as people are shown it: errors of ours say what to do, others are named."""
    text = " ".join(str(error).split())
    return text if isinstance(error, GircseError) else f"{type(error).__name__}: {text}"


def _variants(task: PlannedTask, source: TextSource, settings: EvaluationSettings) -> Iterator[Variant]:
    yield Variant()
    if task.name.endswith(OTHER_INSTRUCTION):
        return
    for kind in settings.perturbations:
        yield Variant(perturbation=kind)
    if isinstance(source, GenerativeSource):  # who reads instructions
        for_all = () if task.kind in OWN_INSTRUCTIONS else settings.paraphrases.get("*", ())
        for number, wording in enumerate(settings.paraphrases.get(task.name, for_all), 1):
            yield Variant(paraphrase=number, wording=wording)


def _run_task(
    store: StepStore,
    planned: PlannedTask,
    variant: Variant,
    output: Path,
    settings: EvaluationSettings,
    emit: Callable[..., None],
) -> None:
    """Score all steps of one task under one variant from one encode."""
    source, cache = store.source, ResultCache(output)
    store.on_progress = lambda done, total: emit("texts", done=done, total=total)
    sampled = {"limit": planned.limit, "seed": settings.seed} if planned.limit is not None else {}
    metas = {step: model_meta(source, step, {**sampled, **variant.settings}) for step in source.steps}
    instructions = variant.reword(planned.instructions)
    prompts = {subset: source.prompt(instruction, None) for subset, instruction in instructions.items()}
    fingerprint: dict[str, Any] = {"prompts": prompts, "data": planned.checksum or planned.task.metadata.revision}
    similarity = metas[source.steps[0]].similarity_fn_name
    if similarity is not ScoringFunction.COSINE:  # so results by cosine, which never said so, stay valid
        fingerprint["similarity"] = similarity
    if (width := getattr(source, "model").truncate_dim) is not None:  # noqa: B009
        fingerprint["truncate_dim"] = width
    if variant.perturbation is not None:
        fingerprint["seed"] = settings.seed
    done: dict[int | None, float] = {}
    if not settings.overwrite:
        found = {step: _finished(cache, planned, meta, fingerprint) for step, meta in metas.items()}
        done = {step: score for step, score in found.items() if score is not None}
    pending = [step for step in source.steps if step not in done]
    if not pending:
        emit("skipped", scores=done)
        return
    emit("task")
    planned.load(settings.seed)
    change = None
    if variant.perturbation is not None:
        change = partial(perturb, kind=variant.perturbation, seed=settings.seed)
    for step in pending:
        encoder = StepEncoder(store, step, metas[step], instructions, change)
        scored = _score(planned, encoder, cache, {"num_steps": step, "prompts": prompts, "dtype": source.dtype})
        facts = {
            **_facts(planned, source, step, variant, settings),
            "instructions": instructions,
            "fingerprint": fingerprint,
            "cost": store.cost(step),
            **scored,
        }
        _write_json(details_path(cache, planned.name, metas[step]), facts)
        done[step] = scored["score"]
    emit("scored", scores={step: done[step] for step in source.steps})


def _score(
    planned: PlannedTask, encoder: StepEncoder, cache: ResultCache, encode_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """One step through mteb's own evaluation, and the items its score is made of."""
    task: Any = planned.task
    task.rng_state, task.np_rng = (
        random.Random(task.seed),
        np.random.default_rng(task.seed),
    )  # every step draws the same clusters
    per_query: dict[tuple[str, str], Any] = {}
    folder = Path(tempfile.mkdtemp(prefix="gircse-predictions-"))
    retrieval = isinstance(task, AbsTaskRetrieval)
    if retrieval:
        task.task_specific_scores = partial(_keep_queries, per_query, type(task).task_specific_scores, task)
    started = time.perf_counter()
    try:
        with one_thread() as encoder.store.threads:
            found = mteb.evaluate(
                cast(Any, encoder),
                task,
                cache=None,  # saved below, once: mteb would save twice and look its packages up each time
                encode_kwargs=cast(Any, {"batch_size": 32, "show_progress_bar": False, **encode_kwargs}),
                prediction_folder=None if retrieval else folder,
                show_progress_bar=False,
                co2_tracker=False,
            )
        path = folder / task.prediction_file_name
        predictions = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    (result,) = found.task_results
    cache.save_to_cache(result, encoder.meta, encode_kwargs=encode_kwargs)
    subsets = []
    for split, entries in result.scores.items():
        for entry in entries:
            subset = entry["hf_subset"]
            guesses, queries = predictions.get(subset, {}).get(split), per_query.get((subset, split))
            items = items_of(task, subset, split, entry, guesses, queries)
            subsets.append({"subset": subset, "split": split, "score": entry["main_score"], "items": _packed(items)})
    score = float(result.get_score())
    low_high = _interval([unpack_items(entry["items"]) for entry in subsets])
    return {"score": score, "interval": low_high, "subsets": subsets, "seconds": time.perf_counter() - started}


def _keep_queries(
    kept: dict[tuple[str, str], Any],
    original: Any,
    task: Any,
    scores: Any,
    qrels: Any,
    results: Any,
    hf_split: str,
    hf_subset: str,
) -> dict[str, float]:
    """Mteb's hook for scores of a task's own, which is handed the measures of every query."""
    kept[hf_subset, hf_split] = scores
    return original(task, scores, qrels, results, hf_split, hf_subset)


def _interval(items: Sequence[Items | None]) -> tuple[float, float] | None:
    """95 % bootstrap interval of the mean over subsets; None where a subset has no items."""
    known = [entry for entry in items if entry is not None]
    if not known or len(known) < len(items):
        return None
    low, high = interval(np.mean([entry.samples(DRAWS) for entry in known], axis=0))
    return None if math.isnan(low) else (low, high)


def _facts(
    planned: PlannedTask, source: TextSource, step: int | None, variant: Variant, settings: EvaluationSettings
) -> dict[str, Any]:
    metadata = planned.task.metadata
    perturbation = variant.perturbation
    return {
        "task": planned.name,
        "kind": planned.kind,
        "main_score": metadata.main_score,
        "model": source.name,
        "revision": source.revision,
        "num_steps": step,
        "own_steps": source.model.num_steps if isinstance(source, GenerativeSource) else None,
        "dtype": source.dtype,
        "device": str(getattr(source, "model").device),  # noqa: B009
        "sample": planned.sample,
        "limit": planned.limit,
        "seed": settings.seed,
        "perturbation": perturbation,
        "perturbation_is": DESCRIPTIONS[perturbation] if perturbation else None,
        "paraphrase": variant.paraphrase,
        "versions": _versions(),
    }


@cache
def _versions() -> dict[str, str]:
    return {"gircse": __version__, **{name: version(name) for name in ("mteb", "torch", "transformers")}}


def _packed(items: Items | None) -> dict[str, Any] | None:
    if items is None:
        return None
    gold = None if items.gold is None else [round(float(v), 6) for v in items.gold]
    return {"statistic": items.statistic, "values": [round(float(v), 7) for v in items.values], "gold": gold}


def details_path(cache: ResultCache, task: str, meta: ModelMeta) -> Path:
    """Where the details of a result are."""
    path = cache.get_task_result_path(task, meta)
    return Path(cache.cache_path) / "details" / path.relative_to(Path(cache.cache_path) / "results")


def _finished(
    cache: ResultCache, planned: PlannedTask, meta: ModelMeta, fingerprint: Mapping[str, Any]
) -> float | None:
    """The score that is there already, if the same prompts and data made it and it is of the same subsets."""
    path = details_path(cache, planned.name, meta)
    if not path.is_file() or not cache.get_task_result_path(planned.name, meta).is_file():
        return None
    facts = json.loads(path.read_text(encoding="utf-8"))
    same_subsets = {entry["subset"] for entry in facts["subsets"]} == set(planned.task.hf_subsets)
    return facts["score"] if facts["fingerprint"] == fingerprint and same_subsets else None


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, ensure_ascii=False, allow_nan=True), encoding="utf-8")
    temporary.replace(path)


def write_soft_tokens(source: TextSource, output: Path) -> None:
    """What the soft tokens of a few texts spell under two instructions, for the report."""
    if not isinstance(source, GenerativeSource):
        return
    steps = max(step for step in source.steps if step is not None)
    if steps < 1:
        return
    spelled = [
        {
            "text": text,
            "instruction": instruction,
            "steps": [
                {"tokens": step.tokens, "weights": step.weights, "entropy": step.entropy}
                for step in source.model.explain(text, instruction=instruction, num_steps=steps, top=3)
            ],
        }
        for text in _EXAMPLES
        for instruction in _EXAMPLE_INSTRUCTIONS
    ]
    folder = source.name.replace("/", "__").replace(" ", "_")
    _write_json(output / "details" / folder / source.revision / "soft_tokens.json", {"texts": spelled})


_EXAMPLES = (
    "The striker scored twice in the last minutes and the stadium went wild.",
    "My card was charged twice for the same coffee, please give me the money back.",
    "La banque centrale a relevé son taux directeur pour freiner l'inflation.",
)
_EXAMPLE_INSTRUCTIONS = ("Identify the topic of the given text", "Identify the language the text is written in")
