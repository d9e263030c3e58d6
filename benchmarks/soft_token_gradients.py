"""How large the gradients of soft tokens are, and how much of them bfloat16 leaves.

    python benchmarks/soft_token_gradients.py --data DATA/train

One batch of questions and answers (medquad), the loss of ICR, LoRA; the bare backbone with a new adapter, whose update
is zero, and the model that ships. For every K the norm of the gradient of the adapter in float32, and the cosine of
bfloat16's to it; with every kind of `soft_token_gradients`. Writes
benchmarks/results/soft_token_gradients.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from arguments import data_folder, output_file
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from gircse import GIRCSE, ICRLoss
from gircse.gradient_chain import SOFT_TOKEN_GRADIENTS
from gircse.train.fused_lora import fused_lora
from gircse.train.rows import read_rows

INSTRUCTION = "Given a question, retrieve passages that answer it"


def load(start: str, dtype: torch.dtype) -> GIRCSE:
    """The bare backbone with a new adapter, or the model that ships with its own."""
    torch.manual_seed(0)
    if start == "shipped":
        model = GIRCSE(dtype=dtype, device="cpu")
        model.encoder.unfreeze()
        return model.train()
    lora = LoraConfig(r=16, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    return GIRCSE.from_backbone("smollm2-135m", lora=lora, dtype=dtype, device="cpu").train()


def gradient(model: GIRCSE, columns: list[list[str]], num_steps: int, kind: str) -> Tensor:
    """Of all adapters, in one row."""
    model.num_steps = num_steps
    model.zero_grad()
    loss = ICRLoss(model, soft_token_gradients=kind)
    with fused_lora(model):
        loss([model.encoder.preprocess(texts) for texts in columns]).backward()
    return torch.cat([weight.grad.flatten().double() for weight in model.parameters() if weight.grad is not None])


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=data_folder, required=True, help="folder of the training data")
    parser.add_argument("--steps", type=lambda text: [int(k) for k in text.split(",")], default=[0, 1, 2, 3, 5, 10])
    parser.add_argument("--rows", type=int, default=16)
    results = Path(__file__).parent / "results"
    parser.add_argument("-o", "--output", type=output_file, default=results / "soft_token_gradients.json")
    arguments = parser.parse_args()
    rows = [row for row, _ in zip(read_rows(arguments.data / "medquad.jsonl.zst"), range(arguments.rows), strict=False)]
    columns = [
        [f"Instruct: {INSTRUCTION}\nQuery: {row['query']}" for row in rows],
        [row["pos"][0] for row in rows],
    ]
    entries = []
    table = Table("start", "K", "soft tokens", "norm", "cosine of bfloat16's")
    for start in ("bare", "shipped"):
        models = [load(start, dtype) for dtype in (torch.float32, torch.bfloat16)]
        for model in models:
            model.max_seq_length = 80
        for num_steps in arguments.steps:
            for kind in SOFT_TOKEN_GRADIENTS if num_steps else ("full",):
                exact, rounded = (gradient(model, columns, num_steps, kind) for model in models)
                entry = {"start": start, "num_steps": num_steps, "soft_token_gradients": kind}
                entry |= {"norm": float(exact.norm()), "cosine": float(F.cosine_similarity(exact, rounded, dim=0))}
                entries.append(entry)
                table.add_row(start, str(num_steps), kind, f"{entry['norm']:.1f}", f"{entry['cosine']:.3f}")
    arguments.output.write_text(json.dumps({"rows": arguments.rows, "entries": entries}, indent=1) + "\n")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
