"""tinyshakespeare, bytes: the correlation against attention of equal size, over seeds. The loss, not the speed.

The last tenth of the text is held out and evaluated whole. 64 wide, 4 heads, 3 blocks, rows of 128 tokens, 12 rows a
batch, AdamW (0.9, 0.95), decay 0.05 on matrices, lr 3e-3 after 40 steps of warm-up, cosine to a tenth, clip 1, RoPE.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Table
from data_pipeline.batch import IGNORE, Batch
from data_pipeline.build import build as build_shards
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.loader import Loader
from data_pipeline.order import Order
from pretrain.config import EngineConfig, ModelConfig, OptimConfig, PartConfig
from pretrain.engine import TorchEngine
from pretrain.evaluate import HeldOut, evaluate
from pretrain.init import initialise
from pretrain.models.build import build
from pretrain.optim import lr_scale
from pretrain.parallel import Ranks

ROWS, LENGTH, SOURCE = 12, 128, "shakespeare"
OPTIM = OptimConfig(lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05, clip=1.0, warmup_steps=40, final_lr=0.1)
MIXERS = ("correlation", "attention")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--file", type=Path, default=Path("tinyshakespeare.txt"), help="1,115,394 characters of it")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--branches", type=float, default=1.0, help="factor on the first values that end a branch")


def run(options: argparse.Namespace) -> Table:
    """Train every mixer with every seed and return the table."""
    torch.set_num_threads(1)
    scaled = f", branches x{options.branches:g} at first" if options.branches != 1.0 else ""
    table = Table(f"tinyshakespeare, bytes, {options.steps} steps{scaled}: held-out loss in nats per byte")
    losses: dict[str, list[float]] = {name: [] for name in MIXERS}
    with opened(options.file) as dataset:
        for seed in range(options.seeds):
            for name in MIXERS:
                began = time.process_time()
                loss, parameters = train(dataset, model_of(name), seed, options.steps, options.branches)
                losses[name].append(loss)
                spent = time.process_time() - began
                print(f"seed {seed} {name}: {loss:.4f} nats, {parameters:,} parameters, {spent:.0f} CPU s", flush=True)
                table.add(f"{name}, seed {seed}", loss, "nats", note=f"{parameters:,} parameters, {spent:.0f} CPU s")
    means = {name: statistics.mean(values) for name, values in losses.items()}
    goals = {400: 2.02, 3000: 1.60} if options.branches == 1.0 else {}
    for name, mean in means.items():
        goal = goals.get(options.steps) if name == "correlation" or options.steps == 3000 else None
        spread = f"standard deviation {statistics.stdev(losses[name]):.4f}" if options.seeds > 1 else ""
        table.add(f"{name}, mean of {options.seeds} seeds", mean, "nats", goal=goal, note=spread)
    goal = 0.0 if options.steps == 400 and goals else None
    table.add("correlation - attention, mean", means["correlation"] - means["attention"], "nats", goal=goal)
    return table


def compare(title: str, arms: Mapping[str, ModelConfig], options: argparse.Namespace) -> Table:
    """Train every model with every seed and return the table. options: `file`, `steps` and `seeds`."""
    torch.set_num_threads(1)
    table = Table(f"tinyshakespeare, bytes, {options.steps} steps, {title}: held-out loss")
    losses: dict[str, list[float]] = {name: [] for name in arms}
    with opened(options.file) as dataset:
        for seed in range(options.seeds):
            for name, config in arms.items():
                began = time.process_time()
                loss, parameters = train(dataset, config, seed, options.steps)
                spent = time.process_time() - began
                losses[name].append(loss)
                print(f"seed {seed} {name}: {loss:.4f} nats, {parameters:,} parameters, {spent:.0f} CPU s", flush=True)
                table.add(f"{name}, seed {seed}", loss, "nats", note=f"{parameters:,} parameters, {spent:.0f} CPU s")
    for name, values in losses.items():
        table.add(f"{name}, mean of {options.seeds} seeds", statistics.mean(values), "nats")
    return table


@contextmanager
def opened(file: Path) -> Iterator[Dataset]:
    """The shards of the text in `file`, made here and gone afterwards."""
    if not file.is_file():
        sys.exit(f"there is no {file}; name the text with --file")
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(dir=folder, sources={SOURCE: SourceConfig(path=str(file))}, heldout=0.1, shard_mib=1)
        build_shards(data, Path(folder), workers=1)
        yield open_dataset(data)


def model_of(mixer: str) -> ModelConfig:
    """The model of this benchmark with one mixer."""
    part = PartConfig(name=mixer, options={"heads": 4})
    return ModelConfig(width=64, depth=3, length=LENGTH, mixers=(part,))


def symbols_of(dataset: Dataset) -> torch.Tensor:
    """(V,): a number for each byte that occurs in the text, in order; 0 for the others."""
    seen = torch.zeros(dataset.tokenizer.vocab, dtype=torch.bool)
    for split in ("train", "heldout"):
        for row in dataset.manifest.rows_of(SOURCE, split):
            ids = np.zeros(int(dataset.manifest.column("tokens")[row]), dtype=np.int64)
            dataset.shards[row].copy(0, len(ids), ids)
            seen[torch.from_numpy(np.unique(ids))] = True
    return (seen.cumsum(0) - 1).clamp_min(0) * seen


class Trial:
    """A model in training. total: steps of its schedule. symbols: numbers for bytes, where it is to know those of the
    text only."""

    def __init__(
        self, dataset: Dataset, config: ModelConfig, seed: int, total: int, *, optim: OptimConfig = OPTIM,
        rows: int = ROWS, symbols: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self._dataset, self._config, self._symbols = dataset, config, symbols
        model = build(config, dataset.tokenizer.vocab if symbols is None else len(symbols.unique()))
        model.to_empty(device="cpu")
        initialise(model, seed)
        self.model, plain = model, EngineConfig(name="torch")
        self._engine = TorchEngine(model, optim, plain, sources=1, seed=seed, device=torch.device("cpu"))
        order = Order(dataset.manifest, length=config.length, seed=seed, weights={SOURCE: 1.0})
        self._loader = Loader(order, dataset.shards, batch_rows=rows, micro_rows=rows, rank=0, world=1)
        self._loader.seek(0)
        self._scale, self.done = lr_scale(optim, total), 0

    @property
    def parameters(self) -> int:
        """How many the model has."""
        return sum(p.numel() for p in self.model.parameters())

    def advance(self, steps: int) -> None:
        """Train some steps more."""
        for _ in range(steps):
            batches = [self._known(batch) for batch in self._loader.next()]
            self._engine.step(batches, self.done, self._scale(self.done))
            self.done += 1

    def loss(self, rows: int | None = None) -> float:
        """Held-out nats a symbol; of `rows` rows spread over the held-out text, or of all of it."""
        heldout = HeldOut(self._dataset.manifest, self._dataset.shards, [SOURCE], self._config.length, rows)
        lengths, alone = self._dataset.tokenizer.byte_lengths, Ranks(0, 1, 0, "here")
        told = evaluate(lambda b: self._engine.evaluate(self._known(b)), heldout, lengths, alone, batch_rows=32)
        return float(told["loss"])

    def close(self) -> None:
        """End the thread that reads."""
        self._loader.close()

    def _known(self, batch: Batch) -> Batch:
        if self._symbols is None:
            return batch
        targets = torch.where(batch.targets_BT == IGNORE, IGNORE, self._symbols[batch.targets_BT.clamp_min(0)])
        return replace(batch, tokens_BT=self._symbols[batch.tokens_BT], targets_BT=targets)


def train(
    dataset: Dataset, config: ModelConfig, seed: int, steps: int, branches: float = 1.0, **trial: Any
) -> tuple[float, int]:
    """The held-out loss after `steps`, and the count of parameters.

    branches: factor on the first values of the layers that end residual branches; 4 makes each branch full size. trial:
    what else a `Trial` takes.
    """
    trained = Trial(dataset, config, seed, steps, **trial)
    with torch.no_grad():
        for name, parameter in trained.model.named_parameters():
            if name.endswith(("mixer.out.weight", "channel.down.weight")):
                parameter.mul_(branches)
    trained.advance(steps)
    trained.close()
    return trained.loss(), trained.parameters
