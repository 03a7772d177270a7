"""Lagged scores: the windowed cross-correlation of queries and keys at displacement t - s.

    S[t, s] = sum_{l < L} w_l <q_{t-l}, k_{s-l}> / sqrt(E),  s <= t,  terms beyond the document's start are 0
    y = softmax_s(S) v

For training, queries and keys are stacked with the L - 1 before them, and what follows is ordinary attention with keys
of width L E. With one lag there is nothing to weigh: no parameter, and the form is attention.

Shapes: B rows, H heads, T tokens, S keys, E width of a head, L lags, C channels with weights of their own.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.correlation.form import Form, Heads, first_decays
from pretrain.init import declare, values
from pretrain.layout import Layout
from pretrain.ops.attention import attend, attend_naive
from pretrain.ops.heads import Cache, empty_cache, extend, visible
from pretrain.ops.lags import lag_scores, stack_keys, stack_queries

LagInit = Literal["geometric", "uniform", "delta"]


class Stream(NamedTuple):
    """Keys and values, and of the last L - 1 queries their products with every key (B, H, L-1, S), or themselves."""

    cache: Cache
    recent: Tensor


class Lag(Form):
    """One weight a lag and head. Decoding keeps rows of products: each new token costs one row, as in attention."""

    def __init__(self, heads: Heads, lags: int, init: LagInit, channels: int = 1) -> None:
        super().__init__(heads)
        self.lags = lags
        self.weights = nn.Parameter(torch.empty(heads.count, lags, channels)) if lags > 1 else None
        if self.weights is not None:
            declare(self, {"weights": values(lambda: first_weights(init, heads.count, lags)[..., None])})

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, state: Stream | None = None
    ) -> tuple[Tensor, Stream | None]:
        # before any shift: then products depend on distances alone
        q, k = self.rotated(q, layout), self.rotated(k, layout)
        if state is not None:
            return self._stream(q, extend(state.cache, k, v, layout), layout, state.recent)
        if self.weights is None:
            return attend(q, k, v, layout, self.scale), None
        stacked_q = stack_queries(q, self._weights(q), self.lags)
        return attend(stacked_q, stack_keys(k, self.lags, layout), v, layout, self.scale), None

    def _weights(self, like: Tensor) -> Tensor:
        """(H, L, C or E)."""
        return like.new_ones(self.heads.count, 1, 1) if self.weights is None else self.weights.to(like.dtype)

    def _stream(self, q: Tensor, cache: Cache, layout: Layout, recent: Tensor) -> tuple[Tensor, Stream]:
        """The equation itself, over all that was seen; the plain twin of the stacked form."""
        before = F.pad(recent, (0, q.shape[2]))
        rows = torch.cat((before, (q * self.scale) @ cache.k.transpose(-1, -2)), dim=2)
        scores = lag_scores(rows, self._weights(q)[..., 0], layout.pos_BT, cache.pos_BS)
        y = scores.masked_fill(~visible(layout, cache), -torch.inf).softmax(-1) @ cache.v
        return y, Stream(cache, rows[:, :, rows.shape[2] - (self.lags - 1) :])

    def initial_state(self, rows: int, like: Tensor) -> Stream:
        cache = empty_cache(rows, self.heads.count, self.heads.width, like)
        return Stream(cache, like.new_zeros(rows, self.heads.count, self.lags - 1, 0))

    def flops_per_token(self, length: int) -> int:
        return (min(self.lags, length) + 1) * length * self.heads.count * self.heads.width

    def state_bytes(self, length: int) -> int:
        return 2 * self.heads.count * (2 * self.heads.width + self.lags - 1) * length


class ChannelLag(Lag):
    """A weight for each channel too; rotated channels go in pairs, or products would depend on absolute positions.

    A row of products cannot be weighed by channel afterwards, so decoding keeps the last L - 1 queries: less memory
    than rows of products, and L rows of products to make for each new token instead of one.
    """

    def __init__(self, heads: Heads, lags: int, init: LagInit) -> None:
        self.pair = 1 if heads.rope_base is None else 2
        super().__init__(heads, lags, init, heads.width // self.pair)

    def _weights(self, like: Tensor) -> Tensor:
        return super()._weights(like).repeat_interleave(self.pair, dim=-1)

    def _stream(self, q: Tensor, cache: Cache, layout: Layout, recent: Tensor) -> tuple[Tensor, Stream]:
        length, queries = q.shape[2], torch.cat((recent, q), dim=2)
        seen = Layout(cache.doc_BS, cache.pos_BS, False)
        stacked_q = stack_queries(queries, self._weights(q), self.lags)[:, :, -length:]
        stacked_k = stack_keys(cache.k, self.lags, seen)
        y = attend_naive(stacked_q, stacked_k, cache.v, visible(layout, cache), self.scale)
        return y, Stream(cache, queries[:, :, -(self.lags - 1) :])

    def initial_state(self, rows: int, like: Tensor) -> Stream:
        cache = empty_cache(rows, self.heads.count, self.heads.width, like)
        return Stream(cache, like.new_zeros(rows, self.heads.count, 0, self.heads.width))

    def state_bytes(self, length: int) -> int:
        recent = min(self.lags - 1, length)
        return 2 * self.heads.count * self.heads.width * (2 * length + recent)


def make_lag(heads: Heads, lags: int, init: LagInit, channelwise: bool) -> Lag:
    """The form with weights per head, or per channel where they are asked for and there is more than one lag."""
    return ChannelLag(heads, lags, init) if channelwise and lags > 1 else Lag(heads, lags, init)


def first_weights(kind: LagInit, heads: int, lags: int) -> Tensor:
    """(H, L) weights of norm 1 per head, so that scores begin with the variance of attention's."""
    lag = torch.arange(lags, dtype=torch.float64)
    if kind == "delta":
        weights = (lag == 0).double().expand(heads, lags)
    elif kind == "uniform":
        weights = torch.ones(heads, lags, dtype=torch.float64)
    else:
        weights = first_decays(heads)[:, None] ** lag
    return (weights / weights.norm(dim=1, keepdim=True)).float()
