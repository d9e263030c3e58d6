"""Texts that are the same under another wording of the instruction: told apart by tokens, they would be negatives.

Knows how the keys of texts travel from the data to the loss; what is done with them is the loss's.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from gircse.losses.candidates import TEXT_KEY

TEXT_KEYS = "text_keys"
"""Of training data: a key for each text of a row, where the rows of a source have several wordings of one instruction.
"""


def key_of_text(text: str) -> int:
    """A number, the same in every process, that only this text has."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


class KeysBesideTexts(SentenceTransformerDataCollator):
    """sentence-transformers' collator, which puts a row's `TEXT_KEYS` beside the tokens of its texts."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch, in which the features of a column have a `TEXT_KEY`, (B,) int64, where the rows have keys."""
        if not features or TEXT_KEYS not in features[0]:
            return super().__call__(features)
        batch = super().__call__([{key: row[key] for key in row if key != TEXT_KEYS} for row in features])
        keys = torch.tensor([row[TEXT_KEYS] for row in features])  # (B, columns)
        names = [name for name in features[0] if f"{name}_input_ids" in batch]
        for name, column in zip(names, keys.unbind(dim=1), strict=False):  # answers, which come last, have no keys
            batch[f"{name}_{TEXT_KEY}"] = column
        return batch
