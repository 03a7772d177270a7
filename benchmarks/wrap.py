"""tinyshakespeare, bytes: three passes of a stack against one, and against three times the layers. Loss and CPU time.

The recipe is that of the benchmark `shakespeare`, but for the depth.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Table
from benchmarks.shakespeare import model_of, opened, train
from pretrain.config import WrapConfig

PASSES, DEPTH = 3, 2
ARMS: dict[str, dict[str, Any]] = {
    "once": {"depth": DEPTH},
    "three passes": {"depth": DEPTH, "wrap": WrapConfig(passes=PASSES)},
    "three passes, all trained": {"depth": DEPTH, "wrap": WrapConfig(passes=PASSES, loss="mean_all")},
    "three times the layers": {"depth": PASSES * DEPTH},
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--file", type=Path, default=Path("tinyshakespeare.txt"), help="1,115,394 characters of it")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--mixer", default="correlation")


def run(options: argparse.Namespace) -> Table:
    """Train every arm with every seed and return the table."""
    torch.set_num_threads(1)
    table = Table(f"tinyshakespeare, bytes, {options.steps} steps, {DEPTH} blocks of {options.mixer}: held-out loss")
    losses: dict[str, list[float]] = {name: [] for name in ARMS}
    with opened(options.file) as dataset:
        for seed in range(options.seeds):
            for name, keys in ARMS.items():
                began = time.process_time()
                config = model_of(options.mixer).model_copy(update=keys)
                loss, parameters = train(dataset, config, seed, options.steps)
                spent = time.process_time() - began
                losses[name].append(loss)
                print(f"seed {seed} {name}: {loss:.4f} nats, {parameters:,} parameters, {spent:.0f} CPU s", flush=True)
                table.add(f"{name}, seed {seed}", loss, "nats", note=f"{parameters:,} parameters, {spent:.0f} CPU s")
    for name, values in losses.items():
        table.add(f"{name}, mean of {options.seeds} seeds", statistics.mean(values), "nats")
    return table
