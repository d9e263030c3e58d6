"""Task folders as mteb tasks, and deterministic samples of any mteb task.

Knows mteb's task classes and their data; knows nothing of models, steps or results. A folder whose name mteb knows
becomes a subclass of mteb's own class: its metadata, scores and protocol are mteb's, only the loading is local.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard, cast

import mteb
import yaml
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRegression,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.languages import check_language_code, iso_mappings

from gircse.errors import InputDataError, UsageError
from gircse.evaluate.folders import (
    FolderData,
    RetrievalData,
    Row,
    TaskDescription,
    checksum,
    describe,
    key_line,
    parse_description,
    read_folder,
    subsets,
)
from gircse.evaluate.spare import spare_work

PER_TEXT_INSTRUCTION = "task_instruction"
"""Column that carries an instruction of its own for each text (triplets)."""

OTHER_INSTRUCTION = ".other-instruction"
"""Ends the name of a facet task's control: the same labels under the other facets' instructions."""

OWN_INSTRUCTIONS = {"Facets": "every facet", "Triplets": "every row"}
"""Kinds of task that have more than one instruction, and what each of them belongs to."""

DISTRACTORS_PER_QUERY = 5
"""Documents that a limited retrieval task keeps besides the relevant ones, for each sampled query."""

_DEFAULT = "default"  # mteb's name of the only subset
_CLASSES: dict[str, tuple[type[AbsTask], str, str]] = {  # kind -> mteb's class, type and main score
    "STS": (AbsTaskSTS, "STS", "cosine_spearman"),
    "PairClassification": (AbsTaskPairClassification, "PairClassification", "max_ap"),
    "Classification": (AbsTaskClassification, "Classification", "accuracy"),
    "Clustering": (AbsTaskClustering, "Clustering", "v_measure"),
    "Retrieval": (AbsTaskRetrieval, "Retrieval", "ndcg_at_10"),
    "Reranking": (AbsTaskRetrieval, "Reranking", "map_at_1000"),
    "BitextMining": (AbsTaskBitextMining, "BitextMining", "f1"),
    "Facets": (AbsTaskClustering, "Clustering", "v_measure"),
    "Triplets": (AbsTaskRetrieval, "InstructionReranking", "precision_at_1"),
}


@dataclass
class PlannedTask:
    """An mteb task and how to ask a model about it.

    Attributes:
        task: Its data are not loaded yet.
        kind: A key of `LAYOUTS`, or mteb's type of a hub task.
        instructions: Subset to instruction; ``default`` for every subset that is not named.
        checksum: Of the local files; None for a hub task.
        limit: Items to keep; None for all.
        sample: What was kept, once the data are loaded.
    """

    task: AbsTask
    kind: str
    instructions: dict[str, str]
    checksum: str | None = None
    limit: int | None = None
    sample: str = field(default="all")
    _ready: bool = field(default=False, init=False)

    @property
    def name(self) -> str:
        """The task's name, as in results."""
        return str(self.task.metadata.name)

    def load(self, seed: int) -> None:
        """Load the data, and sample them where a limit is set; where that is done already, nothing."""
        if self._ready and self.task.data_loaded:
            return
        self.task.load_data()
        if isinstance(self.task, AbsTaskRetrieval):
            self.task.convert_v1_dataset_format_to_v2(num_proc=None)
        loaded: Any = self.task
        if isinstance(loaded.dataset, DatasetDict):  # of the hub, in one language
            loaded.dataset = {_DEFAULT: loaded.dataset}
        if self.limit is not None:
            self.sample = sample_task(self.task, self.limit, seed)
        elif self.checksum is not None:
            self.sample = _compared_with_mteb(self.task)
        spare_work(self.task)
        self._ready = True


@cache
def known_tasks() -> dict[str, TaskDescription]:
    """Folders that need no task.yaml."""
    tasks = _known()["tasks"]
    return {name: parse_description(values, f"known_tasks.yaml, {name}") for name, values in tasks.items()}


@cache
def _known() -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent / "known_tasks.yaml").read_text(encoding="utf-8"))


def hub_task(task: AbsTask, limit: int | None = None) -> PlannedTask:
    """A task of mteb, its data from the hub, under the instruction that is known for it."""
    name, kind, prompt = task.metadata.name, str(task.metadata.type), task.metadata.prompt
    instruction = known_tasks()[name].instruction if name in known_tasks() else None
    instruction = instruction or (prompt.get("query") if isinstance(prompt, dict) else prompt)
    instruction = instruction or _known()["kinds"].get(kind) or task.abstask_prompt
    return PlannedTask(task, kind, {_DEFAULT: instruction}, limit=limit)


