"""A step of eight small models run as one, against the eight in turn, and against one model of as many operations.

Forward, backward, clipping and AdamW on one thread, the same packed rows. `demo` is what a rank of `make demo` trains.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.common import Table, alternate, interval
from data_pipeline.batch import Batch, collate
from pretrain.config import EngineConfig, ModelConfig, OptimConfig, PartConfig
from pretrain.engine import Engine, TorchEngine
from pretrain.ensemble.config import EnsembleConfig
from pretrain.init import initialise
from pretrain.models.build import build

VOCAB, MODULES, GOAL = 257, ("python", "cpp", "english", "unicode"), 0.6
SIZES = {"demo": (48, 2, 4, 128), "half the length": (48, 2, 4, 64), "narrower": (32, 2, 4, 128),
         "rows x2": (48, 2, 8, 128)}  # fmt: skip
"""Width, depth, rows, tokens of a row."""
STEPS = 5


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=15)


def run(options: argparse.Namespace) -> Table:
    """Time every size and return the table."""
    torch.set_num_threads(1)
    table = Table("A step of the ensemble's eight models, CPU time: run as one against in turn")
    for name, (width, depth, rows, length) in SIZES.items():
        batch = _batch(rows, length)
        shape = {"width": width, "depth": depth, "length": length}
        apart = EnsembleConfig(modules=MODULES, fusion="uniform", couple_every=0)
        whole = EnsembleConfig(
            modules=MODULES, fusion="mhc", couple_heads=2, couple_lags=2, width=width, heads=2, lags=2
        )
        as_one, in_turn = _engine(shape, apart), [_engine(shape) for _ in range(8)]
        costly = _as_costly(shape, whole)
        everything, single = _engine(shape, whole), _engine(costly)
        arms: dict[str, Callable[[], None]] = {
            "as one": partial(_steps, [as_one], batch),
            "in turn": partial(_steps, in_turn, batch),
            "whole": partial(_steps, [everything], batch),
            "single": partial(_steps, [single], batch),
        }
        for arm in arms.values():
            arm()
        seconds = alternate(arms, options.rounds)
        ratio = interval([a / b for a, b in zip(seconds["as one"], seconds["in turn"])])
        size = f"width {width}, {depth} blocks, {rows} rows of {length}"
        goal = GOAL if name == "demo" else None
        table.add(f"{name}: eight as one / in turn", ratio.median, "x", goal=goal, spread=ratio, note=f"({size})")
        ratio = interval([a / b for a, b in zip(seconds["whole"], seconds["single"])])
        note = f"(width {costly['width']})"
        table.add(f"{name}: ensemble with couplings and fusion / one model of its FLOPs", ratio.median, "x",
                  spread=ratio, note=note)  # fmt: skip
    return table


def _steps(engines: list[Engine], batch: Batch) -> None:
    for step in range(STEPS):
        for engine in engines:
            engine.step([batch], step, 1.0)


def _engine(shape: dict[str, Any], ensemble: EnsembleConfig | None = None) -> Engine:
    model = build(_config(shape, ensemble), VOCAB).to_empty(device="cpu")
    initialise(model, 0)
    config = EngineConfig(name="torch")
    return TorchEngine(model, OptimConfig(lr=1e-3), config, sources=1, seed=0, device=torch.device("cpu"))


def _config(shape: dict[str, Any], ensemble: EnsembleConfig | None = None) -> ModelConfig:
    mixers = (PartConfig(name="correlation", options={"heads": 2, "lags": 2}),)
    return ModelConfig(**shape, mixers=mixers, ensemble=ensemble or EnsembleConfig())


def _as_costly(shape: dict[str, Any], ensemble: EnsembleConfig) -> dict[str, Any]:
    """The shape of one model with as many operations: the same depth, a multiple of 4 as width."""
    cost = build(_config(shape, ensemble), VOCAB).flops_per_token()

    def distance(width: int) -> int:
        return abs(build(_config(shape | {"width": width}), VOCAB).flops_per_token() - cost)

    return shape | {"width": min(range(shape["width"], 12 * shape["width"], 4), key=distance)}


def _batch(rows: int, length: int) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (rows, length + 1))
    return collate(tokens, [np.array([length // 2])] * rows, np.zeros(rows, dtype=np.int64))
