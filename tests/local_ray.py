"""A Ray on this machine, for tests that are run alone (pytest -m ray)."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest


def start_ray() -> Any:
    """A Ray of two processors on this machine, whose workers find the tests."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}},
    )
    return ray
