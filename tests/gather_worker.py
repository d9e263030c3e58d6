"""One of two processes that share a batch; run by tests/test_losses.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gircse.losses import CachedICRLoss, ICRLoss
from gircse.model import GIRCSE

TEXTS = [
    ["who wrote it", "what is a cat", "where is rome", "how far"],
    ["an author did", "an animal", "in italy", "an author did"],  # rows 0 and 3 sit in different processes
    ["nobody did", "a machine", "on the moon", "a stone"],
]


def main(backbone: str, folder: Path, rank: int) -> None:
    """Write the averaged gradients of both halves, and from process 0 those of the whole batch."""
    model = GIRCSE.from_backbone(backbone, num_steps=3, full_finetune=True, device="cpu").train()

    def gradients(texts: list[list[str]], kind: str, gather: bool) -> dict[str, torch.Tensor]:
        options: dict[str, Any] = {"temperature": 0.5, "gather_across_devices": gather, "false_negative_margin": 0.3}
        cached = kind == "cached"
        loss = CachedICRLoss(model, mini_batch_size=3, **options) if cached else ICRLoss(model, **options)
        model.zero_grad()
        loss([model.preprocess(column) for column in texts]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    if rank == 0:
        torch.save(gradients(TEXTS, "plain", gather=False), folder / "alone.pt")
    dist.init_process_group("gloo")
    for kind in ("plain", "cached"):
        shared = gradients([column[2 * rank : 2 * rank + 2] for column in TEXTS], kind, gather=True)
        for gradient in shared.values():
            dist.all_reduce(gradient)
            gradient /= 2
        if rank == 0:
            torch.save(shared, folder / f"{kind}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
