"""A driver of `gircse embed --ray` to be killed: python -m tests.ray_driver CORPUS FOLDER PIDS."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.local_ray import start_ray
from tests.test_ray import SlowModel, on_ray

if __name__ == "__main__":
    corpus, folder, pids = map(Path, sys.argv[1:])
    start_ray()
    on_ray(corpus, folder, SlowModel(pids, 0.5))
