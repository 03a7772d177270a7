"""One rank that measures what the simulation of a run is made of: `python -m benchmarks.simulate_probe FOLDER`.

It builds the objects of a rank as a run does, trains some steps, and prints CPU seconds of each part, the collectives
of a step, and what a collective costs. Rank 0 prints; nothing of a supervised run is measured here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.load import load
from data_pipeline.dataset import open_dataset
from data_pipeline.loader import Loader
from data_pipeline.order import Order
from pretrain.config import RunConfig
from pretrain.health import Heartbeat
from pretrain.run import leave
from pretrain.run_folder import RunFolder
from pretrain.session import Session

STEPS, WARM = 12, 2
SMALL_ROUNDS, LARGE_ROUNDS, LARGE_BYTES = 200, 8, 8 << 20
LOOKS_OF_A_MODULE = 3
"""Python looks whether its file is there, at its size and time, and opens what it compiled of it."""
REDUCING = ("all_reduce", "reduce", "reduce_scatter_tensor", "broadcast")
GATHERING = ("all_gather_into_tensor", "all_gather")


def main(folder: Path) -> None:
    """Measure, and print JSON on rank 0."""
    collectives: dict[str, list[int]] = {}
    _listen(collectives)
    found: dict[str, Any] = {"start_cpu": time.process_time()}
    config = load(RunConfig, [RunFolder(folder).config])
    began = time.process_time()
    dataset = open_dataset(config.data)
    found["data_cpu"] = time.process_time() - began
    began = time.process_time()
    session = Session(RunFolder(folder), config, Heartbeat(None))
    found["ready_cpu"] = time.process_time() - began
    found["groups"] = collectives.pop("new_group", [0])[0] + 1
    collectives.clear()
    weights = {name: source.weight for name, source in config.data.sources.items()}
    order = Order(dataset.manifest, length=config.model.length, seed=0, weights=weights)
    ranks, rows = session.ranks, config.train.batch_rows
    loader = Loader(
        order, dataset.shards, batch_rows=rows, micro_rows=session.micro, rank=ranks.rank, world=ranks.world
    )
    steps = []
    for step in range(STEPS):
        began = time.process_time()
        session.engine.step(loader.next(), step, 1.0)
        steps.append(time.process_time() - began)
    loader.close()
    found |= {"start_bytes": _read_so_far(), "start_looks": LOOKS_OF_A_MODULE * len(sys.modules)}
    found |= {"first_cpu": steps[0], "step_cpu": steps[WARM:], "collectives": _a_step(collectives)}
    found["state_bytes"] = sum(4 * f.tensor.numel() for f in session.engine.state().fragments)
    found["parameters"] = session.cost.parameters
    if ranks.world > 1:
        found |= _costs()
    if ranks.first:
        print(json.dumps(found), flush=True)
    session.close()


def _read_so_far() -> int:
    """Bytes that this process has read, and those of mapped files that it has touched."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"]) + 1024 * int(status["RssFile"].split()[0])


def _listen(collectives: dict[str, list[int]]) -> None:
    """Count calls and bytes of every collective that goes through torch.distributed."""
    for name in (*REDUCING, *GATHERING, "new_group"):
        setattr(dist, name, _counted(name, getattr(dist, name), collectives))


def _counted(name: str, of: Callable[..., Any], collectives: dict[str, list[int]]) -> Callable[..., Any]:
    @wraps(of)
    def call(*words: Any, **named: Any) -> Any:
        tensors = [t for t in (*words, *named.values()) if isinstance(t, torch.Tensor)]
        tally = collectives.setdefault(name, [0, 0])
        tally[0] += 1
        tally[1] += max((t.nbytes for t in tensors), default=0)
        return of(*words, **named)

    return call


def _a_step(collectives: dict[str, list[int]]) -> dict[str, list[float]]:
    return {name: [number / STEPS for number in tally] for name, tally in collectives.items()}


def _costs() -> dict[str, float]:
    """What a small collective takes, and what a large one costs its rank for every byte that it moves."""
    small, large = torch.zeros(1), torch.zeros(LARGE_BYTES // 4)
    dist.all_reduce(small)
    began = time.perf_counter()
    for _ in range(SMALL_ROUNDS):
        dist.all_reduce(small)
    latency = (time.perf_counter() - began) / SMALL_ROUNDS
    dist.all_reduce(large)
    cpu = time.process_time()
    for _ in range(LARGE_ROUNDS):
        dist.all_reduce(large)
    world = dist.get_world_size()
    moved = 2 * (world - 1) / world * LARGE_BYTES * LARGE_ROUNDS
    return {"latency_s": latency / (2 * (world - 1)), "byte_cpu": (time.process_time() - cpu) / moved}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
