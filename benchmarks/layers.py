"""One layer, forward and backward, on one thread: every mixer's CPU time over attention's, channel mixers' over mlp's.

Width 128, 4 heads, fp32, rows of two documents, 2,048 tokens a batch. Arms take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.common import Table, alternate, interval
from pretrain import channel, mixer
from pretrain.init import initialise
from pretrain.layout import Layout
from pretrain.mixer import Site

WIDTH, TOKENS, LENGTHS = 128, 2048, (512, 2048)
ATTENTION, MLP = "attention", "mlp"
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    ATTENTION: ("attention", {"heads": 4}),
    **{f"correlation, {corr}": ("correlation", {"heads": 4, "corr": corr})
       for corr in ("lag", "iir", "prefix_mean", "lagbank", "fft", "fft_self", "seed_fft", "seed_ema")},
    "involution, K = 7": ("involution", {"kernel": 7}),
    "involution, K = 32": ("involution", {"kernel": 32}),
    "involution, K = 7, dilation 16": ("involution", {"kernel": 7, "dilation": 16}),
    "elita": ("elita", {"heads": 4}),
}  # fmt: skip
CHANNELS, CHANNEL_WIDTHS = (MLP, "feedforward2"), (64, 256)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=9)


def run(options: argparse.Namespace) -> Table:
    """Time every layer and return the table."""
    torch.set_num_threads(1)
    table = Table(f"one layer, forward and backward, CPU time: over {ATTENTION} of width {WIDTH}, and over {MLP}")
    for length in LENGTHS:
        layout = _two_documents(TOKENS // length, length)
        site = Site(WIDTH, length, 0, 1)
        layers = {name: mixer.make(which, asked, site) for name, (which, asked) in MIXERS.items()}
        arms = {name: _pass_of(layer, WIDTH, layout) for name, layer in layers.items()}
        _add(table, arms, ATTENTION, f"rows of {length:,}", options.rounds)
    for width in CHANNEL_WIDTHS:
        layout = _two_documents(4, 512)
        channels = {name: channel.make(name, {}, Site(width, 512, 0, 1)) for name in CHANNELS}
        arms = {name: _pass_of(layer, width, layout) for name, layer in channels.items()}
        _add(table, arms, MLP, f"width {width}", options.rounds)
    return table


def _add(table: Table, arms: dict[str, Callable[[], None]], measure: str, where: str, rounds: int) -> None:
    """A row for each arm: its time over that of `measure`, of the same round."""
    for arm in arms.values():
        arm()
    seconds = alternate(arms, rounds)
    for name, spent in seconds.items():
        if name == measure:
            spread = interval([1e3 * s for s in spent])
            table.add(f"{name}, {where}", spread.median, "ms", spread=spread)
        else:
            spread = interval([a / b for a, b in zip(spent, seconds[measure])])
            table.add(f"{name} / {measure}, {where}", spread.median, "x", spread=spread)


def _pass_of(layer: nn.Module, width: int, layout: Layout) -> Callable[[], None]:
    """Forward and backward, as within a model: angles and masks of the batch are there after the first time."""
    initialise(layer, 0)
    x_BTD = torch.randn(*layout.doc_BT.shape, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return lambda: layer(x_BTD, layout)[0].square().sum().backward()


def _two_documents(rows: int, length: int) -> Layout:
    doc_BT = (torch.arange(length) >= length // 2).long().expand(rows, length)
    pos_BT = (torch.arange(length) % (length // 2)).expand(rows, length)
    return Layout(doc_BT, pos_BT, False)
