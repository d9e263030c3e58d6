"""`gircse demo`: a guided tour over a bundled corpus. Every number it prints is computed while one watches."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gircse.cli.common import DebugOption, DeviceOption, JsonOption, ModelOption, load_model, stderr

if TYPE_CHECKING:
    import numpy as np

    from gircse.model import GIRCSE

# Each question with the passage that answers it: the demo says honestly at which rank that one comes.
QUESTIONS = {
    "What is the coldest place on Earth?": "en-043",
    "How do plants make their food?": "en-119",
    "Which animals live together in groups called prides?": "en-569",
    "How long is the Amazon?": "en-683",
    "Which organ pumps blood through the body?": "en-193",
}
ASKED = "Which organ pumps blood through the body?"
INSTRUCTION = "Given a question, retrieve passages that answer it"
FACETS = {
    "topic": "Identify the topic of the sentence",
    "language": "Identify the language of the sentence",
}
CLASSES = {"topic": ("sports", "politics", "health", "travel"), "language": ("French", "German", "Spanish")}
STEPS = (1, 5)


def demo(
    model: ModelOption = None, device: DeviceOption = None, json_output: JsonOption = False, debug: DebugOption = False
) -> None:
    """A tour: embed a bundled corpus, ask five questions, steer the vectors by instruction, read the soft tokens.

    [bold]Examples[/bold]

      gircse demo
      gircse demo --model runs/mine
    """
    loaded = load_model(model, device=device, pack=False)  # the plain LLM answers a question
    corpus = load_corpus()
    facts: dict[str, Any] = {"passages": len(corpus)}
    console = Console(stderr=json_output)  # with --json the tour goes to stderr and the facts to stdout

    console.rule("[bold]1  A corpus becomes vectors")
    started = time.perf_counter()
    documents = _embed_passages(loaded, corpus)  # (n, max(STEPS), d)
    seconds = time.perf_counter() - started
    facts |= {"seconds": seconds, "texts_per_second": len(corpus) / seconds}
    console.print(
        f"{len(corpus)} sentences of Wikinews, Wikibooks and Wikivoyage (SIB-200 / FLORES, CC BY-SA 4.0) "
        f"in {seconds:.0f} s: {len(corpus) / seconds:.0f} texts/s, {documents.shape[-1]} dimensions, "
        f"the embeddings after each of {max(STEPS)} steps at once.\n"
    )

    console.rule("[bold]2  Five questions, and what more steps change")
    facts["questions"] = _ask(loaded, corpus, documents, console)

    console.rule("[bold]3  The same sentences under two instructions")
    facts["facets"] = _steer(loaded, corpus, console)

    console.rule("[bold]4  What the soft tokens say")
    question = next(iter(QUESTIONS))
    from gircse.cli.explain import soft_token_table

    console.print(f"[dim]{escape(loaded.format_instruction(INSTRUCTION))}[/]{escape(question)}\n", highlight=False)
    console.print(soft_token_table(loaded.explain(question, instruction=INSTRUCTION, num_steps=max(STEPS))), "")

    console.rule("[bold]5  The same weights write an answer")
    facts["answer"] = _answer(loaded, corpus, documents, console)

    console.rule("[bold]Next")
    console.print(
        "  gircse embed YOUR.jsonl -o YOUR.parquet            any size; --resume after an interruption\n"
        "  gircse index YOUR.jsonl -o YOUR.index              then: gircse search, gircse ask\n"
        "  gircse serve                                       OpenAI's interface and a playground\n"
        '  gircse explain "your text" --instruction "what it should be about"\n'
        "  gircse train recipes/smollm2-135m-quick.yaml ...   your own adapter\n",
        highlight=False,
    )
    if json_output:
        print(json.dumps(facts))


def load_corpus() -> list[dict[str, str]]:
    """The bundled passages: ``id``, ``text``, ``topic``, ``language``."""
    text = (Path(__file__).parents[1] / "data" / "demo_corpus.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _embed_passages(model: GIRCSE, corpus: Sequence[dict[str, str]]) -> np.ndarray:
    with stderr.status(f"embedding {len(corpus)} passages"):
        texts = [passage["text"] for passage in corpus]
        return model.encode_steps(texts, num_steps=max(STEPS), normalize_embeddings=True)


def _ask(
    model: GIRCSE, corpus: Sequence[dict[str, str]], documents: np.ndarray, console: Console
) -> list[dict[str, Any]]:
    queries = model.encode_steps(
        list(QUESTIONS), instruction=INSTRUCTION, num_steps=max(STEPS), normalize_embeddings=True
    )  # (5, K, d)
    ids = [passage["id"] for passage in corpus]
    found = []
    for row, (question, answer) in enumerate(QUESTIONS.items()):
        scores = {k: documents[:, k - 1] @ queries[row, k - 1] for k in STEPS}
        ranks = {k: 1 + int((scores[k] > scores[k][ids.index(answer)]).sum()) for k in STEPS}
        best = scores[max(STEPS)].argsort()[::-1][:2]
        found.append({"question": question, "ranks": ranks, "top": [ids[index] for index in best]})
        shown = ", ".join(f"K={k}: rank {rank}" for k, rank in ranks.items())
        console.print(f"[bold]{escape(question)}[/]  [dim]the answer's {shown}[/]", highlight=False)
        for index in best:
            mark = "[green]✓[/]" if ids[index] == answer else " "
            text = escape(corpus[index]["text"])
            console.print(f"  {mark} {scores[max(STEPS)][index]:.3f}  {text}", highlight=False)
    console.print()
    return found


def _steer(model: GIRCSE, corpus: Sequence[dict[str, str]], console: Console) -> dict[str, dict[str, float]]:
    """Sort the same sentences by their nearest class name, under two instructions: shares of right classes."""
    from gircse.groups.classify import Classifier

    chosen = [own for own in corpus if all(own[facet] in names for facet, names in CLASSES.items())]
    texts = [own["text"] for own in chosen]
    counts = {facet: f"{len(names)} {facet}s" for facet, names in CLASSES.items()}
    table = Table("instruction", *(f"right among {count}" for count in counts.values()), box=None, pad_edge=False)
    shares: dict[str, dict[str, float]] = {}
    for facet, instruction in FACETS.items():
        shares[facet] = {}
        for other, names in CLASSES.items():
            assigned = Classifier.from_labels(model, names, instruction=instruction)(texts)
            right = sum(found.label == own[other] for found, own in zip(assigned, chosen, strict=True))
            shares[facet][other] = right / len(chosen)
        table.add_row(instruction, *(f"{share:.0%}" for share in shares[facet].values()))
    chance = " and ".join(f"{1 / len(names):.0%}" for names in CLASSES.values())
    console.print(
        f"{len(chosen)} of the sentences, {' and '.join(counts.values())} in equal parts, sorted by the names of the "
        f"classes alone; chance is {chance}:\n"
    )
    console.print(table, "")
    return shares


def _answer(model: GIRCSE, corpus: Sequence[dict[str, str]], documents: np.ndarray, console: Console) -> dict[str, Any]:
    """Retrieve with the adapter, write with the plain backbone, cite the passages."""
    from gircse.search.answer import BackboneWriter, answer, cited
    from gircse.search.search import SearchHit

    query = model.encode_query(ASKED, instruction=INSTRUCTION, num_steps=max(STEPS), normalize_embeddings=True)  # (d,)
    scores = documents[:, -1] @ query
    hits = []
    for index in (-scores).argsort()[:3].tolist():
        name, score = corpus[index]["id"], float(scores[index])
        hits.append(SearchHit(name, f"{name}#0", score, score, corpus[index]["text"]))
    writer = BackboneWriter(model.encoder)
    result = answer(ASKED, hits, writer, writer.count_tokens)
    console.print(f"[bold]{escape(ASKED)}[/]  ", end="")
    text = ""
    for piece in result.pieces:
        text += piece
        console.print(escape(piece), end="", highlight=False, soft_wrap=True)
    console.print()
    sources = cited(text, result.passages)
    for passage in result.passages:
        style = "bold" if passage in sources else "dim"
        console.print(f"  [{style}]\\[{passage.number}][/] {escape(passage.text)}", highlight=False)
    console.print("[dim]A small model writes modest answers; the cited passages are what counts.[/]\n")
    return {"question": ASKED, "text": text.strip(), "cited": [passage.hit.document_id for passage in sources]}
