"""Saving: how long training is blocked, against a plain copy of the state and against a durable torch.save of it."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import Table, interval
from pretrain.checkpoint import CheckpointStore
from pretrain.config import CheckpointConfig
from pretrain.engine import EngineState, Fragment
from pretrain.parallel import Ranks
from pretrain.run_folder import RunFolder


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--parameters", type=float, default=100e6, help="parameters, each with two moments")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of alternated arms (default 7)")
    parser.add_argument("--folder", type=Path, default=None, help="disk to write to (default: the temporary folder's)")


def run(options: argparse.Namespace) -> Table:
    """Measure and return the table."""
    state = _state(int(options.parameters))
    size = 4 * sum(f.tensor.numel() for f in state.fragments)
    table = Table(f"checkpoint of {size / 1e9:.2f} GB (fp32 parameters and two moments), wall time")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        _measure(table, state, Path(name), options.rounds)
    return table


def _state(parameters: int) -> EngineState:
    """The state of a transformer-like model: many matrices, few large ones."""
    wide = 1024
    count = max(1, parameters // (wide * wide))
    fragments: list[Fragment] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(count):
        name = f"blocks.{number}.weight"
        shapes[name] = (wide, wide)
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            fragments.append(Fragment(name, kind, 0, torch.rand(wide * wide)))
    return EngineState(fragments, shapes, 1)


def _measure(table: Table, state: EngineState, folder: Path, rounds: int) -> None:
    run_folder = RunFolder(folder / "run")
    run_folder.make()
    store = CheckpointStore(run_folder, Ranks(0, 1, 0, "here"), CheckpointConfig(keep_last=1))
    touched = [torch.zeros_like(f.tensor) for f in state.fragments]
    store.save(1, state, {})  # the warm-up: allocates and touches the staging buffer
    store.wait()
    seconds: dict[str, list[float]] = {"copy": [], "blocked": [], "durable": [], "torch.save": []}
    for number in range(rounds):
        arms: list[Callable[[], None]] = [
            lambda: seconds["copy"].append(_copy(state, touched)),
            partial(_ours, store, state, 2 + number, seconds),
            lambda: seconds["torch.save"].append(_torch_save(state, folder / "plain.pt")),
        ]
        for arm in arms if number % 2 == 0 else reversed(arms):
            arm()
    for name, label in (
        ("copy", "copy into touched memory"),
        ("blocked", "training blocked by our save"),
        ("durable", "our save until committed (fsync, hash, rename)"),
        ("torch.save", "torch.save and fsync"),
    ):
        spread = interval(seconds[name])
        table.add(label, spread.median, "s", spread=spread)
    limits = [max(0.10 * s, 1.3 * c) for s, c in zip(seconds["torch.save"], seconds["copy"])]
    for label, ours, theirs, goal in (
        ("blocked / the larger of 10 % of torch.save and 1.3 copies", "blocked", limits, 1.0),
        ("blocked / copy", "blocked", seconds["copy"], None),
        ("blocked / durable torch.save", "blocked", seconds["torch.save"], None),
        ("durable: ours / torch.save", "durable", seconds["torch.save"], 1.5),
    ):
        spread = interval([a / b for a, b in zip(seconds[ours], theirs)])
        table.add(label, spread.median, "x", goal=goal, spread=spread)


def _copy(state: EngineState, touched: list[torch.Tensor]) -> float:
    began = time.perf_counter()
    for to, fragment in zip(touched, state.fragments):
        to.copy_(fragment.tensor)
    return time.perf_counter() - began


def _ours(store: CheckpointStore, state: EngineState, step: int, seconds: dict[str, list[float]]) -> None:
    began = time.perf_counter()
    assert store.save(step, state, {}), "the disk has no room"
    seconds["blocked"].append(time.perf_counter() - began)
    store.wait()
    seconds["durable"].append(time.perf_counter() - began)


def _torch_save(state: EngineState, path: Path) -> float:
    tensors = {f"{f.name}|{f.kind}": f.tensor for f in state.fragments}
    began = time.perf_counter()
    with open(path, "wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())
    took = time.perf_counter() - began
    path.unlink()
    return took
