"""Puts a trained adapter where models that ship lie: weights in float16, half the size, and no backbone.

    python recipes/ship_model.py runs/smollm2-135m gircse/pretrained/smollm2-135m

The card (README.md) of the target stays: it says what was measured, which no script knows.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
FILES = (
    "adapter_config.json",
    "chat_template.jinja",
    "config_sentence_transformers.json",
    "gircse_config.json",
    "modules.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def ship(source: Path, target: Path) -> None:
    """Copy a trained adapter, its weights rounded to float16.

    Args:
        source: Folder of `gircse train`.
        target: Made if need be.

    Raises:
        ValueError: A weight does not fit into float16.
    """
    weights = {name: tensor.to(torch.float16) for name, tensor in load_file(source / WEIGHTS).items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise ValueError(f"{source / WEIGHTS}: a weight is not finite in float16")
    target.mkdir(parents=True, exist_ok=True)
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})
    (target / WEIGHTS).chmod(0o644)
    for name in FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    ship(arguments.source, arguments.target)
