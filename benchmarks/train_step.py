"""What one training step costs: encoder-only, ICR, and ICR by the two loops that one would write first.

    python benchmarks/train_step.py                                  128 tokens, K = 5
    python benchmarks/train_step.py --tokens 32,128,512 --steps 3,5,10 --repeats 5

A step is forward, loss and backward; LoRA on SmolLM2-135M, queries and passages of random tokens, all of one length.
``ICR with peft's LoRA`` is ICR without the fused LoRA layers of training. ``recompute`` runs the whole sequence through
the model again for every soft token, logits at all positions; ``dynamic cache`` is a plain loop over transformers'
cache.
All are timed in turn within one process, and the medians compared. Peak memory is that of a fresh process each, beyond
the loaded model; what dies there for want of memory is not timed. Prints a table, writes
benchmarks/results/train_step.json after every size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from arguments import at_least_one, output_file
from peak_memory import peak_rise
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from gircse.fast.packed_weights import PackedWeights
from gircse.losses import ICRLoss
from gircse.model import GIRCSE
from gircse.pooling import pool_steps
from gircse.train.fused_lora import fused_lora
from gircse.train.plan import matrix_rate, step_flops

VARIANTS = ("encoder-only", "ICR", "ICR with peft's LoRA", "dynamic cache", "recompute")
FUSED = VARIANTS[:2]
Step = Callable[[], None]


def load(backbone: str, dtype: str, device: str) -> GIRCSE:
    """LoRA as in the paper, ready for training."""
    torch.manual_seed(0)
    lora = LoraConfig(r=16, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    options = {"dtype": getattr(torch, dtype), "device": device, "max_seq_length": 1024}
    return GIRCSE.from_backbone(backbone, lora=lora, **options).train()


def make_batch(model: GIRCSE, rows: int, tokens: int) -> list[dict[str, Tensor]]:
    """A column of queries and one of passages."""
    size = model.encoder.decoder.vocabulary.embedding.num_embeddings
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(0, size, (rows, tokens), generator=generator).to(model.device),
            "attention_mask": torch.ones(rows, tokens, dtype=torch.long, device=model.device),
        }
        for _ in range(2)
    ]


def make_step(variant: str, model: GIRCSE, batch: list[dict[str, Tensor]], num_steps: int) -> Step:
    """A whole training step without the optimiser."""
    loss = ICRLoss(model)
    allowed = loss.allowed_candidates(batch)
    ids = torch.cat([column["input_ids"] for column in batch])

    def step() -> None:
        model.zero_grad(set_to_none=True)
        if variant in (*FUSED, "ICR with peft's LoRA"):
            model.num_steps = 0 if variant == "encoder-only" else num_steps
            loss(batch).backward()
        else:
            states = (recompute if variant == "recompute" else dynamic_cache)(model, ids, num_steps)
            loss.contrast(pool_steps(states, "mean"), allowed).backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def recompute(model: GIRCSE, ids: Tensor, num_steps: int) -> Tensor:
    """(B, K + 1, d): the whole sequence again for every soft token, logits at all positions."""
    backbone, table = model.encoder.backbone, model.encoder.decoder.vocabulary.embedding
    embeddings, states = table(ids), []
    for step in range(num_steps + 1):
        out = backbone(inputs_embeds=embeddings, use_cache=False, output_hidden_states=True)
        states.append(out.hidden_states[-1][:, -1])
        if step < num_steps:
            token = torch.softmax(out.logits, dim=-1)[:, -1:] @ table.weight
            embeddings = torch.cat([embeddings, token], dim=1)
    return torch.stack(states, dim=1)


def dynamic_cache(model: GIRCSE, ids: Tensor, num_steps: int) -> Tensor:
    """(B, K + 1, d): the prompt once, then one-token passes over transformers' cache."""
    backbone, table = model.encoder.backbone, model.encoder.decoder.vocabulary.embedding
    cache, inputs, states = DynamicCache(), table(ids), []
    for step in range(num_steps + 1):
        out = backbone(inputs_embeds=inputs, past_key_values=cache, use_cache=True, output_hidden_states=True)
        states.append(out.hidden_states[-1][:, -1])
        if step < num_steps:
            inputs = torch.softmax(out.logits[:, -1:], dim=-1) @ table.weight
    return torch.stack(states, dim=1)


