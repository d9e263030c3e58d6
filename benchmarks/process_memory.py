"""The memory of a whole process that embeds, libraries and weights included, beside one with a plain encoder.

    python benchmarks/process_memory.py --data DATA/eval

``ours`` is a process as the verbs of the command line are: weights packed alone, few compiled kernels kept.
``encoder`` is sentence-transformers over the same backbone, last-token pooling, its default batching. Every number is
of a fresh process: resident MiB at the peak while it embeds, and at the peak of all, loading included. Then both embed
texts of ever other lengths, a few at a time, and say what is resident in the end: ``unlimited`` is ours with as many
kernels as PyTorch keeps. Linux. Writes benchmarks/results/process_memory.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arguments import data_folder, output_file
from mixes import INSTRUCTION, MIXES, read_mix
from rich.console import Console
from rich.table import Table

COUNTS = {"short": 600, "medium": 96, "long": 60}
GROWN = 240  # short texts and as many news
FEW_TOKENS = 128  # of a batch there, so that many batches differ


def resident(name: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024


def load_encode(arguments: argparse.Namespace) -> Callable[..., object]:
    """What embeds texts under a prompt; options are for ours alone."""
    import torch

    from gircse.backbones import resolve_backbone

    dtype = getattr(torch, arguments.dtype)
    if arguments.what == "encoder":
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        transformer = Transformer(str(resolve_backbone("smollm2-135m").path), model_kwargs={"dtype": dtype})
        tokenizer: Any = transformer.tokenizer
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
        encoder = SentenceTransformer(modules=[transformer, pooling], device="cpu")
        return lambda texts, prompt, **options: encoder.encode(texts, prompt=prompt)
    from gircse import GIRCSE
    from gircse.fast.kernel_caches import limit_kernel_caches

    if arguments.what == "ours":
        limit_kernel_caches()
    model = GIRCSE(dtype=dtype, device="cpu").pack_weights()
    return lambda texts, prompt, **options: model.encode(texts, prompt=prompt, num_steps=arguments.num_steps, **options)


def measure_one(arguments: argparse.Namespace) -> None:
    """In a process of its own: prints its numbers as JSON."""
    encode = load_encode(arguments)
    prompt = f"Instruct: {INSTRUCTION}\nQuery: "
    if arguments.mix == "grown":
        for mix in ("short", "medium"):
            encode(read_mix(arguments.data, mix, GROWN), prompt, batch_tokens=FEW_TOKENS)
        print(json.dumps({"resident": resident("VmRSS")}))
        return
    texts = read_mix(arguments.data, arguments.mix, COUNTS[arguments.mix])
    prompt = "" if arguments.mix == "long" else prompt
    encode(texts[:4], prompt)
    loading, loaded = resident("VmHWM"), resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    encode(texts, prompt)
    peak = resident("VmHWM")
    print(json.dumps({"loaded": loaded, "peak": peak, "peak_with_loading": max(loading, peak)}))


def measure(arguments: argparse.Namespace, what: str, mix: str) -> dict[str, Any]:
    """Numbers of one fresh process."""
    command = [sys.executable, __file__, "--data", str(arguments.data), "--what", what, "--mix", mix]
    command += ["--dtype", arguments.dtype, "--num-steps", str(arguments.num_steps)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {"dtype": arguments.dtype, "mix": mix, "what": what} | json.loads(told.splitlines()[-1])


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=data_folder, required=True, help="folder of the evaluation data")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["bfloat16", "float32"])
    parser.add_argument("--num-steps", type=int, default=5, help="K of ours")
    parser.add_argument("--what", choices=("ours", "unlimited", "encoder"), help=argparse.SUPPRESS)
    parser.add_argument("--mix", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument(
        "-o", "--output", type=output_file, default=Path(__file__).parent / "results" / "process_memory.json"
    )
    arguments = parser.parse_args()
    if arguments.what:
        measure_one(arguments)
        return
    entries = []
    table = Table("dtype", "texts", "what", "loaded", "peak", "with loading", "to the encoder's peak")
    grown = Table("dtype", "what", "resident after texts of many lengths")
    for dtype in arguments.dtypes:
        arguments.dtype = dtype
        for mix in MIXES:
            encoder, ours = (measure(arguments, what, mix) for what in ("encoder", "ours"))
            ours["to_encoder"] = ours["peak"] / encoder["peak"]
            entries += [encoder, ours]
            for entry in (encoder, ours):
                shown = [f"{entry[name]:,.0f}" for name in ("loaded", "peak", "peak_with_loading")]
                table.add_row(dtype, mix, entry["what"], *shown, f"{entry['peak'] / encoder['peak']:.2f}")
        for what in ("encoder", "unlimited", "ours"):
            entries.append(measure(arguments, what, "grown"))
            grown.add_row(dtype, what, f"{entries[-1]['resident']:,.0f}")
        facts = {"machine": platform.machine(), "num_steps": arguments.num_steps, "texts": COUNTS, "grown": 2 * GROWN}
        arguments.output.write_text(json.dumps({"facts": facts, "entries": entries}, indent=1) + "\n")
    for shown in (table, grown):
        Console(width=120).print(shown)


if __name__ == "__main__":
    main()
