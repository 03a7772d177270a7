"""Geodesics: a token moves for a unit of time through a curved space, and hands its velocity to the next. EXPERIMENTAL.

    x'' = -Gamma(x)[x', x'],      x(0) = E[token],      x'(0) = the last velocity of the token before;     output x(1)

The first velocity of a document is trained, and so is the metric that bends the space (pretrain/ops/geodesic.py), with
x in units of its usual size: W sqrt(D) for W and Q / sqrt(D) for Q, so that first values of the usual size bend it.
Tokens follow one another, as in any recurrent network: training is slow. Arithmetic is fp32, fp64 for fp64 models.
Source: the text of acosharma/elita-transformer, which says that it "did not prove too successful"; the form of the
metric and the equations are this project's.

Shapes: B rows, T tokens, D width, R rank of the metric, M features, K = D R.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from configs.schema import Config as Options
from configs.schema import key
from pretrain.config import ModelConfig
from pretrain.init import declare, linear, normal
from pretrain.layout import Layout
from pretrain.mixer import State
from pretrain.ops.geodesic import Point, Space, rk4, semi_implicit
from pretrain.ops.scan import exact
from pretrain.stack import Stack, StackOutput, register

_METHODS = {"rk4": (rk4, 4), "semi_implicit": (semi_implicit, 1)}
"""Each with the accelerations that a step asks for."""


class Config(Options):
    """There are no blocks: the model's mixers, channel mixer, depth and dropout of branches are not used."""

    rank: int = key(2, "match", "rank R of the metric's part that is not diagonal", gt=0)
    features: int | None = key(None, "match", "features M that the metric is read off; empty: model.width", gt=0)
    steps: int = key(3, "match", "steps of integration for each token", gt=0)
    method: Literal["rk4", "semi_implicit"] = key(
        "rk4", "match", "Runge-Kutta of fourth order, or Euler's semi-implicit method at a quarter of the cost"
    )
    unit_speed: bool = key(
        True, "match", "each token begins at speed 1 in the metric; velocities that only add up may overflow"
    )
    truncate: int = key(0, "match", "tokens after which no gradient goes back along the velocity; 0: never cut", ge=0)


class Flow(nn.Module):
    """The motion of a token, from where it is and how it moves to where it is a unit of time later."""

    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        self.width, self.steps, self.unit_speed = width, config.steps, config.unit_speed
        self.method, self.accelerations = _METHODS[config.method]
        features = config.features or width
        self.feature = linear(width, features, bias=True)
        self.diagonal = linear(features, width, bias=True)
        self.factor = linear(features, width * config.rank, bias=True)

    def forward(self, x_BD: Tensor, v_BD: Tensor) -> Point:
        space = self.space(x_BD.dtype)
        if self.unit_speed:
            v_BD = v_BD * (space.energy(x_BD, v_BD) + 1e-12).rsqrt()[:, None]
        point = x_BD, v_BD
        for _ in range(self.steps):
            point = self.method(space.acceleration, point, 1 / self.steps)
        return point

    def space(self, dtype: torch.dtype) -> Space:
        """The metric in arithmetic of `dtype`."""
        feature, diagonal, factor = self.feature, self.diagonal, self.factor
        size, gentle = self.width**0.5, feature.out_features**-0.5
        sized = (
            (feature.weight, size),
            (feature.bias, 1.0),
            (diagonal.weight, gentle),
            (diagonal.bias, 1.0),
            (factor.weight, gentle / size),
            (factor.bias, 1 / size),
        )
        return Space(*(scale * matrix.to(dtype) for matrix, scale in sized))

    def flops(self) -> int:
        """Operations of one token's motion."""
        features, rank = self.feature.out_features, self.factor.out_features // self.width
        each = 6 * self.width * features * (2 + rank) + 2 * self.width * rank * (6 + rank)
        speed = 2 * self.width * (features * (2 + rank) + rank) if self.unit_speed else 0
        return self.steps * self.accelerations * each + speed


@register(Config)
class Geodesic(Stack):
    def __init__(self, options: Config, config: ModelConfig) -> None:
        super().__init__()
        self.width, self.truncate = config.width, options.truncate
        self.flow = Flow(config.width, options)
        self.first = nn.Parameter(torch.empty(config.width))
        declare(self, {"first": normal(config.width**-0.5)})

    def forward(self, x_BTD: Tensor, layout: Layout, state: State = None) -> StackOutput:
        kind = exact(x_BTD.dtype)
        first_D, path = self.first.to(kind), []
        v_BD = self.initial_state(len(x_BTD), x_BTD) if state is None else state
        for t, x_BD in enumerate(x_BTD.to(kind).unbind(1)):
            if self.truncate and t % self.truncate == 0:
                v_BD = v_BD.detach()
            v_BD = torch.where(layout.pos_BT[:, t, None] == 0, first_D, v_BD)
            x_BD, v_BD = self.run(self.flow, x_BD, v_BD)
            path.append(x_BD)
        return StackOutput(torch.stack(path, dim=1).to(x_BTD.dtype), None if state is None else v_BD, ())

    def initial_state(self, rows: int, like: Tensor) -> Tensor:
        return like.new_zeros(rows, self.width, dtype=exact(like.dtype))

    def flops_per_token(self, length: int) -> int:
        return self.flow.flops()

    def state_bytes(self, length: int) -> int:
        return 2 * self.width

    def segments(self) -> Sequence[nn.Module]:
        return [self.flow]
