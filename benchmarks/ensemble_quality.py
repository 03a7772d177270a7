"""Four modules on four kinds of text, and what combining them is worth: held-out loss by source, relevance, seeds.

Each module is trained alone on its own source with a little of the others, then joined: by nothing (uniform), by what
tokens tell (posterior), by correlation with modules frozen and no label given (mhc), and by training all of it
(joint). Beside them one dense model of as many parameters, trained on as many tokens as modules and joint together.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Table
from data_pipeline.build import build as build_shards
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.loader import Loader
from data_pipeline.order import Order
from launcher.tables import BYTES_VOCAB
from pretrain.config import EngineConfig, ModelConfig, OptimConfig, PartConfig
from pretrain.engine import Engine, TorchEngine
from pretrain.ensemble.config import EnsembleConfig
from pretrain.evaluate import HeldOut, evaluate
from pretrain.init import initialise, materialise
from pretrain.models.build import build
from pretrain.optim import lr_scale
from pretrain.parallel import Ranks, derive_seed

SOURCES = {"python": "stdlib", "cpp": "headers", "english": "docs", "unicode": "unicode"}
WIDTH, DEPTH, LENGTH, ROWS, SHARED = 32, 2, 128, 12, 0.05
OPTIM = OptimConfig(lr=4e-3, weight_decay=0.05, warmup_steps=20)
FUSION_LR = 1e-2
"""Of the fusion trained by itself: it is small and begins from nothing."""
FUSION = {"width": 32, "heads": 2, "lags": 2}
UNLABELLED = {"own_loss": 0.0, "domain_loss": 0.0}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=250, help="of each module alone")
    parser.add_argument("--joint", type=int, default=150, help="steps after they are joined")


def run(options: argparse.Namespace) -> Table:
    """Train everything with every seed and return the table."""
    torch.set_num_threads(1)
    title = f"four modules, {options.steps} steps each, then {options.joint} joint: held-out nats per byte"
    table, found = Table(title), []
    with tempfile.TemporaryDirectory() as folder:
        sources = {name: SourceConfig(path=path, limit_mib=4) for name, path in SOURCES.items()}
        data = DataConfig(dir=folder, sources=sources, heldout=0.05, shard_mib=4)
        build_shards(data, Path(folder), workers=1)
        dataset = open_dataset(data)
        for seed in range(options.seeds):
            found.append(_one_seed(dataset, seed, options.steps, options.joint))
            for name, figures in found[-1].items():
                add(table, f"seed {seed}, {name}", figures)
    _judge(table, found)
    return table


Figures = dict[str, Any]
"""loss: by source. relevance: of the right module by source, where there is such a thing. note."""


def _one_seed(dataset: Dataset, seed: int, steps: int, joint: int) -> dict[str, Figures]:
    values, results = train_modules(dataset, seed, steps), dict[str, Figures]()
    names = sources_of(dataset)
    for name in names:
        alone = begun(ensemble(names, "uniform"), seed, values)
        results[f"module {name} alone"] = judge(dataset, alone, [name])
    for fusion in ("uniform", "posterior"):
        results[fusion] = judge(dataset, begun(ensemble(names, fusion), seed, values))
    frozen = ensemble(names, "mhc", freeze="modules", **UNLABELLED)
    fused = _go_on(dataset, begun(frozen, seed, values, FUSION_LR), joint, seed)
    results["mhc, frozen, no labels"] = judge(dataset, fused)
    joined = _go_on(dataset, begun(ensemble(names, "mhc"), seed, values), joint, seed)
    results["joint"] = judge(dataset, joined)
    count, total = _parameters(joined), steps * len(names) + joint
    dense = _go_on(dataset, _engine(_dense(count, dataset.tokenizer.vocab), seed, names), total, seed)
    note = f"{_parameters(dense):,} parameters, the ensemble has {count:,}; {total} steps"
    results["dense"] = judge(dataset, dense) | {"note": note}
    return results


def train_modules(dataset: Dataset, seed: int, steps: int) -> dict[str, torch.Tensor]:
    """Each module alone, mostly on the source it is called by: members' own parameters, as all ensembles call them."""
    engines = [
        _go_on(dataset, _engine(_module(name), derive_seed(seed, name), sources_of(dataset)), steps,
               derive_seed(seed, name), own=name)
        for name in sources_of(dataset)
    ]  # fmt: skip
    return {k: v for engine in engines for k, v in _named(engine).items()}


def sources_of(dataset: Dataset) -> list[str]:
    """The sources, which modules are called by."""
    return dataset.manifest.source_names()


# ---- models


def _config(**more: Any) -> ModelConfig:
    mixers = (PartConfig(name="correlation", options={"heads": 2, "lags": 2}),)
    shape: dict[str, Any] = {"width": WIDTH, "depth": DEPTH, "length": LENGTH, "mixers": mixers}
    return ModelConfig(**(shape | more))


def _module(name: str) -> ModelConfig:
    return _config(ensemble=EnsembleConfig(modules=(name,), couple_heads=2, couple_lags=2))


def ensemble(names: Sequence[str], fusion: str, **more: Any) -> ModelConfig:
    """All modules, combined in some way."""
    keys = {"couple_heads": 2, "couple_lags": 2, "fusion": fusion, **FUSION, **more}
    return _config(ensemble=EnsembleConfig(modules=tuple(names), **keys))


