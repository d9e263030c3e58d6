"""Recall and latency of approximate vector search (IVF-HNSW) against exact search, on the table that an index uses.

    python benchmarks/search_recall.py                                  clustered synthetic vectors
    python benchmarks/search_recall.py --vectors corpus.npy             real ones, as `gircse embed` writes them

Synthetic vectors are drawn around cluster centres in a space whose variance falls off as it does in embeddings.
Queries are rows held out of the table. Recall@k is the share of the exact k nearest that the approximate search also
returns.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from arguments import output_file
from rich.console import Console
from rich.table import Table

from gircse.search.index import normalized
from gircse.search.table import Chunk, ChunkTable


def synthetic(rows: int, dimension: int, clusters: int, seed: int) -> np.ndarray:
    """(rows, dimension) float32 of length 1."""
    generator = np.random.default_rng(seed)
    scale = (1 / np.sqrt(np.arange(1, dimension + 1))).astype(np.float32)
    centres = generator.standard_normal((clusters, dimension), dtype=np.float32) * scale
    noise = generator.standard_normal((rows, dimension), dtype=np.float32) * scale
    return normalized(centres[generator.integers(0, clusters, rows)] + 0.6 * noise)


def measure(vectors: np.ndarray, queries: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
    """Build the table and its index in a temporary folder, and ask both ways."""
    facts: dict[str, float] = {"rows": len(vectors), "dimension": vectors.shape[1], "queries": len(queries)}
    with TemporaryDirectory() as folder:
        table = ChunkTable.create(Path(folder), vectors.shape[1], {})
        for start in range(0, len(vectors), 8192):
            part = vectors[start : start + 8192]
            table.add([Chunk(str(start + n), 0, "", "text", {}) for n in range(len(part))], part)
        started = time.perf_counter()
        table.build_indices("English", exact_below=1)
        facts["build_seconds"] = time.perf_counter() - started
        facts["folder_megabytes"] = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) / 1e6
        found: dict[bool, list[list[str]]] = {}
        for exact in (True, False):
            table.vector_search(queries[0], max(ks), None, exact=exact)  # reads the files
            started = time.perf_counter()
            hits = [table.vector_search(query, max(ks), None, exact=exact) for query in queries]
            seconds = (time.perf_counter() - started) / len(queries)
            facts["exact_ms" if exact else "approximate_ms"] = 1000 * seconds
            found[exact] = [[hit["chunk_id"] for hit in rows] for rows in hits]
    for k in ks:
        shares = [len(set(a[:k]) & set(b[:k])) / k for a, b in zip(found[True], found[False], strict=True)]
        facts[f"recall@{k}"] = float(np.mean(shares))
    return facts


def main() -> None:
    """Measure, print a table, write a JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, help=".npy of (n, d); synthetic where not given")
    parser.add_argument("--rows", type=int, default=50_000, help="of synthetic vectors")
    parser.add_argument("--dimension", type=int, default=576)
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=output_file, default=Path("benchmarks/results/search_recall.json"))
    options = parser.parse_args()
    if options.vectors is not None:
        source = normalized(np.load(options.vectors))
    else:
        source = synthetic(options.rows + options.queries, options.dimension, options.clusters, options.seed)
    order = np.random.default_rng(options.seed).permutation(len(source))
    facts = measure(source[order[options.queries :]], source[order[: options.queries]], (1, 10, 50))
    table = Table("measure", "value", box=None)
    for name, value in facts.items():
        table.add_row(name, f"{value:,.3f}".rstrip("0").rstrip("."))
    Console().print(table)
    kind = options.vectors.name if options.vectors else f"synthetic, {options.clusters} clusters, seed {options.seed}"
    result = {"vectors": kind, "machine": f"{platform.machine()} {platform.system()}", **facts}
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
