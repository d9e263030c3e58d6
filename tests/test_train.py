"""Recipes are checked, data is drawn as they say, a stopped run goes on where it stood. Tiny models, real trainer."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import TrainerCallback

from gircse.errors import GircseError, UsageError
from gircse.fast.packed_weights import packing_library
from gircse.losses import CachedICRLoss, ICRLoss
from gircse.model import GIRCSE
from gircse.train.data import load_training_data, text_columns
from gircse.train.facts import training_facts
from gircse.train.plan import plan_training
from gircse.train.recipe import Recipe, check_trackers, chosen_trackers, load_recipe
from gircse.train.run import make_losses, make_model, train
from gircse.train.teacher import load_teacher
from tests.tiny import tiny_backbone, tiny_tokenizer
from tests.training_recipe import values, write, write_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainig": {}}, "unknown key trainig; did you mean training?"),
        ({"model": {"num_step": 3}}, "unknown key model.num_step; did you mean num_steps?"),
        ({"model": {"num_steps": -1}}, "model.num_steps: Input should be greater than or equal to 0"),
        ({"loss": {"temperature": 0}}, "loss.temperature"),
        ({"model": {"pooling": "max"}}, "model.pooling"),
        ({"loss": {"step_weights": "linear", "stepwise": False}}, "loss: step_weights weighs the losses of all steps"),
        ({"loss": {"detach_reference": True, "refinement_weight": 0}}, "loss: detach_reference is about the penalty"),
        ({"loss": {"prompt_step": True, "step_weights": "linear"}}, "loss: prompt_step is one of the steps"),
        (
            {"loss": {"prompt_step": True}, "model": {"num_steps": 0}},
            "loss.prompt_step makes the prompt's state a step too",
        ),
        (
            {"loss": {"soft_token_gradients": "none"}, "model": {"num_steps": 0}},
            "loss.soft_token_gradients are of soft tokens",
        ),
        (
            {"loss": {"teacher_pairs": "all"}},
            "loss: teacher_weight, teacher_temperature and teacher_pairs need a teacher",
        ),
        (
            {"model": {"num_steps": 0}, "training": {"random_steps": [1, 3], "batch_size": 4}},
            "training.random_steps draws how many soft tokens",
        ),
        ({"training": {"random_steps": [3, 1], "batch_size": 4}}, "the least and the largest K to draw"),
        ({"training": {"batch_size": 9}}, "rows/b: a batch holds one source, and 8 examples make none of 9"),
        ({"evaluation": {"tasks": ["a"], "evry": 1}}, "unknown key evaluation.evry; did you mean every?"),
        ({"data": None}, "data"),
        ({"loss": {"stepwise": False, "refinement_weight": 1.0}}, "loss: refinement_weight compares the losses of two"),
        ({"data.mixture_temperature": 2.0}, "data: mixture_temperature shares out data.examples; give that number"),
        ({"data.max_seq_length": 41}, "data.max_seq_length: 41 tokens are read in training, and 40"),
        ({"data.sources.0": {"teacher": "anchor", "negatives": 0}}, "rows/a: teacher: anchor needs a loss.teacher"),
        (
            {"data.sources.0": {"class_field": "label"}, "loss": {"teacher": "any"}},
            "rows/a: class_field is for sources without a teacher",
        ),
        ({"data.sources.1": {"class_field": "label"}}, "class_field is about other rows' positives"),
    ],
)
def test_wrong_recipes_are_refused_with_the_key(
    folder: Path, backbone: Path, change: dict[str, Any], message: str
) -> None:
    content = values(folder, backbone)
    for key, value in change.items():
        section, _, rest = key.partition(".")
        if rest.startswith("sources."):
            content["data"]["sources"][int(rest[-1])] |= value
        elif rest:
            content[section][rest] = value
        else:
            content[section] = value
    with pytest.raises(GircseError) as error:
        load_recipe(write(folder, content))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_source_key_gets_the_nearest_name(folder: Path, backbone: Path) -> None:
    content = values(folder, backbone)
    content["data"]["sources"][1]["negativs"] = 1
    with pytest.raises(GircseError, match=r"unknown key data.sources.1.negativs; did you mean negatives\?"):
        load_recipe(write(folder, content))


def test_a_source_that_is_there_twice_is_refused(folder: Path, backbone: Path) -> None:
    content = values(folder, backbone)
    content["data"]["sources"].append(content["data"]["sources"][0])
    with pytest.raises(GircseError, match="rows/a is there twice"):
        load_recipe(write(folder, content))


def test_replaced_values_are_told_by_key(folder: Path, backbone: Path) -> None:
    path = write(folder, values(folder, backbone))
    with pytest.raises(UsageError, match="query_instruction=a: b: c is no YAML value"):
        load_recipe(path, {"query_instruction": "a: b: c"})
    assert load_recipe(path, {"data.folder": Path("20261122")}).data.folder == Path("20261122")


def test_a_tracker_that_is_not_installed_is_told_at_once(
    folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = values(folder, backbone)
    content["training"]["trackers"] = ["wandb"]
    monkeypatch.setattr("gircse.train.recipe.find_spec", lambda name: None)
    for run in (plan_training, lambda recipe: train(recipe, folder / "out")):
        with pytest.raises(GircseError, match="wandb is not installed; pip install wandb"):
            run(load_recipe(write(folder, content)))


def test_logs_go_to_tensorboard_where_it_is_installed(
    folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = values(folder, backbone)
    for installed, expected in ((True, ["tensorboard"]), (False, [])):
        monkeypatch.setattr("gircse.train.recipe.find_spec", lambda name, found=installed: found or None)
        assert chosen_trackers(load_recipe(write(folder, content))) == expected
        check_trackers(load_recipe(write(folder, content)))
    monkeypatch.setattr("gircse.train.recipe.find_spec", lambda name: True)
    content["training"]["trackers"] = []
    assert chosen_trackers(load_recipe(write(folder, content))) == []


def test_trackers_are_told_the_loss_of_every_step(
    folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stand before our own callbacks in the trainer's list, and must be told after them."""
    seen: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda names: [Tracker])
    train(load_recipe(write(folder, values(folder, backbone))), folder / "out")
    assert {"step_loss_1", "step_loss_2", "tokens_per_second", "seconds_left"} <= set(seen[0])


