"""ELiTA's Feed-Forward2: products of two views of a token, y_k = sum_{ij} a_i b_j W3[i, j, k] + b3.

    a = silu(W1 x + b1) in R^D,   b = silu(W2 x + b2) in R^factor

With all biases and a factor of 8 it has 9 D^2 + 10 D + 8 parameters, an eighth more than mlp's 8 D^2.

Source: acosharma/elita-transformer, whose W3 begins larger; here it ends a residual branch as every other one does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Config as Options
from configs.schema import key
from pretrain.channel import ChannelMixer, register
from pretrain.init import constant, declare, linear, residual_weight
from pretrain.layout import Layout
from pretrain.mixer import Site
from pretrain.ops.outer import outer_linear


class Config(Options):
    factor: int = key(8, "match", "width of the second factor", gt=0)


@register(Config)
class FeedForward2(ChannelMixer):
    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        self.first = linear(site.width, site.width, bias=site.bias)
        self.second = linear(site.width, config.factor, bias=site.bias)
        self.weight = nn.Parameter(torch.empty(site.width, config.factor * site.width))
        self.bias = nn.Parameter(torch.empty(site.width)) if site.bias else None
        declare(self, {"weight": residual_weight(config.factor * site.width, site.depth), "bias": constant(0.0)})

    def forward(self, x_BTD: Tensor, layout: Layout) -> tuple[Tensor, None]:
        y_BTD = outer_linear(F.silu(self.first(x_BTD)), F.silu(self.second(x_BTD)), self.weight)
        return (y_BTD if self.bias is None else y_BTD + self.bias), None

    def flops_per_token(self) -> int:
        return 2 * (self.first.weight.numel() + self.second.weight.numel() + self.weight.numel())
