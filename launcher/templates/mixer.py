"""A decaying average of the past, per channel, forgotten at the start of each document.

    y_t = a y_{t-1} + (1 - a) v_t      with v = x Wv and a = sigmoid(r) per channel, then Wo

A place to begin: `leviathan mixers check` this file after every change. Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Config as Options
from configs.schema import key
from pretrain.init import declare, linear, residual, values
from pretrain.mixer import Layout, Site, TokenMixer, register


class Config(Options):
    """What a YAML may say under `options`; a wrong value is told with its file and line."""

    longest: float = key(64.0, "match", "tokens that the slowest channel remembers at first", gt=1)


@register(Config)
class Mixer(TokenMixer):
    """The mixer is called what its file is called; the name of the class is yours."""

    # what it promises: the certificate asks for it
    causal = True
    streams = True
    isolates = True

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        self.width = site.width
        # `linear` and `residual` know how they begin; `residual` is for the last matrix, so that deep models start calm
        self.value = linear(site.width, site.width, bias=site.bias)
        self.out = residual(site.width, site.width, site.depth, bias=site.bias)
        # models are built without memory first: a parameter of your own is empty here, and declared with its values
        self.memory = nn.Parameter(torch.empty(site.width))
        declare(self, {"memory": values(lambda: torch.linspace(0.0, config.longest - 1, site.width).log1p())})

    def forward(self, x_BTD: Tensor, layout: Layout, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        v_BTD, keep_D = self.value(x_BTD), torch.sigmoid(self.memory)
        y_BTD = (1 - keep_D) * v_BTD
        # after each turn y_t holds the last 2, 4, 8, … tokens: no loop over T, so training is fast
        lag, length = 1, x_BTD.shape[1]
        while lag < length:
            earlier_BTD = F.pad(y_BTD[:, :-lag], (0, 0, lag, 0))
            y_BTD = y_BTD + keep_D**lag * self._seen(earlier_BTD, layout, lag)
            lag *= 2
        if state is None:
            return self.out(y_BTD), None
        # what came before this piece: token t is t + 1 steps behind the last y, if its document began before the piece
        step_T1 = torch.arange(1, length + 1, device=x_BTD.device)[:, None]
        goes_on_BT1 = layout.pos_BT[:, :, None] >= step_T1
        y_BTD = y_BTD + keep_D**step_T1 * state[:, None] * goes_on_BT1
        return self.out(y_BTD), y_BTD[:, -1]

    @staticmethod
    def _seen(earlier_BTD: Tensor, layout: Layout, lag: int) -> Tensor:
        """What lies `lag` tokens back, zero where that is another document: rows are packed with several."""
        return earlier_BTD * (layout.pos_BT >= lag)[:, :, None]

    def initial_state(self, rows: int, like: Tensor) -> Tensor:
        """The state before the first token: here the last y, (B, D)."""
        return like.new_zeros(rows, self.width)

    def flops_per_token(self, length: int) -> int:
        """Matrix products of a forward pass, a multiply-add is 2; element-wise work is not counted."""
        return 4 * self.width * self.width

    def state_bytes(self, length: int) -> int:
        """Of the state of one sequence, in bf16: two bytes a number."""
        return 2 * self.width
