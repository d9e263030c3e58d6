"""The card of a saved model says what it is and whose data it saw, and shows none of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import metadata_load
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from gircse.checksum import vectors_checksum
from gircse.losses import ICRLoss
from gircse.model import GIRCSE
from gircse.train.recipe import Recipe
from gircse.train.run import train
from tests.training_recipe import ROWS, values, write_rows


def test_card_of_a_recipe_has_every_source_and_no_row(tmp_path: Path, backbone: Path) -> None:
    write_rows(tmp_path)
    content = values(tmp_path, backbone)
    content["data"]["sources"][1]["licence"] = "CC BY 4.0"
    content["training"]["random_steps"] = [1, 3]
    train(Recipe(**content), tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| rows | a | 16 | x |" in card
    assert "| rows | b | 8 | CC BY 4.0 |" in card
    assert "writes 2 soft tokens" in card
    assert "1 to 3 soft tokens" in card
    assert "24 examples" in card
    assert "LoRA adapter, r = 2, alpha = 4" in card
    assert "2509.24291" in card.split("```bibtex")[1]
    assert not any(row["query"] in card or row["pos"][0] in card for row in ROWS)
    assert len(card) < 5000
    assert "sentence-transformers' trainer" not in card, "the recipe's sources once"
    assert "gircse" in (metadata_load(tmp_path / "run" / "README.md") or {})["tags"]


def test_card_of_a_recipes_model_that_another_trainer_went_on_with_has_both(tmp_path: Path, backbone: Path) -> None:
    write_rows(tmp_path)
    train(Recipe(**values(tmp_path, backbone)), tmp_path / "run")
    model = GIRCSE(str(tmp_path / "run"), device="cpu")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    rows = Dataset.from_dict({"anchor": ["a secret", "b"], "positive": ["c", "d"]})
    arguments = SentenceTransformerTrainingArguments(str(tmp_path / "more"), max_steps=1, report_to="none")
    SentenceTransformerTrainer(model, arguments, {"pairs": rows}, loss=ICRLoss(model)).train()
    model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| rows | a | 16 | x |" in card
    assert "After that by sentence-transformers' trainer" in card
    assert "| pairs | 2 |" in card


def test_card_of_a_model_trained_further_has_what_its_start_learned_from(tmp_path: Path, backbone: Path) -> None:
    """With the licence that the start's card states, and of every start before it."""
    write_rows(tmp_path)
    content: dict[str, Any] = values(tmp_path, backbone)
    content["data"]["sources"] = [{"file": "rows", "task": "a", "licence": "CC BY 4.0"}]
    train(Recipe(**content), tmp_path / "first")
    first = tmp_path / "first" / "README.md"
    first.write_text(first.read_text().replace("---\n", "---\nlicense: cc-by-sa-4.0\n", 1))
    start = GIRCSE(str(tmp_path / "first"), device="cpu")
    content["data"] |= {"sources": [{"file": "rows", "task": "b", "licence": "MIT"}], "examples": 8}
    for name, before in (("second", "first"), ("third", "second")):
        train(Recipe(**content, start_from=str(tmp_path / before)), tmp_path / name)
    facts = GIRCSE(str(tmp_path / "second"), device="cpu").encoder.training_facts["start"]
    assert facts["vectors_sha256"] == vectors_checksum(start.encoder)
    assert facts["licence"] == "cc-by-sa-4.0"
    assert facts["training"] == start.encoder.training_facts
    card = (tmp_path / "second" / "README.md").read_text()
    assert "| rows | b | its share of 8 | MIT |" in card
    assert f"started from, `{tmp_path / 'first'}` (licence cc-by-sa-4.0, sha256 of what its vectors depend on" in card
    assert "had learned from these:\n\n| source | task |" in card
    assert "| rows | a | all | CC BY 4.0 |" in card
    assert "not listed here" not in card
    card = (tmp_path / "third" / "README.md").read_text()
    assert card.count("The model that it started from, ") == 2
    assert card.count("CC BY 4.0") == 1


def test_card_of_another_trainers_run_has_its_data_sets_by_name_and_size(tmp_path: Path, backbone: Path) -> None:
    model = GIRCSE.from_backbone(str(backbone), num_steps=0, full_finetune=True)
    rows = Dataset.from_dict({"anchor": ["a secret", "b"], "positive": ["c", "d"]})
    arguments = SentenceTransformerTrainingArguments(str(tmp_path / "run"), max_steps=1, report_to="none")
    SentenceTransformerTrainer(model, arguments, {"pairs": rows}, loss=ICRLoss(model)).train()
    model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| pairs | 2 |" in card
    assert "without soft tokens" in card
    assert "| weights | all of them |" in card
    assert "secret" not in card


def test_card_of_an_untrained_model_says_so_and_names_a_backbone_of_the_hub(tmp_path: Path, backbone: Path) -> None:
    model = GIRCSE.from_backbone(str(backbone), pooling="last")
    model.encoder.reference = type(model.encoder.reference)("someone/decoder", "0" * 64, "mit")
    model.save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert "None by this package." in card
    assert "the hidden state of the last is the embedding" in card
    assert "licence mit" in card
    assert (metadata_load(tmp_path / "README.md") or {})["base_model"] == "someone/decoder"