def local_tasks(
    data: Path, name: str, only: Sequence[str] | None = None, limit: int | None = None
) -> list[PlannedTask]:
    """The tasks of a folder: one, and for facets the control under the other facets' instructions as well.

    Args:
        data: Folder of task folders.
        name: The task.
        only: Subsets to keep; all where not given.
        limit: Items to keep of each subset.

    Raises:
        UsageError: A subset is not there.
        InputDataError: The folder does not say what it is, or says it wrongly.
    """
    description = describe(data / name, known_tasks())
    _check_language(description, data / name / "task.yaml")
    folder = data / (description.folder or name)
    found = subsets(folder)
    if only and (missing := set(only) - set(found)):
        raise UsageError(f"{folder} has no subset {', '.join(sorted(missing))}; it has {', '.join(found) or 'none'}")
    folders = {subset: folder / subset for subset in only or found} or {_DEFAULT: folder}
    instruction = description.instruction or _known()["kinds"][description.kind]
    revision = checksum(list(folders.values()))
    plan = {"kind": description.kind, "checksum": revision, "limit": limit}
    if description.kind != "Facets":
        task = _make_task(name, description, folders, revision)
        return [PlannedTask(task, instructions={_DEFAULT: instruction}, **plan)]
    facets = read_folder(folder, description).facets
    pairs = {f"{facet} under {other}": (facet, other) for facet in facets for other in facets if facet != other}
    own = {facet: (facet, facet) for facet in facets}
    planned = []
    for suffix, shown in (("", own), (OTHER_INSTRUCTION, pairs)):
        if shown:
            labels = {subset: facet for subset, (facet, _) in shown.items()}
            task = _make_task(name + suffix, description, dict.fromkeys(shown, folder), revision, labels)
            planned.append(PlannedTask(task, instructions={s: facets[by] for s, (_, by) in shown.items()}, **plan))
    return planned


def _make_task(
    name: str,
    description: TaskDescription,
    folders: Mapping[str, Path],
    revision: str,
    facet_of: Mapping[str, str] | None = None,
) -> AbsTask:
    base, kind, main_score = _CLASSES[description.kind]
    try:
        known: AbsTask | None = mteb.get_task(name)
    except KeyError:
        known = None
    if known is not None and isinstance(known, base) and known.metadata.name == name:
        attributes: dict[str, Any] = {}
        base, split = type(known), "test" if "test" in known.eval_splits else known.eval_splits[0]
    else:
        split = "test"
        languages = {subset: _languages(description.language, subset) for subset in folders}
        attributes = {
            "metadata": TaskMetadata(
                name=name,
                description=f"{description.kind} of the folder {name}.",
                dataset={"path": f"local/{name}", "revision": revision},
                type=cast(Any, kind),
                category="t2t",
                eval_splits=[split],
                eval_langs=languages[_DEFAULT] if list(folders) == [_DEFAULT] else languages,
                main_score=description.main_score or main_score,
            )
        }
        if issubclass(base, AbsTaskClustering):
            attributes |= {"max_fraction_of_documents_to_embed": None, "max_document_to_embed": None}
    attributes |= {"folders": folders, "description": description, "split": split, "facet_of": facet_of or {}}
    task = type(base.__name__, (_LocalData, base), attributes)()
    task.hf_subsets = list(folders)
    return task.filter_eval_splits([split])


def _check_language(description: TaskDescription, path: Path) -> None:
    """Mteb's table of languages, asked while the file that names one is known."""
    language = description.language
    for code in [language] if isinstance(language, str) else language.values():
        try:
            if not re.fullmatch("[a-z]+-[A-Z][a-z]{3}", code):
                raise ValueError("no language and script")
            check_language_code(code)
        except ValueError:
            better = _language_code(code)
            mend = f"write {better}" if better else "write a language of ISO 639-3 and its script, such as deu-Latn"
            raise InputDataError(str(path), key_line(path, "language"), f"language is {code!r}; {mend}") from None


def _language_code(text: str) -> str | None:
    """What somebody who wrote ``de``, ``deu`` or ``de-DE`` means, in the language's usual script; None if unknown."""
    # mteb has the tables, but not in its interface: without them the advice is a general one.
    two_letters: Mapping[str, str] = getattr(iso_mappings, "_get_iso1_to_iso3", dict)()
    scripts: Mapping[str, str] = getattr(iso_mappings, "_get_iso3_to_default_script", dict)()
    first = re.split("[-_]", text)[0].lower()
    language = two_letters.get(first, first)
    return f"{language}-{scripts[language]}" if language in scripts else None


