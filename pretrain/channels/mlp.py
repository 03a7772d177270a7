"""The two-layer perceptron of the Transformer (arXiv 1706.03762): y = W2 act(W1 x), hidden width mult * D."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from configs.schema import Config as Options
from configs.schema import key
from pretrain.channel import AsExpert, ChannelMixer, hidden_width, register
from pretrain.init import linear, residual
from pretrain.layout import Layout
from pretrain.mixer import Site
from pretrain.ops.activation import ACTIVATIONS


class Config(Options):
    mult: float = key(4.0, "match", "hidden width as a multiple of the width", gt=0)
    activation: Literal["gelu", "relu", "leaky_relu"] = key("gelu", "match", "the function between the two layers")


@register(Config)
class Mlp(ChannelMixer):
    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        hidden = hidden_width(config.mult, site.width)
        self.config, self.activation = config, ACTIVATIONS[config.activation]
        self.up = linear(site.width, hidden, bias=site.bias)
        self.down = residual(hidden, site.width, site.depth, bias=site.bias)

    def forward(self, x_BTD: Tensor, layout: Layout) -> tuple[Tensor, None]:
        return self.down(self.activation(self.up(x_BTD))), None

    def flops_per_token(self) -> int:
        return 2 * (self.up.weight.numel() + self.down.weight.numel())

    def as_expert(self) -> AsExpert:
        names = {"up": "up.weight", "down": "down.weight", "up_bias": "up.bias", "down_bias": "down.bias"}
        return AsExpert({"mult": self.config.mult, "activation": self.config.activation}, names)
