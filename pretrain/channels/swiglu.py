"""SwiGLU (arXiv 2002.05202): y = W3 (silu(W1 x) * W2 x), hidden width mult * D; mult 8/3 costs what mlp's 4 does."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from configs.schema import Config as Options
from configs.schema import key
from pretrain.channel import AsExpert, ChannelMixer, hidden_width, register
from pretrain.init import linear, residual
from pretrain.layout import Layout
from pretrain.mixer import Site


class Config(Options):
    mult: float = key(8 / 3, "match", "hidden width as a multiple of the width", gt=0)


@register(Config)
class SwiGlu(ChannelMixer):
    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        self.mult = config.mult
        self.hidden = hidden_width(config.mult, site.width)
        self.gate_up = linear(site.width, 2 * self.hidden, bias=site.bias)
        self.down = residual(self.hidden, site.width, site.depth, bias=site.bias)

    def forward(self, x_BTD: Tensor, layout: Layout) -> tuple[Tensor, None]:
        gate, up = self.gate_up(x_BTD).split(self.hidden, dim=-1)
        return self.down(F.silu(gate) * up), None

    def flops_per_token(self) -> int:
        return 2 * (self.gate_up.weight.numel() + self.down.weight.numel())

    def as_expert(self) -> AsExpert:
        names = {"up": "gate_up.weight", "down": "down.weight", "up_bias": "gate_up.bias", "down_bias": "down.bias"}
        return AsExpert({"mult": self.mult, "activation": "swiglu"}, names)
