"""What a generative embedding costs beside the same backbone as a plain encoder, and beside the loops one writes first.

    python benchmarks/encode_speed.py --data DATA/eval
    python benchmarks/encode_speed.py --data DATA/eval --texts 48 --repeats 3 --mixes short

Three mixes of real texts: short (STSBenchmark sentences under an instruction), medium (news under an instruction), long
(scientific abstracts cut to 140 words, plain). ``encode`` is this project's; ``encoder`` is sentence-transformers with
last-token pooling and its default batching, over the same merged weights (``bfloat16 ...``: both with 16-bit weights;
``int8 encode ...`` with 8-bit ones and ``packed encode ...`` with packed ones alone, if ``--variants`` asks for them);
``recompute`` runs the whole sequence again for every soft token, as the paper's code does in training; ``dynamic
cache`` is a plain loop over transformers' cache.
All in one process, in turn, medians. Peak memory is that of a fresh process each, beyond the loaded model. Writes
benchmarks/results/encode_speed.json.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arguments import at_least_one, data_folder, output_file
from mixes import INSTRUCTION, MIXES, read_mix
from peak_memory import peak_rise
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gircse.fast.inference_copy import InferenceCopy
from gircse.fast.packed_weights import PackedWeights
from gircse.model import GIRCSE
from gircse.pooling import pool_steps
from gircse.refiner import recompute_states
from gircse.train.plan import matrix_rate

FROZEN = {"int8": GIRCSE.quantize_weights, "packed": GIRCSE.pack_weights}
Encode = Callable[[], object]


def plain_encoder(model: GIRCSE, folder: Path) -> SentenceTransformer:
    """The same weights, adapter folded in, as sentence-transformers' own encoder with last-token pooling."""
    encoder = model.encoder
    encoder.settle_adapter()
    transformer = Transformer(str(folder), model_kwargs={"dtype": encoder.backbone.dtype}, max_seq_length=512)
    own = dict(encoder.decoder.transformer.named_parameters())
    for name, parameter in transformer.auto_model.named_parameters():  # type: ignore[union-attr]
        stem, _, last = name.rpartition(".")
        parameter.data = (own[name] if name in own else own[f"{stem}.base_layer.{last}"]).data
    tokenizer: Any = transformer.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pooling = Pooling(encoder.get_embedding_dimension(), pooling_mode="lasttoken")
    return SentenceTransformer(modules=[transformer, pooling], device=str(model.device))


@torch.inference_mode()
def in_batches(
    model: GIRCSE, texts: list[str], prompt: str, num_steps: int, states_of: Callable[..., Tensor], batch: int
) -> Tensor:
    """Batches in order of length, padded, through a loop of one's own."""
    ids = sorted(model.tokenize_texts(texts, prompt).ids, key=len)
    found = []
    for start in range(0, len(ids), batch):
        features = {
            name: value.to(model.device) for name, value in model.encoder.pad(ids[start : start + batch]).items()
        }
        found.append(states_of(model, features["input_ids"], features["attention_mask"], num_steps).cpu())
    return pool_steps(torch.cat(found), "mean")


def recompute(model: GIRCSE, ids: Tensor, mask: Tensor, num_steps: int) -> Tensor:
    """(B, K + 1, d)."""
    return recompute_states(model.encoder.decoder, ids, mask, num_steps=num_steps)


def dynamic_cache(model: GIRCSE, ids: Tensor, mask: Tensor, num_steps: int) -> Tensor:
    """(B, K + 1, d): prompt once, then one token at a time, nothing shared and nothing grouped."""
    backbone, table = model.encoder.backbone, model.encoder.decoder.vocabulary.embedding
    cache, inputs, states = DynamicCache(), table(ids), []
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    for step in range(num_steps + 1):
        out = backbone(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            output_hidden_states=True, logits_to_keep=1,
        )  # fmt: skip
        states.append(out.hidden_states[-1][:, -1])
        if step < num_steps:
            inputs = torch.softmax(out.logits[:, -1:], dim=-1) @ table.weight
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = mask.sum(dim=1, keepdim=True) - 1
    return torch.stack(states, dim=1)


def unpacked(model: GIRCSE, texts: list[str], prompt: str, num_steps: int) -> object:
    """This project's `encode` without packed copies of the weights."""
    encoder = model.encoder
    kept = encoder.packed_weights, encoder.inference_copy
    encoder.packed_weights, encoder.inference_copy = PackedWeights(), InferenceCopy()
    encoder.packed_weights.enabled = False
    found = model.encode(texts, prompt=prompt, num_steps=num_steps)
    encoder.packed_weights, encoder.inference_copy = kept
    return found


