"""Four kinds of text without labels: what clustering finds, and what an ensemble of the clusters is worth.

Purity is the share of tokens that are of the largest kind of their cluster. A trained vocabulary is given three of the
kinds: the fourth has more characters than it would have pieces. Then modules are trained on clusters of half as much
text, by the recipe of `ensemble_quality`, and combined without further training: by the distance to clusters at some
temperatures, by what tokens tell (posterior), and by nothing (uniform).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.common import Table
from benchmarks.ensemble_quality import SOURCES, add, begun, ensemble, judge, train_modules
from configs.load import load
from data_pipeline.build import build as build_shards
from data_pipeline.clustering import Clustered, cluster
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.dataset import open_dataset
from pretrain.config import RunConfig

TOKENIZERS = (("bytes", 3), ("sp:4096", 2), ("sp:4096", 1))
TEMPERATURES = (0.03, 0.1, 0.3, 1.0)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--mib", type=float, default=2.0, help="text of each kind")
    parser.add_argument("--seeds", type=int, default=2, help="of clustering")
    parser.add_argument("--steps", type=int, default=250, help="of each module alone")


def run(options: argparse.Namespace) -> Table:
    """Cluster with every tokenizer and seed, then train and combine modules once; return the table."""
    torch.set_num_threads(1)
    table = Table(f"four kinds, {options.mib:g} MiB of each: purity; then modules of {options.steps} steps")
    with tempfile.TemporaryDirectory() as folder:
        for spec, ids in TOKENIZERS:
            for seed in range(options.seeds):
                out = Path(folder) / f"{spec.replace(':', '-')}-{ids}-{seed}"
                kinds = [name for name in SOURCES if spec == "bytes" or name != "unicode"]
                made = cluster(_data(spec, options.mib, kinds), out, into=len(kinds), ids=ids, seed=seed)
                shares = "; ".join(f"{one.name} {_most(one.shares)}" for one in made.clusters)
                table.add(f"{spec}, n = {ids}, seed {seed}", 100 * _purity(made), "% pure", note=shares)
        _combine(table, Path(folder) / "half", options)
    return table


def _combine(table: Table, out: Path, options: argparse.Namespace) -> None:
    made = cluster(_data("bytes", options.mib / 2, SOURCES), out, into=len(SOURCES))
    config = load(RunConfig, [made.config])
    data = config.data.model_copy(update={"heldout": 0.05, "shard_mib": 4.0})
    build_shards(data, Path(data.dir), workers=1)
    dataset, names = open_dataset(data), config.model.ensemble.modules
    values = train_modules(dataset, 0, options.steps)
    alone = {name: judge(dataset, begun(ensemble(names, "uniform"), 0, values), [name]) for name in names}
    right = {name: figures["loss"][name] for name, figures in alone.items()}
    table.add("the cluster's own module alone", statistics.mean(right.values()), "nats",
              note=", ".join(f"{name} {loss:.3f}" for name, loss in right.items()))  # fmt: skip
    for temperature in TEMPERATURES:
        near = config.model.ensemble.clusters.model_copy(update={"temperature": temperature})
        model = ensemble(names, "clusters", clusters=near)
        add(table, f"clusters, temperature {temperature:g}", judge(dataset, begun(model, 0, values)))
    for fusion in ("posterior", "uniform"):
        add(table, fusion, judge(dataset, begun(ensemble(names, fusion), 0, values)))


def _data(spec: str, mib: float, kinds: Iterable[str]) -> DataConfig:
    sources = {name: SourceConfig(path=SOURCES[name], limit_mib=mib) for name in kinds}
    return DataConfig(tokenizer=spec, sources=sources)


def _most(shares: dict[str, float]) -> str:
    name = max(shares, key=lambda kind: shares[kind])
    return f"{100 * shares[name]:.0f} % {name}"


def _purity(made: Clustered) -> float:
    tokens = sum(one.tokens for one in made.clusters)
    return sum(one.tokens * max(one.shares.values()) for one in made.clusters) / tokens
