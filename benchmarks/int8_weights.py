"""What packed and 8-bit weights save in memory, and what 8 bits do to vectors and to search, alone and mixed.

    python benchmarks/int8_weights.py --data DATA/eval

Memory is that of a fresh process each, beyond the imports: after loading, and after embedding short texts with five
soft tokens. Search is nDCG@10 over passages that answer some of the questions and as many others as asked for, with
questions and passages embedded by the same weights, or one by each. How fast they are: ``encode_speed.py --variants
"int8 encode K=5"``. Writes benchmarks/results/int8_weights.json.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import platform
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from arguments import data_folder, output_file
from mixes import INSTRUCTION, read_mix
from rich.console import Console
from rich.table import Table
from sklearn.metrics import ndcg_score

from gircse.hardware import return_freed_memory
from gircse.model import GIRCSE

KINDS = ("float32", "float32 unpacked", "float32 pack_weights", "bfloat16", "bfloat16 pack_weights", "int8")


def load(kind: str) -> GIRCSE:
    """The model that ships, with weights of a kind."""
    dtype = torch.bfloat16 if kind.startswith("bfloat16") else torch.float32
    model = GIRCSE(dtype=dtype, device="cpu")
    model.encoder.packed_weights.enabled = "unpacked" not in kind
    if kind.endswith("pack_weights"):
        model.pack_weights()
    return model.quantize_weights() if kind == "int8" else model


def memory_of(kind: str, data: Path) -> None:
    """In a process of its own: MiB beyond the imports."""
    process, mib = psutil.Process(), 2**20
    before = process.memory_info().rss
    found = []
    model = load(kind)
    for texts in ([], read_mix(data, "short", 64)):
        if texts:
            prompt = model.format_instruction(INSTRUCTION)
            model.encode(texts, prompt=prompt, num_steps=5, batch_tokens=1024)
        gc.collect()
        return_freed_memory()
        found.append((process.memory_info().rss - before) / mib)
    print(json.dumps(found))


def read_task(folder: Path, questions: int, others: int) -> tuple[list[str], list[str], np.ndarray]:
    """Questions, passages, and which passage answers which question, (questions, passages)."""

    def texts(name: str) -> dict[str, str]:
        rows = map(json.loads, (folder / name).read_text(encoding="utf-8").splitlines())
        return {str(row["id"]): f"{row.get('title') or ''} {row['text']}".strip() for row in rows}

    asked, corpus, answers = texts("queries.jsonl"), texts("corpus.jsonl"), dict[str, set[str]]()
    with (folder / "qrels.tsv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if float(row["score"]) > 0 and row["corpus-id"] in corpus:
                answers.setdefault(row["query-id"], set()).add(row["corpus-id"])
    chosen = random.Random(1)
    ids = chosen.sample(sorted(answers.keys() & asked.keys()), questions)
    needed = sorted(set[str]().union(*(answers[query] for query in ids)))
    kept = needed + chosen.sample(sorted(corpus.keys() - set(needed)), others)
    relevant = np.array([[passage in answers[query] for passage in kept] for query in ids])
    return [asked[query] for query in ids], [corpus[passage] for passage in kept], relevant


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=data_folder, required=True, help="folder of the evaluation data")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--others", type=int, default=400, help="passages that answer none of them")
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument(
        "-o", "--output", type=output_file, default=Path(__file__).parent / "results" / "int8_weights.json"
    )
    arguments = parser.parse_args()
    if arguments.memory_of:
        memory_of(arguments.memory_of, arguments.data)
        return
    memory, console = dict[str, Any](), Console()
    table = Table("weights", "MiB loaded", "MiB after embedding")
    for kind in KINDS:
        command = [sys.executable, __file__, "--data", str(arguments.data), "--memory-of", kind]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        memory[kind] = json.loads(told.splitlines()[-1])
        table.add_row(kind, *(f"{value:,.0f}" for value in memory[kind]))
    console.print(table)

    models = {kind: load(kind) for kind in ("float32", "int8")}
    table, tasks = Table("task", "questions by", "passages by", "nDCG@10", "cosine to float32"), dict[str, Any]()
    for task in ("SciFact", "FeedbackQARetrieval"):
        asked, passages, relevant = read_task(arguments.data / task, arguments.questions, arguments.others)
        vectors = {}
        for kind, model in models.items():
            asked_vectors = model.encode_query(asked, normalize_embeddings=True)
            vectors[kind] = asked_vectors, model.encode_document(passages, normalize_embeddings=True)
        cosines = (vectors["float32"][1] * vectors["int8"][1]).sum(axis=1)
        tasks[task] = {"cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min())}
        for first in models:
            for second in models:
                score = 100 * float(ndcg_score(relevant, vectors[first][0] @ vectors[second][1].T, k=10))
                tasks[task][f"questions {first}, passages {second}"] = score
                table.add_row(
                    task, first, second, f"{score:.1f}", f"{cosines.mean():.4f}, {cosines.min():.4f} at least"
                )
    console.print(table)
    machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    found = {"machine": machine, "memory_mib": memory, "search": tasks}
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