class NoCopy(InferenceCopy):
    """In its place: the backbone itself computes, with packed copies of its weights one by one."""

    def decoder(self, backbone: PreTrainedModel) -> None:
        """There is none."""


def in_place(model: GIRCSE, texts: list[str], prompt: str, num_steps: int) -> object:
    """This project's `encode` as on processors for which no packed copy of the model is made."""
    kept, model.encoder.inference_copy = model.encoder.inference_copy, NoCopy()
    found = model.encode(texts, prompt=prompt, num_steps=num_steps)
    model.encoder.inference_copy = kept
    return found


def make_variants(
    model: GIRCSE, folder: Path, texts: list[str], instruction: str | None, batch: int
) -> dict[str, Encode]:
    """What is compared, by name."""
    prompt = "" if instruction is None else model.format_instruction(instruction)
    encoder = plain_encoder(model, folder)
    return {
        "encoder": lambda: encoder.encode(texts, prompt=prompt, batch_size=batch),
        "encode K=0": lambda: model.encode(texts, prompt=prompt, num_steps=0),
        "encode K=5": lambda: model.encode(texts, prompt=prompt, num_steps=5),
        "encode K=20": lambda: model.encode(texts, prompt=prompt, num_steps=20),
        "encode in place K=5": lambda: in_place(model, texts, prompt, 5),
        "encode unpacked K=5": lambda: unpacked(model, texts, prompt, 5),
        "encode unpacked K=20": lambda: unpacked(model, texts, prompt, 20),
        "dynamic cache K=5": lambda: in_batches(model, texts, prompt, 5, dynamic_cache, batch),
        "recompute K=5": lambda: in_batches(model, texts, prompt, 5, recompute, batch),
    }


def make_half_variants(
    model: GIRCSE, folder: Path, texts: list[str], instruction: str | None, batch: int
) -> dict[str, Encode]:
    """Some of them with 16-bit weights."""
    variants = make_variants(model, folder, texts, instruction, batch)
    return {f"bfloat16 {name}": variants[name] for name in ("encoder", "encode K=0", "encode K=5", "encode K=20")}


def make_frozen_variants(kind: str, model: GIRCSE, texts: list[str], instruction: str | None) -> dict[str, Encode]:
    """`encode` with weights of a kind of `FROZEN`."""
    prompt = "" if instruction is None else model.format_instruction(instruction)
    encode = partial(FROZEN[kind](model).encode, texts, prompt=prompt)
    return {f"{kind} encode K={steps}": partial(encode, num_steps=steps) for steps in (0, 5, 20)}


def floor_seconds(model: GIRCSE, ids: list[list[int]], num_steps: int, rate: float) -> float:
    """Seconds for the products of weights alone, every token of every text once, at the measured matrix rate."""
    head = model.encoder.decoder.vocabulary.embedding.weight.numel()
    layers = sum(p.numel() for n, p in model.encoder.decoder.transformer.named_parameters() if "base_layer" in n)
    tokens = sum(map(len, ids))
    return (2 * layers * (tokens + num_steps * len(ids)) + 4 * head * num_steps * len(ids)) / rate


def numbers(text: str) -> list[int]:
    """``192,48,20``."""
    return [int(part) for part in text.split(",")]


def load_model(arguments: argparse.Namespace, dtype: str) -> GIRCSE:
    """The model that is measured."""
    return GIRCSE(arguments.model, device=arguments.device, dtype=getattr(torch, dtype))


def load(arguments: argparse.Namespace, mix: str, count: int) -> tuple[GIRCSE, Path, list[str], str | None]:
    """Model, folder of its backbone, texts and instruction."""
    from gircse.backbones import resolve_backbone

    model = load_model(arguments, arguments.dtype)
    folder = resolve_backbone(model.encoder.reference.name).path
    return model, folder, read_mix(arguments.data, mix, count), None if mix == "long" else INSTRUCTION


