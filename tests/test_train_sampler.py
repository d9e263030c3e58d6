"""Whose turn it is: with candidates of all processes, every process has the same source at every step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from sentence_transformers.base.sampler import DefaultBatchSampler, ProportionalBatchSampler
from torch.utils.data import ConcatDataset, RandomSampler

from gircse.errors import GircseError
from gircse.train import run
from gircse.train.data import SameSourceBatches, steps_an_epoch
from gircse.train.plan import plan_training
from gircse.train.recipe import load_recipe
from tests.training_recipe import values, write, write_rows

SIZES = {"a": 43, "b": 15, "c": 28}
BATCH = 4


def sampler(kind: Any, **options: Any) -> Any:
    """As the trainer makes it: one generator for the order of sources and of rows."""
    sources: list[Any] = [[name] * size for name, size in SIZES.items()]
    generator = torch.Generator().manual_seed(7)
    orders: list[Any] = [RandomSampler(rows, generator=generator) for rows in sources]
    own = [DefaultBatchSampler(order, batch_size=BATCH, drop_last=True) for order in orders]
    return kind(ConcatDataset(sources), batch_samplers=own, generator=generator, seed=7, **options)


def source_of(batch: list[int]) -> str:
    names = [name for name, size in SIZES.items() for _ in range(size)]
    found = {names[row] for row in batch}
    assert len(found) == 1, "a batch holds one source"
    return found.pop()


def test_with_one_process_the_order_is_the_librarys() -> None:
    ours, theirs = sampler(SameSourceBatches), sampler(ProportionalBatchSampler)
    assert len(ours) == len(theirs)
    for epoch in (0, 1):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert list(ours) == list(theirs)


@pytest.mark.parametrize("processes", [2, 3])
def test_all_processes_have_the_same_source_at_every_step(processes: int) -> None:
    shards = []
    for rank in range(processes):
        batches = sampler(SameSourceBatches, processes=processes)
        shard = BatchSamplerShard(batches, num_processes=processes, process_index=rank, even_batches=False)
        shards.append(list(shard))
        assert len(shard) == len(shards[-1]) == len(batches) // processes
    steps = list(zip(*shards, strict=True))
    for step in steps:
        assert len({source_of(batch) for batch in step}) == 1
    rows = [row for step in steps for batch in step for row in batch]
    assert len(rows) == len(set(rows)), "no row twice"
    counts = [sum(source_of(step[0]) == name for step in steps) for name in SIZES]
    assert counts == [size // BATCH // processes for size in SIZES.values()]


def test_the_librarys_order_would_mix_sources() -> None:
    """What this is for; should it fail, the class above is no longer needed."""
    shards = [list(BatchSamplerShard(sampler(ProportionalBatchSampler), 2, rank)) for rank in (0, 1)]
    assert any(source_of(a) != source_of(b) for a, b in zip(*shards, strict=True))


def test_steps_are_those_of_a_process(tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path)
    content = values(tmp_path, backbone)
    content["data"]["sources"][0]["examples"] = 20
    recipe = load_recipe(write(tmp_path, content))
    examples = {"rows/a": 20, "rows/b": 8}
    assert [steps_an_epoch(recipe, examples, processes) for processes in (1, 2, 3)] == [7, 3, 2]
    content["training"]["gather_across_devices"] = True
    recipe = load_recipe(write(tmp_path, content))
    assert [steps_an_epoch(recipe, examples, processes) for processes in (1, 2)] == [7, 2 + 1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert plan_training(recipe).steps == 3
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(GircseError, match=r"rows/b: .* 3 batches of 4 rows from one source, and 8 examples make fewer"):
        plan_training(recipe)


def test_the_trainer_uses_it_where_candidates_are_shared(tmp_path: Path, backbone: Path) -> None:
    content = values(tmp_path, backbone)
    chosen = run._arguments(load_recipe(write(tmp_path, content)), tmp_path).multi_dataset_batch_sampler
    assert not isinstance(chosen, partial)
    content["training"]["gather_across_devices"] = True
    arguments = run._arguments(load_recipe(write(tmp_path, content)), tmp_path)
    chosen = arguments.multi_dataset_batch_sampler
    assert isinstance(chosen, partial)
    assert chosen.func is SameSourceBatches
    assert chosen.keywords == {"processes": 1}
    assert "multi_dataset_batch_sampler" not in arguments.to_dict(), "the checkpoint's JSON has no word for it"
