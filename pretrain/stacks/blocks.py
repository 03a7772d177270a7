"""Blocks of a token mixer and a channel mixer, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from torch import Tensor, nn

from configs.schema import Config as Options
from pretrain.block import Block, make_block
from pretrain.config import ModelConfig
from pretrain.layout import Layout
from pretrain.mixer import State
from pretrain.stack import Stack, StackOutput, register


class Config(Options):
    """There is nothing to choose: mixers, channel, depth and norm are the model's own keys."""


@register(Config)
class Blocks(nn.ModuleList, Stack):
    """The blocks are its items: they are named by their numbers alone."""

    def __init__(self, options: Config, config: ModelConfig) -> None:
        super().__init__([make_block(config, layer) for layer in range(config.depth)])

    def forward(self, x_BTD: Tensor, layout: Layout, state: State = None) -> StackOutput:
        states, auxes = [], []
        for block, before in zip(self, state or [None] * len(self)):
            x_BTD, after, aux = self.run(block, x_BTD, layout, before)
            states.append(after)
            auxes += [aux] if aux is not None else []
        return StackOutput(x_BTD, None if state is None else tuple(states), tuple(auxes))

    def initial_state(self, rows: int, like: Tensor) -> State:
        return tuple(block.initial_state(rows, like) for block in self)

    def flops_per_token(self, length: int) -> int:
        return sum(block.flops_per_token(length) for block in self)

    def halved_flops_per_token(self, length: int) -> int:
        return sum(block.mixer.halved_flops_per_token(length) for block in self)

    def state_bytes(self, length: int) -> int:
        return sum(block.state_bytes(length) for block in self)

    def segments(self) -> Sequence[nn.Module]:
        return list(self)

    def __iter__(self) -> Iterator[Block]:
        return cast(Iterator[Block], super().__iter__())