def test_widths_above_the_backbones_are_refused(folder: Path, backbone: Path) -> None:
    content = values(folder, backbone) | {"loss": {"matryoshka_dims": [8, 33]}}
    recipe = load_recipe(write(folder, content))
    for run in (plan_training, make_model):
        with pytest.raises(GircseError, match=r"have 32 dimensions and cannot be cut to 33; name widths up to 32"):
            run(recipe)


def test_the_recipe_of_a_checkpoint_can_be_read_again(folder: Path, backbone: Path) -> None:
    """With every default written out, which must not count as asked for."""
    content = values(folder, backbone) | {"loss": {"stepwise": False}}
    facts = training_facts(load_recipe(write(folder, content)))["recipe"]
    facts["data"]["folder"] = "x"
    assert not Recipe.model_validate(facts).loss.stepwise


def test_no_negatives_at_all_is_refused(folder: Path, backbone: Path) -> None:
    content = values(folder, backbone)
    content["data"]["sources"][1]["negatives"] = 0
    with pytest.raises(GircseError, match="negatives must be 1 or more"):
        load_recipe(write(folder, content))


def test_a_model_to_start_from_is_missed_before_the_teacher_works(
    folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {**values(folder, backbone), "start_from": str(folder / "nowhere"), "loss": {"teacher": "any"}}
    monkeypatch.setattr("gircse.train.run.load_teacher", lambda name: pytest.fail("the teacher was loaded"))
    with pytest.raises(GircseError, match="nowhere is no saved GIRCSE model"):
        train(load_recipe(write(folder, content)), folder / "run")


def test_the_encoder_only_twin_of_random_steps_takes_one_option(
    folder: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = import_module("gircse.cli.train").train
    content = values(folder, backbone)
    content["training"] |= {"random_steps": [1, 3], "steps_distribution": "log_uniform"}
    content["loss"] = {"prompt_step": True, "soft_token_gradients": "bounded"}
    verb(write(folder, content), num_steps=0, dry_run=True, json_output=True)
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["num_steps"] == 0
    assert "soft_token_gradients" not in settings
    with pytest.raises(GircseError, match="num_steps: 0 writes none"):
        verb(write(folder, content), num_steps=0, dry_run=True, changes=["training.random_steps=[1, 2]"])


def test_the_verb_logs_the_loss_of_every_step(folder: Path, backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb = import_module("gircse.cli.train").train
    verb(write(folder, values(folder, backbone)), folder / "out", num_steps=3, json_output=True)
    shown = capsys.readouterr()
    assert json.loads(shown.out)["num_steps"] == 3, "nothing but the result on standard output"
    assert "step_loss_3" in shown.err
    logged = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert {"step_loss_1", "step_loss_2", "step_loss_3"} <= set(logged[0]), "--num-steps replaces the recipe's 2"
    own = [entry for entry in logged if "loss" in entry]
    assert {key for entry in own for key in entry if key.startswith("loss_of/")} == {"loss_of/rows/a", "loss_of/rows/b"}
    assert own[0]["loss_of/rows/a" if "loss_of/rows/a" in own[0] else "loss_of/rows/b"] == pytest.approx(
        sum(own[0][f"step_loss_{k}"] for k in (1, 2, 3)) / 3, abs=1e-3
    ), "a batch holds one source"


@pytest.mark.slow
def test_a_resumed_run_has_the_same_losses(folder: Path, backbone: Path) -> None:
    """Stopped in the middle and resumed = never stopped: losses of every step and the final weights."""
    recipe = load_recipe(write(folder, values(folder, backbone)))
    whole: list[dict[str, float]] = []
    model = train(recipe, folder / "whole", report=whole.append)

    class Stop(Exception):
        pass

    def stop_after_four(log: dict[str, float]) -> None:
        if log["step"] == 5:
            raise Stop

    with pytest.raises(Stop):
        train(recipe, folder / "broken", report=stop_after_four)
    (folder / "file").touch()
    with pytest.raises(UsageError, match="is a file; name a folder"):
        train(recipe, folder / "file")
    with pytest.raises(UsageError, match="--resume"):
        train(recipe, folder / "broken")
    (folder / "broken" / "checkpoints" / "checkpoint-6").mkdir()  # what a kill in mid-save leaves
    rest: list[dict[str, float]] = []
    resumed = train(recipe, folder / "broken", resume=True, report=rest.append)

    def losses(logs: list[dict[str, float]]) -> dict[float, float]:
        return {log["step"]: log["loss"] for log in logs if "loss" in log}

    assert sorted(losses(whole)) == [1, 2, 3, 4, 5, 6]
    assert sorted(losses(rest)) == [5, 6], "it went on from the last checkpoint"
    for step, loss in losses(rest).items():
        assert loss == pytest.approx(losses(whole)[step], rel=1e-4)
    assert {f"step_loss_{k}" for k in (1, 2)} <= set(whole[0])
    for (name, a), (_, b) in zip(model.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert (a - b).abs().max() <= 1e-5, name

    saved = GIRCSE(str(folder / "whole"), device="cpu")
    facts = saved.encoder.training_facts
    assert Recipe.model_validate(facts["recipe"] | {"data": facts["recipe"]["data"] | {"folder": "x"}}).seed == 3
    assert set(facts["data_sha256"]) == {"rows.jsonl.zst"}
    assert saved.max_seq_length == 40, "the training length is not the checkpoint's"


def test_recipe_options_reach_losses_model_and_optimiser(folder: Path, backbone: Path) -> None:
    content = values(folder, backbone)
    content["loss"] = {"stepwise": False, "false_negative_margin": 0.1, "matryoshka_dims": [8, 32], "temperature": 0.1}
    content["training"] |= {"micro_batch_size": 3, "gather_across_devices": True}
    content["data"]["sources"][1]["temperature"] = 0.3
    recipe = load_recipe(write(folder, content))
    model = make_model(recipe)
    losses = make_losses(recipe, model, ["rows/a", "rows/b"])
    assert all(type(loss) is CachedICRLoss and loss.mini_batch_size == 3 for loss in losses.values())
    first, second = losses.values()
    assert (first.in_batch_negatives, second.in_batch_negatives) == (True, False)
    assert (first.temperature, second.temperature) == (0.1, 0.3), "a source can have its own"
    assert (first.stepwise, first.false_negative_margin, first.matryoshka_dims) == (False, 0.1, (8, 32))
    assert first.gather_across_devices
    content["lora"], content["training"] = None, {"batch_size": 4, "dtype": "bfloat16"}
    recipe = load_recipe(write(folder, content))
    model = make_model(recipe)
    assert {type(loss) for loss in make_losses(recipe, model, ["rows/a"]).values()} == {ICRLoss}
    assert not model.encoder.has_adapter
    assert all(parameter.requires_grad and parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_micro_batches_train_the_same_model(folder: Path, backbone: Path, tmp_path: Path) -> None:
    """Cached gradients change the memory, not the run."""
    content = values(folder, backbone)
    for source in content["data"]["sources"]:
        source["examples"] = 4
    plain = train(load_recipe(write(folder, content)), tmp_path / "plain")
    content["training"]["micro_batch_size"] = 3
    cached = train(load_recipe(write(folder, content)), tmp_path / "cached")
    a, b = (torch.tensor(model.encode(["a cat", "some dogs"])) for model in (plain, cached))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_plan_counts_what_the_run_will_do(folder: Path, backbone: Path) -> None:
    content = values(folder, backbone)
    plan = plan_training(load_recipe(write(folder, content)))
    assert plan.examples == {"rows/a": 16, "rows/b": 8}
    assert (plan.steps, plan.columns) == (6, 4)
    assert sum(share for _, share in plan.histogram) == pytest.approx(1)
    model = make_model(load_recipe(write(folder, content)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.trained_parameters == trained
    assert plan.parameters == sum(p.numel() for n, p in model.named_parameters() if "lora" not in n)
    content["model"]["num_steps"] = 0
    encoder_only = plan_training(load_recipe(write(folder, content)))
    assert encoder_only.flops_per_step < plan.flops_per_step
    assert encoder_only.memory_bytes < plan.memory_bytes
    content["training"]["micro_batch_size"] = 2
    assert plan_training(load_recipe(write(folder, content))).memory_bytes < encoder_only.memory_bytes


def test_a_plan_counts_packed_copies_and_the_longest_texts(
    folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = values(folder, backbone)
    packed = plan_training(load_recipe(write(folder, content)))
    monkeypatch.setenv("GIRCSE_PACKED_WEIGHTS", "0")
    plan = plan_training(load_recipe(write(folder, content)))
    if packing_library(torch.float32) is not None and not torch.cuda.is_available():
        assert plan.memory_bytes < packed.memory_bytes
    content["data"]["max_seq_length"] = 24
    assert plan_training(load_recipe(write(folder, content))).memory_bytes < plan.memory_bytes


def test_a_plan_counts_what_bfloat16_keeps_in_float32(
    folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIRCSE_PACKED_WEIGHTS", "0")

    def memory(dtype: str, rows: int) -> float:
        content = values(folder, backbone)
        content["model"]["num_steps"] = 0
        content["training"] |= {"dtype": dtype, "micro_batch_size": rows}
        return plan_training(load_recipe(write(folder, content))).memory_bytes

    wide, narrow = (memory(dtype, 2) - memory(dtype, 1) for dtype in ("float32", "bfloat16"))  # of a row
    assert narrow > 0.6 * wide, "norms and attention stay in float32"


def test_set_replaces_values_of_the_recipe(folder: Path, backbone: Path) -> None:
    path = write(folder, values(folder, backbone))
    recipe = load_recipe(path, {"model.pooling": "last", "lora": "null", "loss.matryoshka_dims": "[8, 16]"})
    assert (recipe.model.pooling, recipe.lora, recipe.loss.matryoshka_dims) == ("last", None, [8, 16])
    with pytest.raises(GircseError, match=r"unknown key model.pool; did you mean pooling\?"):
        load_recipe(path, {"model.pool": "last"})
    with pytest.raises(GircseError, match="is a value, not a section"):
        load_recipe(path, {"seed.x": 1})
    verb = import_module("gircse.cli.train").train
    with pytest.raises(UsageError, match="KEY=VALUE"):
        verb(path, folder / "out", changes=["seed"])
    verb(path, folder / "out", changes=["model.num_steps=1"], json_output=True)
    assert GIRCSE(str(folder / "out"), device="cpu").num_steps == 1


@pytest.mark.parametrize("recipe", sorted(Path("recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_in_the_repository_is_valid(recipe: Path) -> None:
    load_recipe(recipe)


def test_k_is_drawn_for_every_batch(folder: Path, backbone: Path) -> None:
    """From the seed and the step alone; the model's own K is what it was."""
    content = values(folder, backbone)
    content["training"]["random_steps"] = [2, 5]

    def drawn(name: str) -> list[int]:
        logs: list[dict[str, float]] = []
        model = train(load_recipe(write(folder, content)), folder / name, report=logs.append)
        assert model.num_steps == GIRCSE(str(folder / name), device="cpu").num_steps == 2
        return [sum(key.startswith("step_loss_") for key in log) for log in logs if "loss" in log]

    first = drawn("first")
    assert len(first) == 6
    assert set(first) <= {2, 3, 4, 5}
    assert len(set(first)) > 1
    assert drawn("second") == first
    content["seed"] = 5
    assert drawn("third") != first


def test_a_gradient_that_is_no_number_stops_before_the_weights_are_spoilt(
    folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of step 5 is finite, its gradient is not; clipping would spread it to every weight."""
    contrast, calls = ICRLoss.contrast, iter(range(1, 9))

    def broken(self: ICRLoss, *arguments: Any) -> torch.Tensor:
        value = contrast(self, *arguments)
        return value if next(calls) < 5 else value + (value - value.detach()).sqrt()

    monkeypatch.setattr(ICRLoss, "contrast", broken)
    with pytest.raises(GircseError, match=r"gradient at step 5 is not finite.*checkpoint-4$"):
        train(load_recipe(write(folder, values(folder, backbone))), folder / "out")
    kept = GIRCSE(str(folder / "out" / "checkpoints" / "checkpoint-4"), device="cpu")
    assert all(bool(parameter.isfinite().all()) for parameter in kept.parameters())


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A SentenceTransformer that is none of ours: a table of vectors."""
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[StaticEmbedding(tiny_tokenizer(), embedding_dim=7)], device="cpu")
    model.save_pretrained(str(tmp_path / "teacher"))
    return tmp_path / "teacher"


def test_a_teacher_has_a_say_in_the_sources_that_let_it(
    folder: Path, backbone: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = values(folder, backbone)
    content["training"]["learning_rate"] = 1e-12  # all losses are the untrained model's
    recipe = load_recipe(write(folder, content))

    def losses(name: str) -> list[float]:
        logs: list[dict[str, float]] = []
        train(load_recipe(write(folder, content)), folder / name, report=logs.append)
        return [log["loss"] for log in logs if "loss" in log]

    alone = losses("alone")
    content["loss"] = {"teacher": str(teacher), "teacher_weight": 0.5, "teacher_temperature": 0.1}
    content["data"]["sources"][1]["teacher"] = False
    taught = load_recipe(write(folder, content))
    data = load_training_data(taught, load_teacher(str(teacher)))
    assert "the teacher reads" in capsys.readouterr().err, "for minutes, with a long recipe"
    assert text_columns(data["rows/b"]) == ["anchor", "positive", "negative_1", "negative_2"]
    assert np.array(data["rows/a"][:]["label"]).shape == (16, 3, 7)  # rows, columns, width
    assert data.keys() == load_training_data(recipe).keys()
    row = data["rows/a"][0]
    for column, label in zip(("anchor", "positive", "negative_1"), row["label"], strict=True):
        text = row[column].removeprefix("Instruct: do a\nQuery:")
        expected = SentenceTransformer(str(teacher), device="cpu").encode(text)
        assert label == pytest.approx(expected.tolist(), rel=1e-5), "the teacher reads no instructions"
    changed = [a != pytest.approx(b, rel=1e-3) for a, b in zip(alone, losses("taught"), strict=True)]
    assert sorted(changed) == [False] * 2 + [True] * 4, "two batches of b, four of a"


def test_a_teacher_reads_the_anchor_for_its_translation(folder: Path, backbone: Path, teacher: Path) -> None:
    content = values(folder, backbone)
    content["loss"] = {"teacher": str(teacher)}
    content["data"]["sources"] = [{**content["data"]["sources"][0], "negatives": 0, "teacher": "anchor"}]
    rows = load_training_data(load_recipe(write(folder, content)), load_teacher(str(teacher)))["rows/a"]
    labels = np.array(rows[:]["label"])
    assert labels.shape == (16, 2, 7)
    assert (labels[:, 0] == labels[:, 1]).all()
    assert len(np.unique(labels[:, 0], axis=0)) > 1
    content["data"]["sources"][0]["negatives"] = 1
    with pytest.raises(GircseError, match="teacher: anchor is for pairs of translations"):
        load_recipe(write(folder, content))


def test_training_goes_on_from_a_saved_adapter(folder: Path, backbone: Path) -> None:
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    saved = GIRCSE.from_backbone(str(backbone), num_steps=2, max_seq_length=30, lora=lora, device="cpu")
    saved.save_pretrained(str(folder / "saved"))
    content: dict[str, Any] = values(folder, backbone) | {"start_from": str(folder / "saved")}
    content["data"]["sources"] = content["data"]["sources"][:1]
    content["data"]["sources"][0]["examples"] = 4  # one batch, whose order does not matter
    content["training"]["warmup_steps"] = 0  # the only step is to move something
    recipe = load_recipe(write(folder, content))
    rows = load_training_data(recipe)["rows/a"][:]
    with torch.no_grad():
        expected = float(ICRLoss(saved)([saved.preprocess(rows[key]) for key in ("anchor", "positive", "negative_1")]))
    logs: list[dict[str, float]] = []
    trained = train(recipe, folder / "out", report=logs.append)
    assert logs[0]["loss"] == pytest.approx(expected, rel=1e-3)
    before, after = saved.state_dict(), trained.state_dict()
    moved = {name for name in before if (before[name] - after[name]).abs().max() > 1e-6}
    assert moved
    assert all("lora_" in name for name in moved)

    other = tiny_backbone(folder / "other", seed=5)
    with pytest.raises(GircseError, match="name the same backbone"):
        make_model(load_recipe(write(folder, content | {"backbone": str(other)})))
    for lora_changes in ({"r": 3, "alpha": 4}, {"r": 2, "alpha": 4, "dropout": 0.1}):
        with pytest.raises(GircseError, match="make them equal"):
            make_model(load_recipe(write(folder, content | {"lora": lora_changes})))


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed-zero2", "deepspeed-zero3"])
def test_accelerate_knows_every_key_of_its_configurations(name: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import DistributedType

    config = load_config_from_file(f"recipes/accelerate/{name}.yaml")  # refuses keys that it does not know
    assert isinstance(config, ClusterConfig)
    kinds = {"ddp": DistributedType.MULTI_GPU, "fsdp": DistributedType.FSDP}
    assert config.distributed_type == kinds.get(name, DistributedType.DEEPSPEED)
    assert config.mixed_precision in ("no", "bf16")
    nested = (config.fsdp_config or {}) | (config.deepspeed_config or {})  # these it would take unread
    assert bool(nested) == (name != "ddp")
    assert nested.keys() <= {action.dest for action in launch_command_parser()._actions}
