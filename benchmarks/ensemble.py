"""A step of eight small models run as one, against the eight in turn, and against one model of as many operations.

Forward, backward, clipping and AdamW on one thread, the same packed rows. `demo` is what a rank of `make demo` trains.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.common import Table, alternate, interval
from data_pipeline.batch import Batch, collate
from launcher.prepare import resolve
from pretrain.config import EngineConfig, ModelConfig, OptimConfig
from pretrain.engine import Engine, TorchEngine
from pretrain.ensemble.config import EnsembleConfig
from pretrain.init import initialise
from pretrain.models.build import build

VOCAB, GOAL = 257, 0.6
SIZES: dict[str, dict[str, float]] = {
    "demo": {},
    "half the length": {"length": 0.5},
    "wider": {"width": 1.5},
    "rows x2": {"rows": 2},
}
"""The demo's, and others by what of it is multiplied."""
STEPS = 5


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=15)


def run(options: argparse.Namespace) -> Table:
    """Time every size and return the table."""
    torch.set_num_threads(1)
    config, launch = resolve(["demo"], [])
    demo = {"width": config.model.width, "length": config.model.length, "rows": config.train.batch_rows // launch.ranks}
    table = Table("A step of the ensemble's eight models, CPU time: run as one against in turn")
    for name, changes in SIZES.items():
        size = {key: int(value * changes.get(key, 1)) for key, value in demo.items()}
        batch = _batch(size["rows"], size["length"])
        model = config.model.model_copy(update={"width": size["width"], "length": size["length"]})
        _add(table, name, model, _alternated(model, batch, options.rounds), len(batch.source_B))
    return table


def _alternated(model: ModelConfig, batch: Batch, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every arm, round by round. model: the whole ensemble's."""
    apart = model.ensemble.model_copy(update={"fusion": "uniform", "couple_every": 0})
    alone = model.model_copy(update={"ensemble": EnsembleConfig()})
    engines = {
        "as one": [_engine(model.model_copy(update={"ensemble": apart}))],
        "in turn": [_engine(alone) for _ in range(2 * len(model.ensemble.modules))],
        "whole": [_engine(model)],
        "single": [_engine(_as_costly(alone, model))],
    }
    arms: dict[str, Callable[[], None]] = {name: partial(_steps, which, batch) for name, which in engines.items()}
    for arm in arms.values():
        arm()
    return alternate(arms, rounds)


def _add(table: Table, name: str, model: ModelConfig, seconds: dict[str, list[float]], rows: int) -> None:
    ratio = interval([a / b for a, b in zip(seconds["as one"], seconds["in turn"])])
    note = f"(width {model.width}, {model.depth} blocks, {rows} rows of {model.length})"
    goal = GOAL if name == "demo" else None
    table.add(f"{name}: eight as one / in turn", ratio.median, "x", goal=goal, spread=ratio, note=note)
    ratio = interval([a / b for a, b in zip(seconds["whole"], seconds["single"])])
    costly = _as_costly(model.model_copy(update={"ensemble": EnsembleConfig()}), model)
    what = "ensemble with couplings and fusion / one model of its FLOPs"
    table.add(f"{name}: {what}", ratio.median, "x", spread=ratio, note=f"(width {costly.width})")


def _steps(engines: list[Engine], batch: Batch) -> None:
    for step in range(STEPS):
        for engine in engines:
            engine.step([batch], step, 1.0)


def _engine(config: ModelConfig) -> Engine:
    model = build(config, VOCAB).to_empty(device="cpu")
    initialise(model, 0)
    plain = EngineConfig(name="torch")
    return TorchEngine(model, OptimConfig(lr=1e-3), plain, sources=1, seed=0, device=torch.device("cpu"))


def _as_costly(alone: ModelConfig, whole: ModelConfig) -> ModelConfig:
    """One model with as many operations as the ensemble: of the same depth, a multiple of 4 wide."""
    cost = build(whole, VOCAB).flops_per_token()

    def of(width: int) -> ModelConfig:
        return alone.model_copy(update={"width": width})

    widths = range(alone.width, 12 * alone.width, 4)
    return min(map(of, widths), key=lambda config: abs(build(config, VOCAB).flops_per_token() - cost))


def _batch(rows: int, length: int) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (rows, length + 1))
    return collate(tokens, [np.array([length // 2])] * rows, np.zeros(rows, dtype=np.int64))
