"""Leviathan's multi-headed correlation (MHC), causal and differentiable.

The published operator correlates queries with keys across batch and future, detached from autograd. This one is the
windowed cross-correlation at displacement t - s, inside one head of one document:

    S[t, s] = sum_{l < L} w_l <q_{t-l}, k_{s-l}> / sqrt(E),  s <= t,  terms beyond the document's start are 0
    y = softmax_s(S) v

With L = 1 and w = 1 it is attention. `corr: lag` is the form trained here: queries and keys are stacked with the L - 1
before them, and what follows is ordinary attention with keys of width L E. Decoding keeps plain keys and values and
the last L - 1 rows of products, so each new token costs one row of products, as attention does.

Source: "Leviathan" (attention-free-revolution); the causal definition is this project's.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Config as Options
from configs.schema import key
from pretrain.init import declare, linear, residual, values
from pretrain.mixer import Layout, ParamGroup, Site, TokenMixer, register
from pretrain.ops.attention import attend, lag_scores, stack_lags
from pretrain.ops.heads import Cache, empty_cache, extend, head_width, split_heads, visible


class Config(Options):
    heads: int = key(4, "match", "heads", gt=0)
    corr: Literal["lag"] = key("lag", "match", "the form of the correlation")
    lags: int = key(4, "match", "lags L; 1 is attention", gt=0)
    lag_init: Literal["geometric", "uniform", "delta"] = key("geometric", "match", "how the weights of the lags begin")
    rope_base: float = key(10000.0, "match", "base of the rotary angles", gt=0)


class Stream(NamedTuple):
    """What was seen: keys and values, and the products of the last L - 1 queries with every key (B, H, L-1, S)."""

    cache: Cache
    rows: Tensor


@register(Config)
class Correlation(TokenMixer):
    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        self.heads, self.lags, self.width = config.heads, config.lags, site.width
        self.base = config.rope_base if site.positions == "rope" else None
        self.head_width = head_width(site, self.heads, self.heads)
        self.qkv = linear(site.width, 3 * site.width, bias=site.bias)
        self.out = residual(site.width, site.width, site.depth, bias=site.bias)
        self.lag_weights = nn.Parameter(torch.empty(self.heads, self.lags))
        declare(self, {"lag_weights": values(lambda: first_weights(config.lag_init, self.heads, self.lags))})

    def forward(self, x_BTD: Tensor, layout: Layout, state: Stream | None = None) -> tuple[Tensor, Stream | None]:
        q, k, v = split_heads(self.qkv(x_BTD), self.heads, self.heads)
        if self.base is not None:
            # before any shift: then products depend on distances alone
            rotary = layout.rotary(self.head_width, self.base, x_BTD.dtype)
            q, k = rotary.rotate(q), rotary.rotate(k)
        scale = self.head_width**-0.5
        weights = self.lag_weights.to(x_BTD.dtype)
        if state is None:
            stacked_q = stack_lags(q, weights, self.lags, layout)
            stacked_k = stack_lags(k, None, self.lags, layout)
            y = attend(stacked_q, stacked_k, v, layout, scale)
        else:
            y, state = self._stream(q * scale, k, v, weights, layout, state)
        return self.out(y.transpose(1, 2).flatten(2)), state

    def _stream(
        self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, layout: Layout, state: Stream
    ) -> tuple[Tensor, Stream]:
        """The equation itself, over all that was seen; the form of decoding, and the plain twin of the stacked one."""
        cache = extend(state.cache, k, v, layout)
        before = F.pad(state.rows, (0, k.shape[2]))
        rows = torch.cat((before, q @ cache.k.transpose(-1, -2)), dim=2)
        scores = lag_scores(rows, weights, layout.pos_BT, cache.pos_BS)
        y = scores.masked_fill(~visible(layout, cache), float("-inf")).softmax(-1) @ cache.v
        return y, Stream(cache, rows[:, :, rows.shape[2] - (self.lags - 1) :])

    def initial_state(self, rows: int, like: Tensor) -> Stream:
        cache = empty_cache(rows, self.heads, self.head_width, like)
        return Stream(cache, like.new_zeros(rows, self.heads, self.lags - 1, 0))

    def flops_per_token(self, length: int) -> int:
        return 8 * self.width * self.width + self.halved_flops_per_token(length)

    def halved_flops_per_token(self, length: int) -> int:
        return (self.lags + 1) * length * self.width

    def state_bytes(self, length: int) -> int:
        return 2 * (2 * self.width + self.heads * (self.lags - 1)) * length

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup(("lag_weights",), decay=False)]


def first_weights(kind: str, heads: int, lags: int) -> Tensor:
    """(H, L) weights of norm 1 per head, so that scores begin with the variance of attention's."""
    lag = torch.arange(lags, dtype=torch.float64)
    if kind == "delta":
        weights = (lag == 0).double().expand(heads, lags)
    elif kind == "uniform":
        weights = torch.ones(heads, lags, dtype=torch.float64)
    else:
        decay = torch.linspace(0.1, 0.7, heads, dtype=torch.float64)
        weights = decay[:, None] ** lag
    return (weights / weights.norm(dim=1, keepdim=True)).float()