def _languages(language: str | Mapping[str, str], subset: str) -> list[str]:
    return [language if isinstance(language, str) else language.get(subset, "eng-Latn")]


class _LocalData:
    """Loads the rows of folders into an mteb task; mixed in before mteb's class."""

    folders: Mapping[str, Path]
    description: TaskDescription
    split: str
    facet_of: Mapping[str, str]
    data_loaded: bool

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """As mteb's, from the folders."""
        if self.data_loaded:
            return
        task = cast(Any, self)
        task.dataset = {}
        for subset, folder in self.folders.items():
            data = read_folder(folder, self.description)
            if self.description.kind == "Triplets":
                data.retrieval = _triplets(data.splits["test"])
            if data.retrieval is not None or self.description.kind == "Reranking":
                retrieval = data.retrieval or _reranking(data.splits["test"])
                task.dataset[subset] = {self.split: _retrieval_split(retrieval)}
            else:
                task.dataset[subset] = _splits(task, data, self.split, self.facet_of.get(subset))
        if isinstance(self, AbsTaskClustering) and str(self.metadata.dataset["path"]).startswith("local/"):
            # Bootstrap samples of the data's own size: their spread is then the standard error of the score.
            self.max_documents_per_cluster = min(len(s[self.split]) for s in task.dataset.values())
        self.data_loaded = True


def _splits(task: Any, data: FolderData, split: str, facet: str | None) -> DatasetDict:
    if isinstance(task, AbsTaskClassification):
        number = _numbered(row["label"] for rows in data.splits.values() for row in rows)
        text, label = task.input_column_name, task.label_column_name
        return DatasetDict(
            {
                target: Dataset.from_list(
                    [{text: row["text"], label: number[row["label"]]} for row in data.splits[name]]
                )
                for name, target in (("train", task.train_split), ("test", split))
            }
        )
    rows = data.splits["test"]
    text_task = cast(Any, task)  # its columns are names, not mappings to other modalities
    if isinstance(task, AbsTaskClustering):
        labels = [str(row["labels"][facet] if facet else row["label"]) for row in rows]
        rows = [
            {task.input_column_name: row["text"], task.label_column_name: label}
            for row, label in zip(rows, labels, strict=True)
        ]
    elif isinstance(task, AbsTaskPairClassification):
        first, second, label = text_task.input1_column_name, text_task.input2_column_name, task.label_column_name
        rows = [{first: row["sentence1"], second: row["sentence2"], label: row["label"]} for row in rows]
    else:
        first, second = text_task.column_names if isinstance(task, AbsTaskSTS) else ("sentence1", "sentence2")
        rows = [
            {first: row["sentence1"], second: row["sentence2"], **({"score": row["score"]} if "score" in row else {})}
            for row in rows
        ]
    return DatasetDict({split: Dataset.from_list(rows)})


def _numbered(labels: Any) -> dict[Any, int]:
    return {label: number for number, label in enumerate(sorted(set(labels), key=lambda label: (str(label), label)))}


def _reranking(rows: Sequence[Row]) -> RetrievalData:
    """Queries with candidates of their own; ids sort as mteb's do, which decides ties."""
    data = RetrievalData([], [], {}, {})
    assert data.candidates is not None
    for number, row in enumerate(rows):
        query = f"test_query{number}"
        data.queries.append({"id": query, "text": row["query"]})
        for grade, prefix, texts in ((1, "apositive", row["positive"]), (0, "negative", row["negative"])):
            for place, text in enumerate(texts):
                document = f"{prefix}_{query}_{place:05}"
                data.corpus.append({"id": document, "title": "", "text": text})
                data.relevant.setdefault(query, {})[document] = grade
                data.candidates.setdefault(query, []).append(document)
    return data


def _triplets(rows: Sequence[Row]) -> RetrievalData:
    """Each text with two candidates, all three under the row's instruction; a tie counts as a miss."""
    data = RetrievalData([], [], {}, {})
    assert data.candidates is not None
    for number, row in enumerate(rows):
        query = f"triplet{number}"
        instruction = {PER_TEXT_INSTRUCTION: row["instruction"]}
        correct, other = f"{query}-correct", f"{query}-other"  # of tied documents the later id is ranked first
        data.queries.append({"id": query, "text": row["text"]} | instruction)
        for document, text in ((correct, row["positive"]), (other, row["negative"])):
            data.corpus.append({"id": document, "title": "", "text": text} | instruction)
        data.relevant[query] = {correct: 1, other: 0}
        data.candidates[query] = [correct, other]
    return data