def peak_of_one(arguments: argparse.Namespace) -> None:
    """In a process of its own: one run, and how far it raised the peak."""
    model, folder, texts, instruction = load(arguments, arguments.mixes[0], arguments.texts[0])
    if arguments.memory_of.startswith("bfloat16"):
        model = load_model(arguments, "bfloat16")
        variants = make_half_variants(model, folder, texts, instruction, arguments.batch)
    elif (kind := arguments.memory_of.split()[0]) in FROZEN:
        variants = make_frozen_variants(kind, model, texts, instruction)
    else:
        variants = make_variants(model, folder, texts, instruction, arguments.batch)
    print(peak_rise(variants[arguments.memory_of], arguments.device))


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=data_folder, required=True, help="folder of the evaluation data")
    parser.add_argument("--mixes", type=lambda text: text.split(","), default=["short", "medium", "long"])
    parser.add_argument("--texts", type=numbers, default=[192], help="of each mix; one number for all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--model", help="a saved model over the same backbone; the one that ships where not given")
    parser.add_argument(
        "--batch", type=int, default=32, help="texts a batch of all but encode; 32 is the default there"
    )
    parser.add_argument("--variants", type=lambda text: text.split(","), help="all where not given")
    parser.add_argument("--repeats", type=at_least_one, default=3)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument(
        "-o", "--output", type=output_file, default=Path(__file__).parent / "results" / "encode_speed.json"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.mixes) - set(MIXES):
        parser.error(f"argument --mixes: there is no {min(unknown)}; {', '.join(MIXES)} are")
    if len(arguments.texts) not in (1, len(arguments.mixes)):
        parser.error(f"argument --texts: one number for all or one for each of {len(arguments.mixes)} mixes")
    if arguments.memory_of:
        peak_of_one(arguments)
        return
    rate = matrix_rate(dtype=getattr(torch, arguments.dtype), device=arguments.device)
    machine: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if arguments.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    machine |= {"dtype": arguments.dtype, "batch": arguments.batch}
    machine |= {"threads": torch.get_num_threads(), "matrix_gflops": rate / 1e9, "torch": torch.__version__}
    table = Table("mix", "what", "seconds", "texts/s", "tokens/s", "to encoder", "of the floor", "peak MiB")
    entries: list[dict[str, Any]] = []
    counts = arguments.texts * len(arguments.mixes) if len(arguments.texts) == 1 else arguments.texts
    for mix, count in zip(arguments.mixes, counts, strict=True):
        model, folder, texts, instruction = load(arguments, mix, count)
        prompt = "" if instruction is None else model.format_instruction(instruction)
        ids = model.tokenize_texts(texts, prompt).ids
        variants = make_variants(model, folder, texts, instruction, arguments.batch)
        if arguments.variants:
            if any(name.startswith("bfloat16") for name in arguments.variants):
                half = load_model(arguments, "bfloat16")
                variants |= make_half_variants(half, folder, texts, instruction, arguments.batch)
            for kind in {name.split()[0] for name in arguments.variants} & FROZEN.keys():
                variants |= make_frozen_variants(kind, load_model(arguments, arguments.dtype), texts, instruction)
            if unknown := set(arguments.variants) - variants.keys():
                parser.error(f"argument --variants: there is no {min(unknown)}; {', '.join(variants)} are")
            variants = {name: variants[name] for name in ("encoder", *arguments.variants)}
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for round_ in range(arguments.repeats + 1):
            for name, run in variants.items():
                started = time.perf_counter()
                run()
                took = time.perf_counter() - started
                print(f"{mix}, round {round_}, {name}: {took:.3g} s", file=sys.stderr, flush=True)
                if round_:  # the first round warms up
                    seconds[name].append(took)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, value in medians.items():
            num_steps = int(name.split("=")[1]) if "=" in name else 0
            floor = floor_seconds(model, ids, num_steps, rate)
            peak = None
            if not arguments.no_memory:
                command = [sys.executable, __file__, "--data", str(arguments.data), "--mixes", mix]
                command += ["--texts", str(count), "--memory-of", name, "--device", arguments.device]
                command += ["--dtype", arguments.dtype, "--batch", str(arguments.batch)]
                command += ["--model", arguments.model] if arguments.model else []
                told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                peak = float(told.split()[-1])
            tokens = sum(map(len, ids))
            entry = {"mix": mix, "what": name, "num_steps": num_steps, "texts": len(texts), "tokens": tokens}
            entry |= {"seconds": value, "to_encoder": value / medians["encoder"], "share_of_floor": floor / value}
            entries.append(entry | {"peak_mib": peak, "all_seconds": seconds[name]})
            table.add_row(
                mix, name, f"{value:.3g}", f"{len(texts) / value:.1f}", f"{tokens / value:,.0f}",
                f"{entry['to_encoder']:.2f}", f"{entry['share_of_floor']:.0%}", "" if peak is None else f"{peak:,.0f}",
            )  # fmt: skip
        arguments.output.parent.mkdir(exist_ok=True)  # after every mix: a run takes long
        arguments.output.write_text(json.dumps({"machine": machine, "entries": entries}, indent=1) + "\n")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
