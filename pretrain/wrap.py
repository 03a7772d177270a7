"""The recurrent wrap: any stack run R times over its own output, with the same weights.

    x <- x + beta_r,  x <- Stack(x),  for r = 1 ... R;      beta_r in R^D, zero at first, tells the stack its pass

It has the depth of R stacks and the parameters of one; operations, activations and decode state are R times its own.
Source: the text of acosharma/elita-transformer; where beta stands is this project's.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pretrain.channel import Aux, Teller
from pretrain.config import WrapConfig
from pretrain.init import constant, declare
from pretrain.layout import Layout
from pretrain.mixer import State
from pretrain.stack import Stack, StackOutput


class Shift(nn.Module):
    """x + beta. A module of its own, so that whoever shards parameters sees when beta is needed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.empty(width))
        declare(self, {"beta": constant(0.0)})

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.beta


class Wrap(Stack):
    """A stack around a stack. Its own `recompute` runs whole passes again, not the inner stack's segments."""

    def __init__(self, inner: Stack, width: int, config: WrapConfig) -> None:
        super().__init__()
        self.inner, self.recompute = inner, config.checkpoint
        self.trains_all = config.loss == "mean_all"
        self.shifts = nn.ModuleList(Shift(width) for _ in range(config.passes))

    def forward(self, x_BTD: Tensor, layout: Layout, state: State = None) -> StackOutput:
        passes = self._passes(x_BTD, layout, state)
        states = None if state is None else tuple(out.state for out in passes)
        return StackOutput(passes[-1].x_BTD, states, merged(passes))

    def training_outputs(self, x_BTD: Tensor, layout: Layout) -> tuple[list[Tensor], tuple[Aux, ...]]:
        if not self.trains_all:
            return super().training_outputs(x_BTD, layout)
        passes = self._passes(x_BTD, layout)
        return [out.x_BTD for out in passes], merged(passes)

    def initial_state(self, rows: int, like: Tensor) -> State:
        return tuple(self.inner.initial_state(rows, like) for _ in self.shifts)

    def flops_per_token(self, length: int) -> int:
        return len(self.shifts) * self.inner.flops_per_token(length)

    def halved_flops_per_token(self, length: int) -> int:
        return len(self.shifts) * self.inner.halved_flops_per_token(length)

    def state_bytes(self, length: int) -> int:
        return len(self.shifts) * self.inner.state_bytes(length)

    def recompute_segments(self) -> None:
        """Each block is a segment in each pass; passes are run again where the configuration says so."""
        self.inner.recompute_segments()

    def segments(self) -> Sequence[nn.Module]:
        return self.inner.segments()

    def tellers(self) -> list[tuple[str, Teller]]:
        """Those of the inner stack: what they tell in R passes is told once."""
        return [(f"inner.{name}", teller) for name, teller in self.inner.tellers()]

    def _passes(self, x_BTD: Tensor, layout: Layout, state: State = None) -> list[StackOutput]:
        outputs: list[StackOutput] = []
        for shift, before in zip(self.shifts, state or [None] * len(self.shifts)):
            outputs.append(self.run(self.inner, shift(x_BTD), layout, before))
            x_BTD = outputs[-1].x_BTD
        return outputs


def merged(passes: Sequence[StackOutput]) -> tuple[Aux, ...]:
    """What each part tells, over all passes: losses averaged, so that their weight is that of one pass, and
    measures summed."""
    return tuple(
        Aux(torch.stack([aux.loss for aux in told]).mean(), torch.stack([aux.measures for aux in told]).sum(0))
        for told in zip(*(out.aux for out in passes))
    )
