"""`gircse cluster`: groups of texts that nobody has named. The work is `gircse.groups.clusters`'s."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from gircse.cli.common import (
    ColumnOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    FileArgument,
    IdColumnOption,
    InputFormatOption,
    JsonOption,
    MaxLengthOption,
    ModelOption,
    NumStepsOption,
    QuantizeOption,
    load_model,
    printable,
    shortened,
    stderr,
)
from gircse.cli.groups import OutputOption, OverwriteOption, check_output, read_texts, write_rows
from gircse.errors import InputDataError
from gircse.groups import DEFAULT_CLUSTERS, DEFAULT_INSTRUCTION

EXAMPLES = 3
"""Texts shown of a cluster."""


def cluster(
    source: FileArgument,
    clusters: Annotated[int, typer.Option("--clusters", "-k", min=2, help="How many.")] = DEFAULT_CLUSTERS,
    instruction: Annotated[str, typer.Option("--instruction", help="What the groups are about.")] = DEFAULT_INSTRUCTION,
    truth: Annotated[
        str | None, typer.Option("--truth", metavar="COLUMN", help="True groups in FILE: the v-measure against them.")
    ] = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    input_format: InputFormatOption = None,
    column: ColumnOption = "text",
    id_column: IdColumnOption = None,
    num_steps: NumStepsOption = None,
    max_length: MaxLengthOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Find groups of texts, and name them in the words of the model and of the texts.

    k-means over vectors under the instruction. A group is named twice: by what the model's first soft token says of
    its texts and not of the others, and by words that are frequent in it and rare in the others.

    [bold]Examples[/bold]

      gircse cluster tickets.jsonl -k 12 --instruction "Identify the problem"
      gircse cluster reviews.csv --column body --instruction "Identify the emotion"
      gircse cluster notes.txt -k 5 -o groups.csv
    """
    check_output(output, overwrite)
    given = read_texts(source, input_format, column, id_column, truth)
    if len(given.texts) < clusters:
        raise InputDataError(source, None, f"{len(given.texts)} texts make no {clusters} groups; lower --clusters")
    loaded = load_model(
        model, device=device, dtype=dtype, quantize=quantize, num_steps=num_steps, max_length=max_length
    )
    prompt = loaded.format_instruction(instruction)
    vectors = loaded.encode(given.texts, prompt=prompt, normalize_embeddings=True, show_progress_bar=stderr.is_terminal)
    with stderr.status("grouping"):
        from gircse.groups import clusters as found

        places = found.cluster(vectors, clusters)
        near = found.closeness(vectors, places)
        spokesmen = found.most_central(near, places, found.TEXTS_A_NAME)
        said = found.spoken_words(loaded, given.texts, spokesmen, prompt)
        words = found.distinctive_words(given.texts, places)
    groups = [
        {
            "cluster": place + 1,
            "size": int((places == place).sum()),
            "said": said[place],
            "words": words[place],
            "examples": [given.ids[row] for row in rows[:EXAMPLES]],
        }
        for place, rows in enumerate(spokesmen)
    ]
    v_measure = None
    if truth is not None:
        from sklearn.metrics import v_measure_score

        v_measure = float(v_measure_score(given.labels, places))
    rows = [
        {"id": key, "cluster": int(place) + 1, "similarity": float(score), "text": text}
        for key, place, score, text in zip(given.ids, places, near, given.texts, strict=True)
    ]
    if output is not None:
        write_rows(output, rows)
    if json_output:
        facts = {"instruction": instruction, "num_steps": loaded.num_steps, "v_measure": v_measure, "clusters": groups}
        print(json.dumps(facts | ({} if output is not None else {"results": rows}), ensure_ascii=False))
        return
    console = Console(highlight=False, soft_wrap=True)
    for group, members in zip(groups, spokesmen, strict=True):
        head = f"[bold]{group['cluster']:>3}[/]  {group['size']:>6,} texts"
        console.print(
            f"{head}  [bold]{printable(', '.join(group['said']))}[/]  [dim]{printable(', '.join(group['words']))}[/]"
        )
        for row in members[:EXAMPLES]:
            name = printable(given.ids[row])
            console.print(f"       [cyan]{name}[/]  {printable(shortened(given.texts[row]))}")
    if v_measure is not None:
        console.print(f"v-measure {v_measure:.3f} of {len(rows):,}")
