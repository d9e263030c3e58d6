"""The model that ships, over the real 135M backbone: a few paths from text to vector."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from gircse.cli import app
from gircse.cli.demo import load_corpus
from gircse.errors import UsageError
from gircse.model import GIRCSE, pretrained_path
from gircse.pooling import pool_steps
from gircse.refiner import recompute_states

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_same_text_same_vector(shipped: GIRCSE) -> None:
    texts = [passage["text"] for passage in load_corpus()][:64]
    prompt = shipped.format_instruction("Represent the topic")
    together = shipped.encode(texts, prompt=prompt)
    alone = np.stack([shipped.encode(text, prompt=prompt) for text in texts[::16]])
    assert cosines(alone, together[::16]).min() >= 0.99999
    assert cosines(shipped.encode(texts[::-1], prompt=prompt, batch_tokens=500)[::-1], together).min() >= 0.99999


def test_it_equals_the_recompute_loop(shipped: GIRCSE) -> None:
    texts = ["Lions live in prides.", "Which organ pumps blood through the body, and how often a minute?"]
    features = shipped.preprocess(texts, prompt=shipped.prompts["query"])
    with torch.no_grad():
        states = recompute_states(
            shipped.encoder.decoder, features["input_ids"], features["attention_mask"], num_steps=4
        )
    expected = pool_steps(states, shipped.encoder.refinement.pooling).numpy()
    steps = shipped.encode_steps(texts, num_steps=4, prompt_name="query")
    assert cosines(steps, expected).min() >= 0.99999
    assert cosines(steps[:, 0], steps[:, 3]).max() < 0.9999


def test_bfloat16_stays_close(shipped: GIRCSE) -> None:
    """Promise 1: cosine of at least 0.999 between bfloat16 batches, whatever their size."""
    model = GIRCSE(device="cpu", dtype=torch.bfloat16)
    texts = [passage["text"] for passage in load_corpus()][:8]
    together = model.encode(texts)
    alone = np.stack([model.encode(text) for text in texts])
    assert cosines(together, alone).min() >= 0.999
    assert cosines(together, shipped.encode(texts)).min() >= 0.99


def test_8_bit_weights_stay_close(shipped: GIRCSE) -> None:
    """Promise 1 as in float32: inputs of whole steps of 8 bits alone would give the same text 0.998."""
    try:
        model = GIRCSE(device="cpu").quantize_weights()
    except UsageError as error:
        pytest.skip(str(error))
    texts = [passage["text"] for passage in load_corpus()][:8]
    together = model.encode(texts)
    alone = np.stack([model.encode(text) for text in texts])
    assert cosines(together, alone).min() >= 0.99999
    assert cosines(together, shipped.encode(texts)).min() >= 0.99


def test_another_library_loads_it(shipped: GIRCSE) -> None:
    theirs = SentenceTransformer(pretrained_path(), trust_remote_code=True, device="cpu")
    texts = ["Lions live in prides.", "Rome lies on the Tiber."]
    assert cosines(theirs.encode_query(texts), shipped.encode_query(texts)).min() >= 0.99999


def test_the_checkpoint_says_where_it_comes_from() -> None:
    folder = Path(pretrained_path())
    config = json.loads((folder / "gircse_config.json").read_text())
    assert config["backbone"]["name"] == "smollm2-135m"
    assert config["weights"] == "adapter"
    recipe = yaml.safe_load(Path("recipes/smollm2-135m-passages.yaml").read_text())
    trained = config["training"]["recipe"]
    assert [trained[key] for key in ("seed", "start_from")] == [recipe.get(key) for key in ("seed", "start_from")]
    assert [source["task"] for source in trained["data"]["sources"]] == [s["task"] for s in recipe["data"]["sources"]]
    first = config["training"]["start"]["training"]["recipe"]
    started = yaml.safe_load(Path("recipes/smollm2-135m.yaml").read_text())
    assert (first["seed"], first["start_from"]) == (started["seed"], None)
    card = (folder / "README.md").read_text()
    for source in [*first["data"]["sources"], *trained["data"]["sources"]]:
        assert source["file"] in card
        assert source["licence"] in card
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= 25_000_000


def test_it_learns_further_from_pairs_of_ones_own(shipped: GIRCSE, tmp_path: Path) -> None:
    """As docs/training.md has it: eight pairs that only practice tells, sixteen passes."""
    words = ["bree", "dalf", "gorm", "hask", "jurn", "kelp", "lomt", "mirv"]
    colours = ["red", "green", "blue", "black", "white", "yellow", "brown", "grey"]
    pairs = [{"query": f"What colour is a {w}?", "pos": f"It is {c}."} for w, c in zip(words, colours, strict=True)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = {"training.batch_size": 8, "training.epochs": 16, "training.random_steps": "null"}
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    call = ["train", "recipes/own-data.yaml", "--data", str(tmp_path), "-o", str(tmp_path / "out"), *changes]
    result = CliRunner().invoke(app, call, catch_exceptions=False)
    assert result.exit_code == 0

    def found(model: GIRCSE) -> int:
        queries, passages = [pair["query"] for pair in pairs], [pair["pos"] for pair in pairs]
        best = model.similarity(model.encode_query(queries), model.encode_document(passages)).argmax(dim=1)
        return int((best == torch.arange(len(pairs))).sum())

    assert found(GIRCSE(str(tmp_path / "out"), device="cpu")) >= found(shipped) + 4
