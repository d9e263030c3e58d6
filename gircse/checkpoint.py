"""What a checkpoint says besides its weights: gircse_config.json. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gircse.errors import GircseError, UsageError
from gircse.pooling import POOLINGS
from gircse.refiner import ATTENTIONS, PromptReading

INSTRUCTION_TEMPLATE = "Instruct: {instruction}\nQuery:"
"""The paper's query format (appendix A): the text follows immediately."""


@dataclass(frozen=True)
class BackboneReference:
    """Where the frozen weights under an adapter come from, so that loading never guesses.

    Attributes:
        name: Known name, hub id or folder, as `resolve_backbone` takes it.
        sha256: Checksum of the weights.
        licence: Licence of the weights as far as it is known.
    """

    name: str
    sha256: str
    licence: str | None = None


@dataclass(frozen=True)
class RefinementConfig:
    """What the vectors depend on besides the weights. Stored in the checkpoint, each value.

    Attributes:
        num_steps: K, refinement steps where a call names none.
        pooling: One of `gircse.pooling.POOLINGS`.
        temperature: Soft-token temperature.
        max_seq_length: Longest prompt in tokens; only the text is cut, never the instruction.
        instruction_template: How an instruction becomes the prompt before a text.
        attention: One of `gircse.refiner.ATTENTIONS`, over the prompt.
    """

    num_steps: int = 5
    pooling: str = "mean"
    temperature: float = 1.0
    max_seq_length: int = 512
    instruction_template: str = INSTRUCTION_TEMPLATE
    attention: str = "causal"

    def __post_init__(self) -> None:
        if self.num_steps < 0:
            raise UsageError(f"num_steps must be 0 or more, not {self.num_steps}")
        if self.pooling not in POOLINGS:
            raise UsageError(f"pooling must be one of {', '.join(POOLINGS)}, not {self.pooling!r}")
        if self.temperature <= 0:
            raise UsageError(f"temperature must be above 0, not {self.temperature}")
        if self.max_seq_length < 1:
            raise UsageError(f"max_seq_length must be 1 or more, not {self.max_seq_length}")
        if "{instruction}" not in self.instruction_template:
            raise UsageError("instruction_template must contain {instruction}")
        if self.attention not in ATTENTIONS:
            raise UsageError(f"attention must be one of {', '.join(ATTENTIONS)}, not {self.attention!r}")

    @property
    def reading(self) -> PromptReading:
        """How prompts are read."""
        return PromptReading(self.attention, self.pooling == "prompt_mean")


ADDED_LATER: dict[str, Any] = {"attention": "causal"}
"""Keys that came after the first checkpoints, and what every checkpoint without them means. Not the defaults of the
day: an entry never changes."""


@dataclass
class Checkpoint:
    """gircse_config.json. A missing or unknown key is an error: defaults may change, saved vectors may not.

    The exception are the keys of `ADDED_LATER`.
    """

    backbone: BackboneReference
    refinement: RefinementConfig
    weights: str  # "adapter" (LoRA over the backbone), "full" (in this folder) or "backbone" (nothing trained)
    training: dict[str, Any] = field(default_factory=dict)  # recipe, data and seed of the run that made it

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> Checkpoint:
        try:
            if values["weights"] not in ("adapter", "full", "backbone"):
                raise ValueError(f"weights is {values['weights']!r}")
            refinement = {**ADDED_LATER, **values["refinement"]}
            if missing := set(RefinementConfig.__dataclass_fields__) - set(refinement):
                raise KeyError(", ".join(sorted(missing)))
            return cls(
                BackboneReference(**values["backbone"]),
                RefinementConfig(**refinement),
                values["weights"],
                dict(values["training"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise GircseError(
                f"{source}: gircse_config.json is incomplete or from another version ({error})"
            ) from error


def check_no_backbone(name: str) -> None:
    """Raise where the name is known to be a backbone's, rather than ask the hub for a model of that name."""
    from gircse.backbones import known_backbones

    if name in known_backbones() and not Path(name).exists():
        raise GircseError(
            f"{name} is a backbone, no saved GIRCSE model; leave the name out for the model that ships, or make an "
            f"untrained one with GIRCSE.from_backbone({name!r})"
        )


def no_saved_model(name: str) -> GircseError:
    """What to say where a folder or the hub holds no GIRCSE model of that name."""
    path = Path(name)
    if path.exists():
        return GircseError(
            f"{name} is no saved GIRCSE model; if it is a decoder, an untrained one is made of it by --backbone or "
            f"GIRCSE.from_backbone({name!r})"
        )
    hub = "" if path.is_absolute() else ", nor to be had from the hub"
    return GircseError(f"{name} is no saved GIRCSE model: no such folder{hub}")


def not_loaded(name: str, error: Exception) -> GircseError:
    """What to say where a saved model is not to be had, or a file of it cannot be read."""
    reason = " ".join(str(error).split())[:200]
    missing = "is no saved GIRCSE model: no such folder, nor to be had from the hub"
    return GircseError(f"{name} {'cannot be loaded' if Path(name).is_dir() else missing} ({reason})")
