"""ELiTA's Attention2: a softmax whose score is a sum, not a product, of a key's and a query's part. Linear in length.

Per head, with keys k1, k2, k3 in R^D and phases p1_j = sin(j a1 / n + b1), p2_i = sin(i a2 / n + b2) in R^P:

    S[i, j] = k1.x_j + k3.x_i + c.(p1_j + p2_i),  j <= i,   and once more, as a column of its own,  s_i = k2.x_i
    y_i = ( e^(s_i) v_i + sum_j e^(S[i, j]) v_j ) / ( e^(s_i) + sum_j e^(S[i, j]) )      with v = V x, then O

The query's part is the same for all j, so that the past has one mean for everybody and a query only chooses how much
of it to take. In the form computed here, mean and lse over the prefixes of l_j = k1.x_j + c.p1_j:

    y_i = v_i + g_i (mean_i - v_i),     g_i = sigmoid(k3.x_i + c.p2_i + lse_i - k2.x_i)

Decoding keeps, per head, the largest logit and two sums. The original has no biases but the phases', clips exponents,
and divides positions by the length of the row at hand, which would let its end be seen; here n is fixed.

Source: acosharma/elita-transformer (equations only); the stable form is this project's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from configs.schema import Config as Options
from configs.schema import key
from pretrain.init import declare, linear, residual, uniform
from pretrain.mixer import Layout, ParamGroup, Site, TokenMixer, register
from pretrain.ops.heads import head_width
from pretrain.ops.scan import PrefixState, empty_prefix, exact, prefix_flops, prefix_softmax

_FIRST = uniform(0.05)


class Config(Options):
    heads: int = key(4, "match", "heads", gt=0)
    value_width: int | None = key(None, "match", "width of a head's values; empty: model.width / heads", gt=0)
    features: int = key(16, "match", "sines P that make up a head's phase", gt=0)
    pos_scale: float | None = key(None, "match", "n, what positions are divided by; empty: model.length", gt=0)


@register(Config)
class Elita(TokenMixer):
    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        self.width, self.heads = site.width, config.heads
        # nothing is rotated, so that heads may be of odd width
        plain = replace(site, positions="none")
        self.value_width = config.value_width or head_width(plain, config.heads, config.heads)
        self.pos_scale = config.pos_scale or float(site.length)
        self.scores = nn.Linear(site.width, 3 * self.heads, bias=False)
        declare(self.scores, {"weight": _FIRST})
        self.value = linear(site.width, self.heads * self.value_width)
        self.out = residual(self.heads * self.value_width, site.width, site.depth)
        self.rate = nn.Parameter(torch.empty(2, self.heads, config.features))
        self.offset = nn.Parameter(torch.empty(2, self.heads, config.features))
        self.amplitude = nn.Parameter(torch.empty(self.heads, config.features))
        declare(self, {"rate": _FIRST, "offset": _FIRST, "amplitude": _FIRST})

    def forward(
        self, x_BTD: Tensor, layout: Layout, state: PrefixState | None = None
    ) -> tuple[Tensor, PrefixState | None]:
        low, high = x_BTD.dtype, exact(x_BTD.dtype)
        key_BHT, own_BHT, query_BHT = self.scores(x_BTD).to(high).unflatten(-1, (3, self.heads)).permute(2, 0, 3, 1)
        key_phase, query_phase = self.phases(layout, high)
        v_BHTV = self.value(x_BTD).to(high).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        before = self.initial_state(len(x_BTD), x_BTD) if state is None else state
        past = prefix_softmax(key_BHT + key_phase, v_BHTV, layout.pos_BT, before)
        gate_BHT = torch.sigmoid(query_BHT + query_phase + past.lse_BHT - own_BHT)
        y_BHTV = v_BHTV + gate_BHT[..., None] * (past.mean_BHTV - v_BHTV)
        y_BTD = self.out(y_BHTV.transpose(1, 2).flatten(2).to(low))
        return y_BTD, None if state is None else past.state

    def phases(self, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """c.p1 of every token as a key and c.p2 of it as a query, each (1 or B, H, T)."""
        pos_BT = layout.pos_BT[:1] if layout.ramps else layout.pos_BT
        rate, offset, amplitude = (p.to(dtype) for p in (self.rate, self.offset, self.amplitude))
        share_BT = pos_BT.to(dtype) / self.pos_scale
        phase_BT2HP = torch.sin(share_BT[..., None, None, None] * rate + offset)
        as_key, as_query = (phase_BT2HP * amplitude).sum(-1).permute(2, 0, 3, 1)
        return as_key, as_query

    def initial_state(self, rows: int, like: Tensor) -> PrefixState:
        return empty_prefix(rows, self.heads, self.value_width, like)

    def flops_per_token(self, length: int) -> int:
        values = 2 * self.heads * self.value_width
        return 2 * self.width * (3 * self.heads + values) + self.halved_flops_per_token(length)

    def halved_flops_per_token(self, length: int) -> int:
        return self.heads * prefix_flops(length, self.value_width) // 2

    def state_bytes(self, length: int) -> int:
        return 2 * self.heads * (self.value_width + 2)

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup(("rate", "offset", "amplitude"), decay=False)]
