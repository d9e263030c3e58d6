"""`gircse serve` under load: every answer checked against the library, none lost, speed, latency and memory.

    python benchmarks/serve_load.py --duration 600 --clients 32 --output benchmarks/results/serve_load.json

Many clients with mixed sizes and K; some are killed in mid-request, one batch is made to fail, and the server is
restarted after a tenth of the time. Client and server share the machine, so the server's throughput is understated. The
library's own speed is measured before and after the load, and the mean taken: the speed of shared machines drifts.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import math
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import psutil
from arguments import output_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SIZES = (1, 1, 1, 1, 2, 4, 8, 16, 48)
STEPS = (0, 1, 2, 5, 8)
TOLERANCE = {"float32": 0.99999, "bfloat16": 0.9995}
QUERY = "how do plants eat?"
FAIL_VARIABLE = "SERVE_LOAD_FAIL_BATCH"


@dataclass
class Tally:
    """What the clients saw."""

    tolerance: float
    measured_from: float = 0.0
    until: float = math.inf
    counts: Counter[str] = field(default_factory=Counter)
    worst: float = 1.0
    latencies: dict[int, list[float]] = field(default_factory=dict)
    done: list[tuple[float, int]] = field(default_factory=list)  # when, tokens with K
    problems: list[str] = field(default_factory=list)


class Server:
    """The server's process, on a port that stays the same over restarts."""

    def __init__(self, arguments: list[str], fail_batch: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, __file__, "--as-server", "serve", "--port", str(self.port), *arguments]
        self.environment = {**os.environ, FAIL_VARIABLE: str(fail_batch)}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it is ready."""
        self.process = subprocess.Popen(self.command, env=self.environment, stderr=subprocess.DEVNULL)
        while True:
            assert self.process.poll() is None, "the server does not start; run its command by hand"
            try:
                if httpx.get(self.url + "/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)

    def rss(self) -> int:
        """Resident bytes."""
        assert self.process is not None
        return psutil.Process(self.process.pid).memory_info().rss


def as_server(arguments: list[str]) -> None:
    """The real command line, with one batch that fails."""
    from gircse.cli import main
    from gircse.serve.engine import ModelBackend

    fail, embed, batches = int(os.environ[FAIL_VARIABLE]), ModelBackend.embed, iter(range(1, sys.maxsize))

    def failing(self: ModelBackend, *given: Any) -> np.ndarray:
        if next(batches) == fail:
            raise RuntimeError("injected")
        return embed(self, *given)

    ModelBackend.embed = failing  # type: ignore[method-assign]
    sys.argv = ["gircse", *arguments]
    main()


async def client(
    seed: int, server: Server, texts: list[str], lengths: list[int], expected: dict[int, np.ndarray], tally: Tally,
    kill: float,
) -> None:  # fmt: skip
    """One client: send, check, send again; a request is repeated until it is answered."""
    chance = random.Random(seed)
    async with httpx.AsyncClient(timeout=600) as http:
        while time.monotonic() < tally.until:
            rows = [chance.randrange(len(texts)) for _ in range(chance.choice(SIZES))]
            steps = chance.choice(list(expected))
            body = {"input": [texts[row] for row in rows], "num_steps": steps, "encoding_format": "base64"}
            if chance.random() < kill:
                try:
                    await asyncio.wait_for(http.post(server.url + "/v1/embeddings", json=body), chance.random() * 0.5)
                except (TimeoutError, httpx.TransportError):
                    tally.counts["killed"] += 1
                continue
            tally.counts["sent"] += 1
            sent = time.monotonic()
            while True:
                try:
                    response = await http.post(server.url + "/v1/embeddings", json=body)
                except httpx.TransportError:  # the server restarts
                    tally.counts["repeated"] += 1
                    await asyncio.sleep(0.2)
                    continue
                if response.status_code not in (429, 503):
                    break
                tally.counts[str(response.status_code)] += 1
                await asyncio.sleep(float(response.headers.get("retry-after", 1)))
            now = time.monotonic()
            check(response, rows, expected[steps], tally)
            tally.latencies.setdefault(len(rows), []).append(now - sent)
            tally.done.append((now, sum(lengths[row] + steps for row in rows)))


def check(response: httpx.Response, rows: list[int], expected: np.ndarray, tally: Tally) -> None:
    """Compare every vector with the library's for that text and K."""
    if response.status_code != 200:
        tally.problems.append(f"{response.status_code}: {response.text[:200]}")
        return
    data = response.json()["data"]
    found = np.stack([np.frombuffer(base64.b64decode(item["embedding"]), dtype="<f4") for item in data])
    cosines = (found * expected[rows]).sum(axis=1)
    tally.worst = min(tally.worst, float(cosines.min()))
    if len(data) != len(rows) or cosines.min() < tally.tolerance:
        tally.problems.append(f"a vector differs: cosine {cosines.min():.6f}")
    tally.counts["answered"] += 1
    tally.counts["texts"] += len(rows)


