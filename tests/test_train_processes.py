"""Two processes train one model, on CPUs too, and end together where a time limit ends them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_recipe import values, write, write_rows


@pytest.mark.parametrize(("whole", "max_minutes"), [(False, None), (False, 0.0001), (True, None)])
def test_processes_of_torchrun_share_the_batches(
    tmp_path: Path, backbone: Path, whole: bool, max_minutes: float | None
) -> None:
    write_rows(tmp_path)
    content = values(tmp_path, backbone)
    if whole:  # a head of its own, which gets no gradient then: no process may wait for it
        content |= {"lora": None, "loss": {"soft_token_gradients": "none"}}
    content["training"] |= {"gather_across_devices": True, "max_minutes": max_minutes, "trackers": []}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "gircse", "train", str(write(tmp_path, content)), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logged = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in logged if "loss" in entry]
    assert steps == ([1] if max_minutes else [1, 2, 3]), "six batches of four rows, two a step, each logged once"
    assert done.stderr.count("saved to") == 1
    assert (tmp_path / "out" / ("model.safetensors" if whole else "adapter_model.safetensors")).is_file()
