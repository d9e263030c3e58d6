"""The data section of a recipe: which rows a run learns from, and how they are laid out.

Knows which keys exist and what they may hold; knows nothing of the rows themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from gircse.errors import MissingExtraError

try:
    from pydantic import BaseModel, ConfigDict, Field, model_validator
except ImportError as error:
    raise MissingExtraError("training", "train") from error


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Instruction = Annotated[str, Field(min_length=1)]


class Source(Section):
    """Rows of one task in one file.

    Attributes:
        file: Below the data folder, without ``.jsonl``, ``.jsonl.zst`` or ``.parquet``.
        hub: Instead of a file, a data set on the hub (or a folder that `datasets` loads): its split ``train``, or, for
            want of one, all splits, each a task. Rows may name their instruction ``prompt`` and their task ``type``, as
            FlagEmbedding's do.
        task: The ``task`` of the rows, or a pattern of several, e.g. ``bitext/tldr-en-*``, which then share their
            batches; left out for all rows.
        by_task: Each of the tasks is a data set of its own, so that a batch holds one. They share the source's examples
            in proportion to their sizes, in whole batches; what makes no batch is left out.
        examples: How many, drawn without replacement with the recipe's seed. Where not given, the source's share of
            ``data.examples``, or all.
        repeats: How many times each row may be drawn, for small sources that should count more. Its positive, its
            negatives and its instruction are drawn anew every time.
        licence: Of the text; it goes into the model card.
        symmetric: Passages carry the instruction too.
        in_batch_negatives: False where rows of a batch share labels: only a row's own negatives count.
        negatives: Hard negatives a row; rows with fewer are left out.
        teacher: Whether the recipe's teacher has a say. False where the instruction asks for another likeness than
            the teacher's, which reads no instructions. ``anchor`` where the positive is a translation into a language
            that the teacher does not know: it then reads the anchor in its place (arXiv 2004.09813).
        temperature: Instead of the loss's. A higher one where a likeness is to be learned that the vectors hardly have
            yet, as under ``facet: form``: at a low one, what they do have decides, and all vectors becoming the same
            is the fastest way down (docs/experiments.md).
        instruction: Instead of the rows' own. Of a list, every row draws one: what is asked for should not hang on a
            wording.
        answer: What the anchor's soft tokens shall spell, under the loss's `answer_weight`. For rows whose positive is
            the name of a class a pattern of positives, e.g. ``intent: *``: what the star stands for is the answer. With
            ``facet: form`` a mapping, the name of each form: of the queries' form by ``queries``, of a task's
            positives by the task or a pattern of it, e.g. ``{queries: English, "*-en-fr": French}``. With ``facet:
            content`` the word ``keyword``: a word of the row's query, drawn by its rarity, whichever side asks.
        class_field: A field of the rows, e.g. ``label``, that holds a class (a text or a whole number): the positives
            of rows of the same class are then no negatives of each other.
        facet: Trains what an instruction steers, on pairs that say the same in two forms (languages, tones, code and
            prose), all rows' queries being in one form and all positives of a task in another. ``content``: a text's
            counterpart is its positive, texts of other rows in its own form are its negatives. ``form``: the other
            way round, and of the batch's other texts those in another form are negatives too, unless
            `in_batch_negatives` is false; with `negatives` 0 they alone. The rows' own negatives are not used.
    """

    file: str | None = None
    hub: str | None = None
    task: str | None = None
    by_task: bool = False
    examples: int | None = Field(default=None, ge=1)
    repeats: int = Field(default=1, ge=1)
    licence: str
    symmetric: bool = False
    in_batch_negatives: bool = True
    negatives: int = Field(default=0, ge=0)
    teacher: bool | Literal["anchor"] = True
    temperature: float | None = Field(default=None, gt=0)
    instruction: Instruction | list[Instruction] | None = Field(default=None, min_length=1)
    answer: str | dict[str, Instruction] | None = None
    class_field: str | None = Field(default=None, min_length=1)
    facet: Literal["content", "form"] | None = None

    @property
    def name(self) -> str:
        """Of the data set that the rows become: file or hub id, task, facet."""
        return "/".join(part for part in (self.file or self.hub, self.task, self.facet) if part)

    def of_task(self, task: str) -> Source:
        """With `by_task`, the source of the rows of one task; its name is this one's and the task's."""
        return self.model_copy(update={"task": task if self.task in (None, task) else f"{self.task}/{task}"})

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.file is None) == (self.hub is None):
            raise ValueError("give either file or hub")
        if self.hub is not None and self.examples is None:
            raise ValueError("a source on the hub may be of any size: give its number of examples")
        return self

    @model_validator(mode="after")
    def _a_translation_for_the_teacher(self) -> Source:
        if self.teacher == "anchor" and (self.negatives or self.facet):
            raise ValueError("teacher: anchor is for pairs of translations, without negatives or facet")
        return self

    @model_validator(mode="after")
    def _a_facet_is_named(self) -> Source:
        if self.facet is not None and (self.instruction is None or not self.symmetric):
            raise ValueError("a facet is asked for by an instruction of its own, on both sides: add symmetric: true")
        if self.facet is not None and self.by_task:
            raise ValueError("a facet compares the rows of all its tasks, and by_task takes them apart")
        if self.facet == "form" and self.negatives > 1:
            raise ValueError("a text has one counterpart in the other form: negatives: 1 or 0")
        if self.facet == "form" and self.class_field is not None:
            raise ValueError("class_field is not for facet: form, where a text's class is its form")
        return self

    @model_validator(mode="after")
    def _an_answer_is_known(self) -> Source:
        if isinstance(self.answer, dict) and (self.facet != "form" or "queries" not in self.answer):
            raise ValueError("names to answer with belong to facet: form, and that of the queries' form among them")
        if isinstance(self.answer, str):
            if self.facet == "form":
                raise ValueError("with facet: form, answer is a mapping: the names of the forms")
            if self.facet == "content" and self.answer != "keyword":
                raise ValueError("with facet: content, the answer is a keyword: answer: keyword")
            if self.facet is None and self.answer.count("*") != 1:
                raise ValueError("answer is a pattern of the positives with one * in it, e.g. 'intent: *'")
        return self

    @model_validator(mode="after")
    def _something_to_contrast(self) -> Source:
        if not self.in_batch_negatives and self.negatives == 0:
            raise ValueError("without in-batch negatives, negatives must be 1 or more")
        if self.class_field is not None and not self.in_batch_negatives:
            raise ValueError("class_field is about other rows' positives, and in_batch_negatives: false leaves none")
        return self


class DataSection(Section):
    """Which rows, and how much of each text is read in training.

    Attributes:
        examples: Rows in all of the sources that name no number of their own; all that they have where not given.
        mixture_temperature: Those are shared out in proportion to size^(1/T): 1 is proportional, large values uniform.
    """

    folder: Path = Path("data/train")
    examples: int | None = Field(default=None, ge=1)
    mixture_temperature: float = Field(default=1.0, gt=0)
    max_seq_length: int = Field(
        default=128, ge=8, description="tokens read of a text in training, instruction included"
    )
    sources: list[Source] = Field(min_length=1)

    @model_validator(mode="after")
    def _numbers_of_examples(self) -> DataSection:
        open_sources = [source.name for source in self.sources if source.examples is None]
        if self.examples is not None and not open_sources:
            raise ValueError("data.examples is shared out among sources without examples, and there is none")
        usual = type(self).model_fields["mixture_temperature"].default
        if self.examples is None and self.mixture_temperature != usual:
            raise ValueError("mixture_temperature shares out data.examples; give that number, or leave it out")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> DataSection:
        names = [source.name for source in self.sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"sources: {twice[0]} is there twice; a task's rows, or one of its facets, are one source")
        return self

    def source_of(self, data_set: str) -> Source:
        """The source that a data set, by its name, is of."""
        named = [source for source in self.sources if source.name == data_set]
        apart = [source for source in self.sources if source.by_task and data_set.startswith(f"{source.name}/")]
        return max(named or apart, key=lambda source: len(source.name))