def _retrieval_split(data: RetrievalData) -> dict[str, Any]:
    return {
        "corpus": Dataset.from_list(data.corpus),
        "queries": Dataset.from_list(data.queries),
        "relevant_docs": data.relevant,
        "top_ranked": data.candidates,
    }


def sample_task(task: AbsTask, limit: int, seed: int) -> str:
    """Keep a sample of a loaded task's data, the same for the same seed; returns what was kept, in words.

    Retrieval keeps `limit` queries, the documents judged for them and five random others a query (where candidates are
    given: the candidates). Classification keeps `limit` test texts, and 2 × mteb's samples a label to learn from;
    regression keeps all texts to learn from.
    """
    kept: list[str] = []
    for subset, splits in cast("dict[str, Any]", task.dataset).items():
        generator = random.Random(f"{seed} {task.metadata.name.removesuffix(OTHER_INSTRUCTION)}")
        for split in task.eval_splits:
            if isinstance(task, AbsTaskRetrieval):
                splits[split], what = _sample_retrieval(splits[split], limit, generator)
            else:
                before = len(splits[split])
                splits[split] = _sample_rows(splits[split], limit, generator)
                what = f"{len(splits[split])} of {before} rows"
            kept.append(what if subset == _DEFAULT else f"{subset}: {what}")
        if _learns_labels(task):
            splits[task.train_split] = _sample_labels(splits[task.train_split], task, generator)
    if _learns_labels(task):
        kept.append(f"learning from {task.samples_per_label} a label, drawn from {2 * task.samples_per_label}")
    if isinstance(task, AbsTaskClustering):
        task.max_fraction_of_documents_to_embed = task.max_document_to_embed = None
        task.max_documents_per_cluster = min(limit, task.max_documents_per_cluster)
    return f"{'; '.join(kept)}; seed {seed}"


def _sample_rows(rows: Dataset, limit: int, generator: random.Random) -> Dataset:
    return rows if len(rows) <= limit else rows.select(sorted(generator.sample(range(len(rows)), limit)))


def _learns_labels(task: AbsTask) -> TypeGuard[AbsTaskClassification]:
    """Regression is classification to mteb, but draws its examples without regard to labels."""
    return isinstance(task, AbsTaskClassification) and not isinstance(task, AbsTaskRegression)


def _sample_labels(rows: Dataset, task: AbsTaskClassification, generator: random.Random) -> Dataset:
    by_label: dict[Any, list[int]] = {}
    for index, given in enumerate(rows[task.label_column_name]):
        for label in given if isinstance(given, list) else [given]:  # a text may have several labels
            by_label.setdefault(label, []).append(index)
    most = 2 * task.samples_per_label
    return rows.select(sorted({i for at in by_label.values() for i in generator.sample(at, min(most, len(at)))}))


def _sample_retrieval(data: Any, limit: int, generator: random.Random) -> tuple[dict[str, Any], str]:
    judged = [i for i, query in enumerate(data["queries"]["id"]) if data["relevant_docs"].get(query)]
    chosen = sorted(generator.sample(judged, min(limit, len(judged))))
    queries = data["queries"].select(chosen)
    relevant = {query: data["relevant_docs"][query] for query in queries["id"]}
    keep = {document for grades in relevant.values() for document in grades}
    ids = list(data["corpus"]["id"])
    candidates = data["top_ranked"]
    if candidates is not None:
        candidates = {query: candidates[query] for query in queries["id"] if query in candidates}
        keep |= {document for documents in candidates.values() for document in documents}
    else:
        others = [document for document in ids if document not in keep]
        keep |= set(generator.sample(others, min(len(others), DISTRACTORS_PER_QUERY * limit)))
    corpus = data["corpus"].select([index for index, document in enumerate(ids) if document in keep])
    kept = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": candidates}
    return kept, f"{len(queries)} of {len(data['queries'])} queries over {len(corpus)} of {len(ids)} documents"


def _compared_with_mteb(task: AbsTask) -> str:
    """Says so where a folder of a task that mteb publishes statistics of has another number of rows."""
    published = task.metadata.n_samples
    data, split = cast("dict[str, Any]", task.dataset), task.eval_splits[0]
    if not published or split not in published or task.metadata.is_multilingual:
        return "all"
    rows = data[_DEFAULT][split]
    count = len(rows["corpus"]) + len(rows["queries"]) if isinstance(task, AbsTaskRetrieval) else len(rows)
    if count == published[split]:
        return "all"
    return f"all; {count} rows where MTEB has {published[split]}: not comparable with published scores"
