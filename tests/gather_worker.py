"""One of two processes that share a batch; run by tests/test_losses.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from gircse.losses import CachedICRLoss, ICRLoss
from gircse.losses.candidates import TEXT_KEY
from gircse.losses.icr import TeacherPairs
from gircse.model import GIRCSE

TEXTS = [
    ["who wrote it", "what is a cat", "where is rome", "how far"],
    ["an author did", "an animal", "in italy", "an author did"],  # rows 0 and 3 sit in different processes
    ["nobody did", "a machine", "on the moon", "a stone"],
]
KEYS = torch.tensor([[0, 1, 1, 2], [3, 4, 5, 3], [6, 7, 8, 9]])
"""By them rows 1 and 2, of different processes, ask the same."""


def main(backbone: str, folder: Path, rank: int) -> None:
    """Write the averaged gradients of both halves, and from process 0 those of the whole batch."""
    model = GIRCSE.from_backbone(backbone, num_steps=3, full_finetune=True, device="cpu").train()

    def gradients(rows: slice, kind: str, pairs: str, gather: bool) -> dict[str, torch.Tensor]:
        options: dict[str, Any] = {"temperature": 0.5, "gather_across_devices": gather, "false_negative_margin": 0.3}
        options |= {"teacher_pairs": pairs, "teacher_weight": 0.6}
        cached = kind == "cached"
        loss = CachedICRLoss(model, mini_batch_size=3, **options) if cached else ICRLoss(model, **options)
        model.zero_grad()
        columns = [
            {**model.preprocess(texts[rows]), TEXT_KEY: keys[rows]} for texts, keys in zip(TEXTS, KEYS, strict=True)
        ]
        loss(columns, labels[rows]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    labels = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    if rank == 0:
        for pairs in get_args(TeacherPairs):
            torch.save(gradients(slice(None), "plain", pairs, gather=False), folder / f"alone-{pairs}.pt")
    dist.init_process_group("gloo")
    for kind, pairs in (("plain", "anchors"), ("plain", "all"), ("cached", "all")):
        shared = gradients(slice(2 * rank, 2 * rank + 2), kind, pairs, gather=True)
        for gradient in shared.values():
            dist.all_reduce(gradient)
            gradient /= 2
        if rank == 0:
            torch.save(shared, folder / f"{kind}-{pairs}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