def _dense(parameters: int, vocab: int) -> ModelConfig:
    def distance(width: int) -> int:
        return abs(sum(p.numel() for p in build(_config(width=width), vocab).parameters()) - parameters)

    return _config(width=min(range(WIDTH, 8 * WIDTH, 4), key=distance))


def _parameters(engine: Engine) -> int:
    return sum(p.numel() for p in engine.model.parameters())


def _named(engine: Engine) -> dict[str, torch.Tensor]:
    """Members' own parameters by the name that all ensembles call them."""
    model: Any = engine.model
    (module,) = model.modules_named
    return {f"{module} {name}": p.detach() for name, p in engine.model.named_parameters()}


def begun(config: ModelConfig, seed: int, values: dict[str, torch.Tensor], lr: float = OPTIM.lr) -> Engine:
    """An ensemble that begins with the modules' parameters."""
    names = config.ensemble.modules
    engine = _engine(config, seed, names, lr)
    with torch.no_grad():
        for name, p in engine.model.named_parameters():
            if name.startswith("models."):
                p.copy_(torch.cat([values[f"{module} {name}"] for module in names]))
    return engine


def _engine(config: ModelConfig, seed: int, sources: Sequence[str], lr: float = OPTIM.lr) -> Engine:
    model = materialise(build(config, BYTES_VOCAB), "cpu")
    initialise(model, seed)
    model.know_sources(list(sources))
    plain, optim = EngineConfig(name="torch"), OPTIM.model_copy(update={"lr": lr})
    return TorchEngine(model, optim, plain, sources=len(sources), seed=seed, device=torch.device("cpu"))


# ---- training and evaluation


def _go_on(dataset: Dataset, engine: Engine, steps: int, seed: int, own: str | None = None) -> Engine:
    """Train on all sources equally, or on one with a little of the others."""
    began, names = time.process_time(), sources_of(dataset)
    mostly = {name: (len(names) - 1) * (1 - SHARED) if name == own else SHARED for name in names}
    weights = {name: 1.0 if own is None else round(1000 * mostly[name]) / 1000 for name in names}
    order = Order(dataset.manifest, length=LENGTH, seed=derive_seed(seed, "data", own), weights=weights)
    loader = Loader(order, dataset.shards, batch_rows=ROWS, micro_rows=ROWS, rank=0, world=1)
    scale, loss = lr_scale(OPTIM, steps), 0.0
    loader.seek(0)
    for step in range(steps):
        loss = engine.step(loader.next(), step, scale(step)).loss
    loader.close()
    spent = time.process_time() - began
    print(f"  {steps} steps on {own or 'all'}: last loss {loss:.3f}, {spent:.0f} CPU s", file=sys.stderr, flush=True)
    return engine


def judge(dataset: Dataset, engine: Engine, only: Sequence[str] | None = None) -> Figures:
    """Held-out loss by source, and how relevant the right module is. only: modules that are there, the others not."""
    model: Any = engine.model
    names = sources_of(dataset)
    if only is not None:
        model.without([name for name in names if name not in only])
    heldout = HeldOut(dataset.manifest, dataset.shards, names, LENGTH, 128)
    record = evaluate(engine.evaluate, heldout, dataset.tokenizer.byte_lengths, Ranks(0, 1, 0, "here"),
                      batch_rows=32, told_by=model.figures)  # fmt: skip
    loss = {name: record["sources"][name]["loss"] for name in names}
    told = record.get("model", {})
    relevance = {name: told[name]["relevance"][name] for name in names} if told else {}
    return {"loss": loss, "relevance": relevance, "note": ""}


# ---- the table


def _mean(by_source: dict[str, float]) -> float:
    return statistics.mean(by_source.values())


def _shown(by_source: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in by_source.items())


def add(table: Table, name: str, figures: Figures) -> None:
    """A row of the table: loss in the mean over sources, and of each."""
    parts = [_shown(figures["loss"]), figures["note"]]
    if figures["relevance"] and not name.endswith("alone"):
        parts.append(f"relevance of the right module: {_shown(figures['relevance'])}")
    table.add(name, _mean(figures["loss"]), "nats", note="; ".join(filter(None, parts)))


def _judge(table: Table, found: list[dict[str, Figures]]) -> None:
    """The figures with goals, in the mean over seeds and sources."""

    def gap(a: str, b: str) -> float:
        return statistics.mean(_mean(seed[a]["loss"]) - _mean(seed[b]["loss"]) for seed in found)

    frozen, joint = "mhc, frozen, no labels", "joint"
    best = statistics.mean(
        _mean(seed[frozen]["loss"]) - _mean({s: seed[f"module {s} alone"]["loss"][s] for s in SOURCES})
        for seed in found
    )
    right = min(value for seed in found for value in seed[frozen]["relevance"].values())
    table.add("least relevance of the right module, frozen, no labels", right, "", goal=0.6, sense=">=")
    table.add("mhc frozen - the right module alone", best, "nats", goal=0.10)
    table.add("mhc frozen - posterior", gap(frozen, "posterior"), "nats", goal=0.03)
    for other in (frozen, "uniform", "dense"):
        table.add(f"joint - {other}", gap(joint, other), "nats", goal=0.0)
