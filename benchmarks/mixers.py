"""tinyshakespeare, its 65 symbols: every mixer at equal parameters, steps and tokens, beside a prototype's figures.

`59k`: 48 wide, 2 blocks, rows of 64, lr 4e-3; `160k`: 64 wide, 3 blocks, rows of 128, lr 3e-3; 4 heads, 12 rows a
batch, AdamW, cosine, clip 1, RoPE where there are q.k scores. The width of the channel mixer is fitted so that all have
attention's parameters, where it has one. What is quartic, or goes token by token, is compared at a smaller size.
`variants` are options and pairs of mixers at the larger size, their channel mixers as they come, so of unequal size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Table
from benchmarks.shakespeare import OPTIM, opened, symbols_of, train
from configs.load import Layers
from configs.load import build as checked
from pretrain.config import ModelConfig
from pretrain.models.build import build

NEAR = 0.08
"""Nats that a loss may lie above a prototype's: its seeds differ by up to 0.06."""
SHAPES: dict[str, tuple[dict[str, Any], float, int | None]] = {
    # the model, the learning rate, the parameters of all
    "59k": ({"width": 48, "depth": 2, "length": 64}, 4e-3, 58_656),
    "160k": ({"width": 64, "depth": 3, "length": 128}, 3e-3, 160_128),
    "smaller": ({"width": 32, "depth": 2, "length": 32}, 4e-3, None),
    "variants": ({"width": 64, "depth": 3, "length": 128}, 3e-3, None),
}


@dataclass(frozen=True)
class Arm:
    """mixer: name and options. keys: of the model besides. prototype: loss of seed 0 and 1 there, by size. beside: a
    mixer with its defaults that takes turns with the first."""

    mixer: str
    options: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    prototype: dict[str, tuple[float, ...]] = field(default_factory=dict)
    beside: str | None = None


FF2 = {"channel": {"name": "feedforward2"}}
PLAIN = {"norm": "layernorm_plain", "positions": "none"}
ARMS: dict[str, Arm] = {
    "attention": Arm("attention", prototype={"59k": (2.1361, 2.1934), "160k": (1.9961, 1.9932)}),
    "lag 2": Arm("correlation", {"lags": 2}, prototype={"59k": (2.1025,)}),
    "lag 4": Arm("correlation", prototype={"59k": (2.0972, 2.1273), "160k": (1.9537,)}),
    "lag 8": Arm("correlation", {"lags": 8}, prototype={"59k": (2.0832,)}),
    "lag 4, uniform": Arm("correlation", {"lag_init": "uniform"}, prototype={"59k": (2.0765, 2.1056)}),
    "lag 4, delta": Arm("correlation", {"lag_init": "delta"},
                        prototype={"59k": (2.1319,), "160k": (1.9904, 1.9826)}),
    "iir": Arm("correlation", {"corr": "iir"}, prototype={"59k": (2.0874, 2.1247)}),
    "prefix_mean": Arm("correlation", {"corr": "prefix_mean"}, prototype={"59k": (2.1039,)}),
    "lagbank 32": Arm("correlation", {"corr": "lagbank", "window": 32},
                      prototype={"59k": (2.2295,), "160k": (2.2045,)}),
    "fft": Arm("correlation", {"corr": "fft"}, prototype={"59k": (2.107, 2.1047), "160k": (1.9901,)}),
    "fft_self": Arm("correlation", {"corr": "fft_self"}, prototype={"59k": (2.4669,)}),
    "seed_fft": Arm("correlation", {"corr": "seed_fft"}, prototype={"59k": (2.1602,)}),
    "seed_ema": Arm("correlation", {"corr": "seed_ema"}, prototype={"59k": (2.1303, 2.1559)}),
    "involution 7": Arm("involution", {"kernel": 7}, prototype={"59k": (2.0754,)}),
    "involution 32": Arm("involution", {"kernel": 32}, prototype={"59k": (2.1266, 2.1539)}),
    "elita": Arm("elita", keys=PLAIN, prototype={"59k": (2.375,)}),
    "elita, feedforward2": Arm("elita", keys=PLAIN | FF2, prototype={"59k": (2.3418, 2.3758), "160k": (2.3597,)}),
    "elita, feedforward2, three passes": Arm("elita", keys=PLAIN | FF2 | {"wrap": {"passes": 3}},
                                             prototype={"59k": (2.3333,)}),
    "attention, feedforward2": Arm("attention", keys=FF2, prototype={"59k": (2.1172,)}),
    "multistream": Arm("attention", keys={"stack": {"name": "multistream"}}),
}  # fmt: skip
SMALLER_ARMS: dict[str, Arm] = {
    "attention": Arm("attention"),
    "lag 4": Arm("correlation"),
    "quartic": Arm("attention", keys={"stack": {"name": "quartic"}}),
    "relational": Arm("attention", keys={"stack": {"name": "relational"}}),
    "geodesic": Arm("attention", keys={"stack": {"name": "geodesic"}}),
}
VARIANT_ARMS: dict[str, Arm] = {
    "attention": Arm("attention"),
    "attention, feedforward2": Arm("attention", keys=FF2),
    "involution 7": Arm("involution", {"kernel": 7}),
    "involution 7 and attention in turn": Arm("involution", {"kernel": 7}, beside="attention"),
    "involution 7 and elita in turn": Arm("involution", {"kernel": 7}, beside="elita"),
    "involution 7, dilation_growth 2": Arm("involution", {"kernel": 7, "dilation_growth": 2}),
    "involution 7, softmax": Arm("involution", {"kernel": 7, "softmax": True}),
    "involution 32": Arm("involution", {"kernel": 32}),
    "involution 32, delta": Arm("involution", {"kernel": 32, "delta": True}),
    "involution 32, softmax": Arm("involution", {"kernel": 32, "softmax": True}),
    "elita": Arm("elita"),
    "elita, feedforward2": Arm("elita", keys=FF2),
    "elita, feedforward2, layernorm_plain, biases": Arm("elita", keys=PLAIN | FF2 | {"bias": True}),
}
OWN_ARMS = {"smaller": SMALLER_ARMS, "variants": VARIANT_ARMS}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--file", type=Path, default=Path("tinyshakespeare.txt"), help="1,115,394 characters of it")
    parser.add_argument("--size", choices=[*SHAPES], default="59k")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", help="one arm")


