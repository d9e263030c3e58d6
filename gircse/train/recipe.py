"""The recipe: everything a training run depends on, in one validated YAML file.

Knows which keys exist and what they may hold; knows nothing of tensors or trainers.
"""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from gircse.checkpoint import RefinementConfig
from gircse.errors import GircseError, MissingExtraError, UsageError
from gircse.gradient_chain import SoftTokenGradients
from gircse.losses.icr import StepWeights, TeacherPairs
from gircse.pooling import Pooling
from gircse.refiner import Attention
from gircse.train.recipe_data import DataSection, Section, Source

try:
    import yaml
    from pydantic import Field, ValidationError, model_validator
except ImportError as error:
    raise MissingExtraError("training", "train") from error


class ModelSection(Section):
    """What the vectors depend on; stored in the checkpoint."""

    num_steps: int = Field(default=5, ge=0, description="K; 0 trains the encoder-only baseline")
    pooling: Pooling = "mean"
    temperature: float = Field(default=1.0, gt=0, description="soft-token temperature")
    max_seq_length: int = Field(default=512, ge=1, description="longest prompt in tokens at inference")
    attention: Attention = Field(default="causal", description="what a prompt token sees")

    @model_validator(mode="after")
    def _fits_together(self) -> ModelSection:
        RefinementConfig(**self.model_dump())  # says what does not
        return self


class LoraSection(Section):
    """Low-rank layers on every linear layer but the head (the paper: r=16, alpha=64)."""

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=64, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class LossSection(Section):
    """Iterative Contrastive Refinement."""

    temperature: float = Field(default=0.02, gt=0)
    refinement_weight: float = Field(default=1.0, ge=0, description="λ")
    stepwise: bool = Field(default=True, description="a loss at every step; False: after the last one only")
    step_weights: StepWeights = Field(default="uniform", description="linear: the loss of step k counts k times")
    prompt_step: bool = Field(default=False, description="L_0, of the prompt's own state, is one of the steps")
    detach_reference: bool = Field(default=False, description="the penalty leaves the earlier step alone")
    soft_token_gradients: SoftTokenGradients = Field(
        default="full", description="back to the state that wrote the token: full (the paper), bounded, or none"
    )
    false_negative_margin: float | None = Field(
        default=None, description="leave out negatives closer to the anchor than the positive by more than this"
    )
    matryoshka_dims: list[int] | None = Field(
        default=None, min_length=1, description="widths that must work alone, besides the whole one"
    )
    teacher: str | None = Field(
        default=None,
        description="a SentenceTransformer whose similarities are taught too: folder, hub id, known name",
    )
    teacher_weight: float = Field(default=0.5, gt=0, le=1, description="the teacher's share of the loss")
    teacher_temperature: float = Field(default=0.05, gt=0)
    teacher_pairs: TeacherPairs = Field(
        default="anchors",
        description="all: the teacher also ranks all other rows' texts for every text",
    )
    answer_weight: float = Field(
        default=0.5, gt=0, description="of the loss of spelling the answer, in sources that have one"
    )

    @model_validator(mode="after")
    def _someone_to_weigh(self) -> LossSection:
        names = ("teacher_weight", "teacher_temperature", "teacher_pairs")
        settings = {name: type(self).model_fields[name].default for name in names}
        if self.teacher is None and any(getattr(self, name) != default for name, default in settings.items()):
            raise ValueError("teacher_weight, teacher_temperature and teacher_pairs need a teacher")
        return self

    @model_validator(mode="after")
    def _something_to_switch(self) -> LossSection:
        if not self.stepwise and self.refinement_weight and "refinement_weight" in self.model_fields_set:
            raise ValueError(
                "refinement_weight compares the losses of two steps, and stepwise: false leaves one of them; "
                "leave it out or set it to 0"
            )
        if self.step_weights != "uniform" and not self.stepwise:
            raise ValueError("step_weights weighs the losses of all steps, and stepwise: false leaves one of them")
        if self.prompt_step and (not self.stepwise or self.step_weights != "uniform"):
            raise ValueError(
                "prompt_step is one of the steps, and stepwise: false or step_weights: linear leave it out"
            )
        if self.detach_reference and (not self.stepwise or not self.refinement_weight):
            raise ValueError("detach_reference is about the penalty, which needs stepwise and a refinement_weight")
        return self


StepsDistribution = Literal["uniform", "log_uniform"]
"""How often each K of ``training.random_steps`` is drawn: all alike, or in proportion to 1/K, so that a range up to the
largest K that will be served costs little more than its small ones."""