async def load(
    options: argparse.Namespace, server: Server, texts: list[str], lengths: list[int], expected: dict[int, np.ndarray]
) -> tuple[Tally, list[tuple[float, int]]]:
    """Run the clients, restart the server, then watch its memory; also returns (time, resident bytes)."""
    tally = Tally(TOLERANCE[options.dtype])
    clients = [
        asyncio.create_task(client(seed, server, texts, lengths, expected, tally, options.kill))
        for seed in range(options.clients)
    ]
    await asyncio.sleep(options.duration / 10)
    tally.counts["exit code after SIGTERM"] = await asyncio.to_thread(server.stop)
    await asyncio.to_thread(server.start)
    tally.measured_from = time.monotonic()
    tally.until = tally.measured_from + options.duration
    memory = []
    while time.monotonic() < tally.until:
        memory.append((time.monotonic(), server.rss()))
        await asyncio.sleep(1)
    await asyncio.gather(*clients)
    return tally, memory


def offline(model: Any, texts: list[str], steps: list[int], lengths: list[int]) -> tuple[dict[int, np.ndarray], float]:
    """The library's vectors for every K, and its tokens a second (K included)."""
    model.encode(texts[:8])
    started = time.monotonic()
    expected = {k: model.encode(texts, num_steps=k, normalize_embeddings=True) for k in steps}
    tokens = sum(sum(lengths) + k * len(texts) for k in steps)
    return expected, tokens / (time.monotonic() - started)


def lone_latency(server: Server, model: Any, rounds: int) -> tuple[float, float]:
    """Median seconds of a short query: over HTTP on an idle server, and by calling the model."""
    with httpx.Client(timeout=60) as http:

        def ask() -> None:
            http.post(server.url + "/v1/embeddings", json={"input": QUERY, "encoding_format": "base64"})

        medians = []
        for function in (ask, lambda: model.encode(QUERY)):
            times = []
            for _ in range(rounds + 2):
                started = time.monotonic()
                function()
                times.append(time.monotonic() - started)
            medians.append(statistics.median(times[2:]))
    return medians[0], medians[1]


def metric(server: Server, name: str) -> float:
    """A counter of the server's."""
    found = re.search(rf"^{re.escape(name)} (\S+)", httpx.get(server.url + "/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def main() -> None:
    """Measure, print a table, write JSON; exit 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration", type=float, default=600, help="seconds of load")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--texts", type=int, default=96, help="passages of the demo corpus")
    parser.add_argument("--max-characters", type=int, default=10_000, help="cut the passages, for tiny models")
    parser.add_argument("--kill", type=float, default=0.02, help="share of requests whose client is killed")
    parser.add_argument("--fail-batch", type=int, default=20, help="the batch that fails, after each start; 0: none")
    parser.add_argument("--model", help="the shipped model where not given")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32", help="of the server and the library")
    parser.add_argument("--max-num-steps", type=int, default=20)
    parser.add_argument("--output", type=output_file, help="where to write JSON")
    options = parser.parse_args()

    import torch

    from gircse.cli.demo import load_corpus
    from gircse.model import GIRCSE

    model = GIRCSE(options.model, device="cpu", dtype=getattr(torch, options.dtype)).pack_weights()  # as served
    texts = [passage["text"][: options.max_characters] for passage in load_corpus()][: options.texts]
    lengths = [len(ids) for ids in model.tokenize_texts(texts).ids]
    steps = [k for k in STEPS if k <= options.max_num_steps]
    expected, offline_speed = offline(model, texts, steps, lengths)

    arguments = ["--max-num-steps", str(options.max_num_steps), *(["--model", options.model] if options.model else [])]
    server = Server([*arguments, "--device", "cpu", "--dtype", options.dtype], options.fail_batch)
    server.start()
    served, direct = lone_latency(server, model, 20)
    tally, memory = asyncio.run(load(options, server, texts, lengths, expected))
    failed_batches = metric(server, "gircse_batch_failures_total")
    code = server.stop()
    offline_speed = (offline_speed + offline(model, texts, steps, lengths)[1]) / 2

    finished = [(when, tokens) for when, tokens in tally.done if when > tally.measured_from]
    speed = sum(tokens for _, tokens in finished) / (max(when for when, _ in finished) - tally.measured_from)
    settled = memory[len(memory) // 4 :]
    early = max(rss for _, rss in settled[: len(settled) // 3])
    late = max(rss for _, rss in settled[-(len(settled) // 3) :])
    result = {
        "duration": options.duration,
        "clients": options.clients,
        "model": options.model or "shipped",
        "dtype": options.dtype,
        **tally.counts,
        "problems": len(tally.problems),
        "worst cosine": tally.worst,
        "failed batches after the restart": failed_batches,
        "tokens/s offline": round(offline_speed, 1),
        "tokens/s served": round(speed, 1),
        "served / offline": round(speed / offline_speed, 3),
        "lone query ms, served": round(served * 1000, 1),
        "lone query ms, direct": round(direct * 1000, 1),
        "lone query ratio": round(served / direct, 3),
        "median s of 1 text under load": round(statistics.median(tally.latencies[1]), 3),
        "median s of 48 texts under load": round(statistics.median(tally.latencies.get(48, [0])), 3),
        "RSS MB early": round(early / 1e6, 1),
        "RSS MB late": round(late / 1e6, 1),
    }
    for name, value in result.items():
        print(f"{name:36} {value}")
    for problem in tally.problems[:5]:
        print("problem:", problem)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    lost = tally.counts["sent"] - tally.counts["answered"]
    sys.exit(1 if lost or tally.problems or code or tally.counts["exit code after SIGTERM"] else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-server"]:
        as_server(sys.argv[2:])
    else:
        main()