def run(options: argparse.Namespace) -> Table:
    """Train every mixer with every seed and return the table."""
    torch.set_num_threads(1)
    shape, lr, target = SHAPES[options.size]
    arms = OWN_ARMS.get(options.size, ARMS)
    chosen = {name: arm for name, arm in arms.items() if options.only in (None, name)}
    if not chosen:
        sys.exit(f"--only {options.only!r} is no arm of --size {options.size}; choose one of {', '.join(arms)}")
    table = Table(f"tinyshakespeare, 65 symbols, {_said(shape)}, {options.steps} steps: held-out nats a symbol")
    optim = OPTIM.model_copy(update={"lr": lr})
    with opened(options.file) as dataset:
        symbols = symbols_of(dataset)
        vocab = len(symbols.unique())
        for name, arm in chosen.items():
            config, losses, began = _fitted(arm, shape, vocab, target), [], time.process_time()
            for seed in range(options.seeds):
                loss, count = train(dataset, config, seed, options.steps, optim=optim, symbols=symbols)
                losses.append(loss)
                print(f"{name}, seed {seed}: {loss:.4f} nats, {count:,} parameters", file=sys.stderr, flush=True)
            spent = (time.process_time() - began) / options.seeds
            _add(table, name, losses, arm.prototype.get(options.size, ()), f"{count:,} parameters, {spent:.0f} CPU s")
    return table


def _add(table: Table, name: str, losses: list[float], prototype: tuple[float, ...], note: str) -> None:
    seeds = ", ".join(f"{loss:.4f}" for loss in losses)
    goal = None
    if prototype:
        goal = round(statistics.mean(prototype) + NEAR, 4)
        note += f"; prototype {', '.join(f'{loss:.4f}' for loss in prototype)}"
    table.add(name, statistics.mean(losses), "nats", goal=goal, note=f"(seeds {seeds}; {note})")


def _said(shape: dict[str, Any]) -> str:
    return f"width {shape['width']}, {shape['depth']} blocks, rows of {shape['length']}"


def _model(arm: Arm, shape: dict[str, Any], mult: float | None = None) -> ModelConfig:
    # a mixer without heads says so by having no such option
    heads = {} if arm.mixer == "involution" else {"heads": 4}
    mixers: list[dict[str, Any]] = [{"name": arm.mixer, "options": heads | arm.options}]
    mixers += [{"name": arm.beside}] if arm.beside else []
    keys: dict[str, Any] = {**shape, "mixers": mixers, **arm.keys}
    if mult is not None:
        keys["channel"] = {"name": "mlp", "options": {"mult": mult}}
    return checked(ModelConfig, Layers(keys))


def _fitted(arm: Arm, shape: dict[str, Any], vocab: int, target: int | None) -> ModelConfig:
    """The model with `target` parameters, by the hidden width of its channel mixer."""
    if "channel" in arm.keys or target is None:
        return _model(arm, shape)
    widths = [hidden / shape["width"] for hidden in range(shape["width"], 8 * shape["width"])]
    mult = min(widths, key=lambda mult: abs(_parameters(_model(arm, shape, mult), vocab) - target))
    return _model(arm, shape, mult)


def _parameters(config: ModelConfig, vocab: int) -> int:
    return sum(p.numel() for p in build(config, vocab).parameters())
