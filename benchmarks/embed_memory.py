"""How much memory embedding a corpus takes beyond the model, and whether it grows with the corpus.

    python benchmarks/embed_memory.py                               20,000 synthetic short texts
    python benchmarks/embed_memory.py --texts sentences.jsonl       sentences of your own, repeated and numbered
    python benchmarks/embed_memory.py --limit 2000 --num-steps 1    a quick look

Prints the peak resident memory of each quarter of the work over that of the loaded model, and writes
benchmarks/results/embed_memory.json.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import threading
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import psutil
import typer

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20
WORDS = (
    "river music garden engine paper winter doctor market silver window village teacher bridge ocean summer letter "
    "quiet broken early yellow narrow ancient gentle heavy bright empty runs opens follows carries builds finds keeps "
    "sells repairs paints near behind under without during the a this every some her their one"
)


def short_texts(source: Path | None, count: int) -> Iterator[str]:
    """Numbered short texts: the strings of a .txt or .jsonl file over and over, or mixed words."""
    if source is None:
        generator, words = random.Random(0), WORDS.split()
        sentences = (" ".join(generator.choices(words, k=generator.randint(5, 25))) for _ in range(count))
    else:
        lines = source.read_text(encoding="utf-8").splitlines()
        if source.suffix == ".jsonl":
            lines = [value for line in lines for value in json.loads(line).values() if isinstance(value, str)]
        sentences = cycle(" ".join(line.split()) for line in lines if line.strip())
    return (f"{number}: {sentence}" for number, sentence in enumerate(islice(sentences, count), start=1))


class MemoryWatch:
    """Samples this process's resident memory in a thread; a context manager."""

    def __init__(self, quarters: int = 4, every: float = 0.02) -> None:
        self.process, self.every = psutil.Process(), every
        self.peaks = [0] * quarters
        self.quarter = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(self.every):
            self.peaks[self.quarter] = max(self.peaks[self.quarter], self.process.memory_info().rss)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


def main(
    texts: Annotated[Path | None, typer.Option(help="A .txt or .jsonl file of sentences.")] = None,
    limit: Annotated[int, typer.Option(min=4, help="Texts to embed.")] = 20_000,
    num_steps: Annotated[int | None, typer.Option(min=0, help="K; the model's where not given.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1)] = 4096,
    model: Annotated[str | None, typer.Option(help="A saved model; the shipped one where not given.")] = None,
    backbone: Annotated[str | None, typer.Option(help="An untrained model over this decoder instead.")] = None,
    result: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "embed_memory.json",
) -> None:
    """Embed short texts in this process and watch its memory."""
    import torch

    from gircse import GIRCSE, __version__
    from gircse.embed.job import EmbedSettings, Progress, embed_corpus
    from gircse.embed.reader import CorpusReader

    loaded = GIRCSE(model) if backbone is None else GIRCSE.from_backbone(backbone)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("".join(f"{text}\n" for text in short_texts(texts, limit)), encoding="utf-8")
        steps = loaded.num_steps if num_steps is None else num_steps
        settings = EmbedSettings(model or backbone or "default", "not compared here", steps, batch_tokens=batch_tokens)
        baseline = psutil.Process().memory_info().rss
        with MemoryWatch() as watch:

            def on_progress(progress: Progress) -> None:
                watch.quarter = min(3, progress.texts * 4 // limit)
                print(f"\r{progress.texts:,}/{limit:,} texts", end="", flush=True)

            summary = embed_corpus(
                loaded, CorpusReader(str(corpus)), Path(folder) / "a.parquet", settings, on_progress=on_progress
            )
    over = [round((peak - baseline) / MIB, 1) for peak in watch.peaks]
    values = {
        "gircse_version": __version__,
        "torch_version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "device": str(loaded.device),
        "backbone": loaded.encoder.reference.name,
        "num_steps": steps,
        "batch_tokens": batch_tokens,
        "texts": summary.texts,
        "source": texts.name if texts else "mixed words, seed 0",
        "tokens": summary.tokens,
        "seconds": round(summary.seconds, 1),
        "tokens_per_second": round(summary.tokens_per_second, 1),
        "rss_after_loading_mib": round(baseline / MIB, 1),
        "peak_over_model_mib": max(over),
        "peak_over_model_by_quarter_mib": over,
    }
    print()
    for share, peak in zip((25, 50, 75, 100), over, strict=True):
        print(f"to {share:3d} %: peak {peak:8.1f} MiB over the loaded model")
    print(f"peak: {max(over):.1f} MiB over the {baseline / MIB:,.1f} MiB of the process with its model loaded")
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