class TrainingSection(Section):
    """The optimiser's settings."""

    batch_size: int = Field(default=32, ge=2)
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="texts embedded at a time; cached gradients make up the batch"
    )
    epochs: float = Field(default=1.0, gt=0)
    max_minutes: float | None = Field(default=None, gt=0, description="end after so long, the schedule at its end")
    learning_rate: float = Field(default=1e-4, gt=0)
    warmup_steps: int = Field(default=20, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    max_grad_norm: float = Field(default=1.0, gt=0)
    save_every: int = Field(default=50, ge=1, description="steps between checkpoints")
    log_every: int = Field(default=5, ge=1)
    random_steps: tuple[int, int] | None = Field(
        default=None, description="draw the K of every batch from this range; the model's own K stays what it is"
    )
    steps_distribution: StepsDistribution = Field(
        default="uniform", description="of the K drawn; log_uniform: in proportion to 1/K"
    )
    gather_across_devices: bool = Field(default=False, description="negatives of all processes")
    dtype: Literal["float32", "bfloat16"] = "float32"
    trackers: list[Literal["tensorboard", "wandb"]] | None = Field(
        default=None, description="where the logs go besides; null: to TensorBoard where it is installed"
    )


class EvaluationSection(Section):
    """A small suite that is scored during training, at the model's own K; the checkpoint with the best mean is kept.

    Attributes:
        folder: Of task folders, as for `gircse evaluate`.
        tasks: Their names; ``TASK/SUBSET`` for one subset.
        split: ``dev`` takes dev.jsonl or validation.jsonl where a task has one, and test.jsonl where not; ``test``
            always the latter.
        limit: Items to keep of every task, the same ones every time; null keeps all.
        every: Steps between evaluations; there is one at the end as well.
    """

    folder: Path = Path("data/eval")
    tasks: list[str] = Field(min_length=1)
    split: Literal["dev", "test"] = "dev"
    limit: int | None = Field(default=200, ge=10)
    every: int = Field(default=100, ge=1)


class Recipe(Section):
    """A whole training run."""

    backbone: str
    start_from: str | None = Field(
        default=None,
        description="a saved model of the same backbone whose adapter or weights are trained further; shipped: ours",
    )
    seed: int = 0
    query_instruction: str | None = Field(default=None, description="stored as the default instruction of queries")
    model: ModelSection = ModelSection()
    lora: LoraSection | None = Field(default=LoraSection(), description="null trains all weights")
    loss: LossSection = LossSection()
    data: DataSection
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection | None = Field(default=None, description="null: none")

    @model_validator(mode="after")
    def _whole_batches(self) -> Recipe:
        batch = self.training.batch_size
        for source in self.data.sources:
            if source.examples is not None and source.examples < batch:
                raise ValueError(
                    f"{source.name}: a batch holds one source, and {source.examples} examples make none of {batch}; "
                    "raise examples or lower training.batch_size"
                )
        if self.data.examples is not None and self.data.examples < batch:
            raise ValueError(f"data.examples: {self.data.examples} make no batch of {batch}")
        return self

    @model_validator(mode="after")
    def _something_to_draw(self) -> Recipe:
        least, most = self.training.random_steps or (1, 2)
        if not 1 <= least < most:
            raise ValueError("training.random_steps is the least and the largest K to draw, e.g. [1, 10]")
        if self.training.steps_distribution != "uniform" and not self.training.random_steps:
            raise ValueError("training.steps_distribution is that of training.random_steps, which is not there")
        if self.training.random_steps and self.model.num_steps == 0:
            raise ValueError("training.random_steps draws how many soft tokens; num_steps: 0 writes none: leave it out")
        if self.loss.soft_token_gradients != "full" and self.model.num_steps == 0:
            raise ValueError("loss.soft_token_gradients are of soft tokens, and num_steps: 0 writes none; leave it out")
        if self.loss.prompt_step and self.model.num_steps == 0:
            raise ValueError("loss.prompt_step makes the prompt's state a step too; num_steps: 0 has no other")
        return self

    @model_validator(mode="after")
    def _something_to_spell(self) -> Recipe:
        answered = [source.name for source in self.data.sources if source.answer is not None]
        if not answered and self.loss.answer_weight != LossSection.model_fields["answer_weight"].default:
            raise ValueError("loss.answer_weight weighs spelled answers, and no source has an answer; leave it out")
        return self

    @model_validator(mode="after")
    def _lengths_agree(self) -> Recipe:
        trained, read = self.data.max_seq_length, self.model.max_seq_length
        if trained > read:
            raise ValueError(
                f"data.max_seq_length: {trained} tokens are read in training, and {read} (model.max_seq_length) of the "
                "finished model; lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _a_say_for_the_teacher(self) -> Recipe:
        for source in self.data.sources:
            if source.teacher == "anchor" and self.loss.teacher is None:
                raise ValueError(f"{source.name}: teacher: anchor needs a loss.teacher; name one, or leave it out")
            classes = (
                "class_field" if source.class_field is not None else "facet: form" if source.facet == "form" else None
            )
            if classes is not None and source.teacher and self.loss.teacher is not None:
                raise ValueError(f"{source.name}: {classes} is for sources without a teacher; add teacher: false")
        return self

    def refinement(self) -> RefinementConfig:
        """The checkpoint's configuration."""
        return RefinementConfig(**self.model.model_dump())


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file.
        overrides: Values by dotted key, e.g. ``{"model.num_steps": 0}``, which replace the file's; texts are read as
            YAML.

    Raises:
        GircseError: The file is not there, is no YAML, or a key is unknown (the nearest valid name is given) or holds
            a wrong value.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GircseError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GircseError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise GircseError(f"{path}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    for key, value in (overrides or {}).items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise GircseError(f"{path}: {parent} in {key} is a value, not a section")
        section[last] = _value(key, value)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise GircseError(f"{path}: {_first_problem(error)}") from error


def _value(key: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"{key}={value} is no YAML value; put quotes around a text with a colon") from error


def warm_up_advice(recipe: Recipe, steps: int) -> str | None:
    """What to do about a run of so many steps that ends before its learning rate is reached; None where it does not."""
    warm_up = recipe.training.warmup_steps
    if warm_up < steps:
        return None
    return (
        f"{steps} steps are no more than the {warm_up} of warm-up: raise training.epochs or lower training.warmup_steps"
    )


def chosen_trackers(recipe: Recipe) -> list[str]:
    """Where the logs go besides the run's folder: as the recipe says, else to TensorBoard where it is installed."""
    if recipe.training.trackers is not None:
        return list(recipe.training.trackers)
    return ["tensorboard"] if find_spec("tensorboard") is not None else []


def check_trackers(recipe: Recipe) -> None:
    """See whether what a recipe logs to is installed; the trainer would find out when everything is loaded.

    Raises:
        GircseError: It is not.
    """
    for name in recipe.training.trackers or ():
        if find_spec(name) is None:
            raise GircseError(f"training.trackers: {name} is not installed; pip install {name}, or leave it out")


def check_widths(recipe: Recipe, dimensions: int) -> None:
    """See whether vectors can be cut to the widths of the recipe.

    Args:
        recipe: The recipe.
        dimensions: Of the backbone's vectors.

    Raises:
        GircseError: A width is larger; cutting to it would do nothing.
    """
    widest = max(recipe.loss.matryoshka_dims or [0])
    if widest > dimensions:
        raise GircseError(
            f"loss.matryoshka_dims: vectors of {recipe.backbone} have {dimensions} dimensions and cannot be cut to "
            f"{widest}; name widths up to {dimensions}"
        )


def largest_num_steps(recipe: Recipe) -> int:
    """The largest K of a step."""
    return max(recipe.training.random_steps or (recipe.model.num_steps,))


def check_positions(recipe: Recipe, positions: int) -> None:
    """See whether the longest text and its soft tokens have room; a step that lacks it would end the run.

    Args:
        recipe: The recipe.
        positions: Of the backbone.

    Raises:
        GircseError: They have none.
    """
    longest, most = recipe.data.max_seq_length, largest_num_steps(recipe)
    if longest + most > positions:
        raise GircseError(
            f"data.max_seq_length ({longest}) and the largest K ({most}) exceed the {positions} positions of "
            f"{recipe.backbone}; lower one of them"
        )


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{place}: {message}" if place else message
    near = difflib.get_close_matches(str(problem["loc"][-1]), _fields_at(problem["loc"][:-1]), n=1)
    return f"unknown key {place}" + (f"; did you mean {near[0]}?" if near else "")


def _fields_at(place: tuple[int | str, ...]) -> list[str]:
    """The valid keys of the section at a place in the recipe."""
    section: Any = Recipe
    for part in place:
        if isinstance(part, int):
            section = Source
        elif part != "sources":
            section = section.model_fields[part].annotation
            section = next((kind for kind in get_args(section) if hasattr(kind, "model_fields")), section)
    return list(section.model_fields)
