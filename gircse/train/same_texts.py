"""Texts that are no negatives though their tokens differ: how the loss is told of them.

Under another wording of the instruction, or under one where a passage has none, the same text has other tokens; and of
the answers that a row knows only one is drawn. Knows how the keys of texts travel from the data to the loss, which
decides what they mean.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from gircse.losses.candidates import KNOWN_KEYS, PLAIN_KEY, TEXT_KEY

TEXT_KEYS = "text_keys"
"""Of training data: a key for each text of a row, where the rows of a source have several wordings of one instruction.
"""
PLAIN_KEYS = "plain_keys"
"""Of training data: a key for each text of a row, whatever the instruction."""
KEY_COLUMNS = (TEXT_KEYS, PLAIN_KEYS, KNOWN_KEYS)
"""Columns of training data that are no texts. `KNOWN_KEYS` are those of the texts that are no negatives of the row."""


def key_of_text(text: str) -> int:
    """A number, the same in every process, that only this text has."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


class KeysBesideTexts(SentenceTransformerDataCollator):
    """sentence-transformers' collator, which puts a row's keys beside the tokens of its texts."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch, in which the features of columns have a `TEXT_KEY` and a `PLAIN_KEY`, (B,) int64, and those of the
        anchors `KNOWN_KEYS`, (B, n) int64, where the rows have such keys.
        """
        if not features:
            return super().__call__(features)
        batch = super().__call__([{key: row[key] for key in row if key not in KEY_COLUMNS} for row in features])
        names = [name for name in features[0] if f"{name}_input_ids" in batch]
        for column, key in ((TEXT_KEYS, TEXT_KEY), (PLAIN_KEYS, PLAIN_KEY)):
            if column in features[0]:
                keys = torch.tensor([row[column] for row in features])  # (B, columns)
                for name, own in zip(names, keys.unbind(dim=1), strict=False):  # answers, which come last, have none
                    batch[f"{name}_{key}"] = own
        if KNOWN_KEYS in features[0]:
            known = [row[KNOWN_KEYS] for row in features]
            longest = max(map(len, known))
            padded = [own + own[:1] * (longest - len(own)) for own in known]
            batch[f"{names[0]}_{KNOWN_KEYS}"] = torch.tensor(padded)  # (B, n)
        return batch
