"""The card (README.md) of a saved model: what it is, how it was trained, and on whose data.

Knows a model's configuration and what sentence-transformers' trainer notes down; knows nothing of how they came about.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sentence_transformers.sentence_transformer import SentenceTransformerModelCardData

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset
    from torch import nn

    from gircse.model import GIRCSE

_POOLED = {
    "mean": "the mean of their hidden states",
    "last": "the hidden state of the last",
    "mean_with_prompt": "the mean of their hidden states and the prompt's own",
    "prompt_mean": "the mean of their hidden states and the mean of the prompt's",
}


@dataclass
class GIRCSEModelCardData(SentenceTransformerModelCardData):
    """sentence-transformers' card data with a template of our own.

    Its template shows rows of every training set and statistics of their columns, and embeds examples at every save: a
    model that learned from thirty sources had a card of two megabytes, with texts that are not ours to hand on. Ours
    has every source with its share and its licence, and no row.
    """

    tags: list[str] = field(
        default_factory=lambda: [
            "gircse",
            "generative-embeddings",
            "sentence-transformers",
            "sentence-similarity",
            "feature-extraction",
        ]
    )
    generate_widget_examples: bool = False
    template_path: Path = field(default=Path(__file__).parent / "model_card_template.md", init=False, repr=False)

    def set_widget_examples(self, dataset: Dataset | DatasetDict) -> None:
        """None: they would be training rows."""

    def compute_dataset_metrics(
        self,
        dataset: Dataset | IterableDataset | None,
        dataset_info: dict[str, Any],
        loss: dict[str, nn.Module] | nn.Module | None,
        router_mapping: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """A data set's name and size, as far as it has one."""
        size = {"size": len(cast("Dataset", dataset))} if hasattr(dataset, "__len__") else {}
        return {**dataset_info, **size}

    def try_to_set_base_model(self) -> None:
        """A backbone's hub id, where its name can be one; the hub is not asked."""
        name = cast("GIRCSE", self.model).encoder.reference.name
        if name.count("/") == 1 and not name.startswith((".", "/", "~")):
            self.base_model = name

    def get_default_model_name(self) -> str:
        """What the card is headed with."""
        return f"GIRCSE over {Path(cast('GIRCSE', self.model).encoder.reference.name).name}"

    def get_model_specific_metadata(self) -> dict[str, Any]:
        """What the template tells of the model and its training."""
        model = cast("GIRCSE", self.model)
        encoder, facts = model.encoder, model.encoder.training_facts
        recipe = facts.get("recipe")
        return {
            **super().get_model_specific_metadata(),
            "reference": encoder.reference,
            "refinement": encoder.refinement,
            "vector": _POOLED[encoder.refinement.pooling],
            "adapter": next(iter(encoder.backbone.peft_config.values())) if encoder.has_adapter else None,
            "weights": encoder.weights,
            "prompts": model.prompts,
            "facts": facts,
            "recipe": recipe,
            "starts": _starts(facts),
            "loss": {key: value for key, value in (recipe or {}).get("loss", {}).items() if value is not None},
        }


def _starts(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts of the model that a run began with, of the one which that had begun with, and so on."""
    start = facts.get("start")
    return [] if start is None else [start, *_starts(start["training"])]