def time_steps(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Median seconds of each, in turn; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_of_one(arguments: argparse.Namespace) -> None:
    """In a process of its own: one step, and how far it raised the peak."""
    model = load(arguments.backbone, arguments.dtype, arguments.device)
    batch = make_batch(model, arguments.rows, arguments.tokens[0])
    with fused_lora(model) if arguments.memory_of in FUSED else nullcontext():
        print(peak_rise(make_step(arguments.memory_of, model, batch, arguments.steps[0]), arguments.device))


def measure_peak(variant: str, arguments: argparse.Namespace, tokens: int, num_steps: int) -> float | None:
    """MiB beyond the loaded model; None where memory did not suffice."""
    command = [sys.executable, __file__, "--memory-of", variant, "--rows", str(arguments.rows), "--tokens", str(tokens)]
    command += ["--steps", str(num_steps), "--backbone", arguments.backbone, "--dtype", arguments.dtype]
    command += ["--device", arguments.device]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode in (-9, 137) or "memory" in done.stderr:
        return None
    done.check_returncode()
    return float(done.stdout.split()[-1])


def variants(text: str) -> list[str]:
    """``"encoder-only,ICR"`` as a list of `VARIANTS`; the first must be there, as others are compared with it."""
    found = text.split(",")
    if unknown := set(found) - set(VARIANTS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: there is {', '.join(VARIANTS)}")
    return list(dict.fromkeys([VARIANTS[0], *found]))


def numbers(text: str) -> list[int]:
    """``"3,5"`` as a list."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=numbers, default=[128])
    parser.add_argument("--steps", type=numbers, default=[5])
    parser.add_argument("--rows", type=int, default=8, help="queries, and as many passages")
    parser.add_argument("--repeats", type=at_least_one, default=3)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--variants", type=variants, default=list(VARIANTS))
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument(
        "-o", "--output", type=output_file, default=Path(__file__).parent / "results" / "train_step.json"
    )
    arguments = parser.parse_args()
    if arguments.memory_of:
        peak_of_one(arguments)
        return
    model, fused = (load(arguments.backbone, arguments.dtype, arguments.device) for _ in range(2))
    packed = PackedWeights()
    vocabulary = model.encoder.decoder.vocabulary.embedding.weight.numel()
    linears = [m for m in model.encoder.decoder.transformer.modules() if type(m) is torch.nn.Linear]
    layers = sum(m.weight.numel() for m in linears if 16 not in m.weight.shape)
    rate = matrix_rate(dtype=getattr(torch, arguments.dtype), device=arguments.device)
    machine: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if arguments.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    machine |= {"threads": torch.get_num_threads(), "matrix_gflops": rate / 1e9, "torch": torch.__version__}
    settings = {"rows": 2 * arguments.rows, "repeats": arguments.repeats, "backbone": arguments.backbone}
    settings["dtype"] = arguments.dtype
    table = Table("tokens", "K", "variant", "seconds", "to encoder-only", "to floor", "peak MiB")
    entries: list[dict[str, Any]] = []
    for tokens in arguments.tokens:
        batch = make_batch(model, arguments.rows, tokens)
        for num_steps in arguments.steps:
            peaks: dict[str, float | None] = dict.fromkeys(arguments.variants)
            if not arguments.no_memory:
                peaks = {variant: measure_peak(variant, arguments, tokens, num_steps) for variant in peaks}
            fitting = [name for name, peak in peaks.items() if peak is not None or arguments.no_memory]
            models = {variant: fused if variant in FUSED else model for variant in fitting}
            steps = {variant: make_step(variant, models[variant], batch, num_steps) for variant in fitting}
            with fused_lora(fused, packed):
                seconds = time_steps(steps, arguments.repeats)
            for variant, value in seconds.items():
                k = 0 if variant == "encoder-only" else num_steps
                floor = 2 * arguments.rows * step_flops(tokens, k, layers, vocabulary, frozen=True) / rate
                peak = peaks[variant]
                entry = {"tokens": tokens, "num_steps": num_steps, "variant": variant, "seconds": value}
                entry |= {"to_encoder_only": value / seconds["encoder-only"], "floor_seconds": floor, "peak_mib": peak}
                entries.append(entry)
                shown = "" if peak is None else f"{peak:,.0f}"
                cells = (f"{value:.3g}", f"{entry['to_encoder_only']:.2f}", f"{value / floor:.2f}", shown)
                table.add_row(str(tokens), str(num_steps), variant, *cells)
            arguments.output.parent.mkdir(exist_ok=True)
            found = {"machine": machine, "settings": settings, "entries": entries}
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
