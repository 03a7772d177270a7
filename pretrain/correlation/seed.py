"""The published formula made causal: softmax(C K^T / sqrt(E)) V with C a correlation of queries and keys by channel.

    seed_fft  C_t = sum_{s <= t} q_s k_{t-s} / sqrt(t + 1),  s and t counted from the document's start
    seed_ema  C_t = sqrt(1 - g^2) sum_l g^l q_{t-l} k_{t-l},  g = sigmoid(r),  within the document

`seed_fft` reads the output of `scipy.signal.correlate` as the first half of a full convolution, `seed_ema` as a running
correlation at displacement 0. Either way C is a new query, rotated after it is made, and what follows is attention.

Shapes: B rows, H heads, T tokens, S tokens so far, E width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.correlation.convolution import convolve_documents, convolve_seen
from pretrain.correlation.doubling import running_sums
from pretrain.correlation.form import Form, Heads, first_decays
from pretrain.init import declare, values
from pretrain.layout import Layout
from pretrain.ops.attention import attend, attend_naive
from pretrain.ops.heads import Cache, empty_cache, extend, visible
from pretrain.ops.scan import exact


class Seen(NamedTuple):
    """Unrotated keys, and values; and every query (B, H, S, E), since each new token meets them in another order."""

    cache: Cache
    q: Tensor


class Running(NamedTuple):
    """Rotated keys, and values; and the sum that the last token's C was made of (B, H, E)."""

    cache: Cache
    sums: Tensor


class SeedFft(Form):
    """C is the convolution of all queries with all keys so far. No parameters."""

    rounding = True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, state: Seen | None = None
    ) -> tuple[Tensor, Seen | None]:
        if state is None:
            c = self.rotated(convolve_documents(q, k, layout), layout)
            return attend(c, self.rotated(k, layout), v, layout, self.scale), None
        cache, queries = extend(state.cache, k, v, layout), torch.cat((state.q, q), dim=2)
        c = self.rotated(convolve_seen(queries, cache.k, layout), layout)
        keys = self.rotated(cache.k, Layout(cache.doc_BS, cache.pos_BS, False))
        return attend_naive(c, keys, cache.v, visible(layout, cache), self.scale), Seen(cache, queries)

    def initial_state(self, rows: int, like: Tensor) -> Seen:
        cache = empty_cache(rows, self.heads.count, self.heads.width, like)
        return Seen(cache, cache.k)

    def flops_per_token(self, length: int) -> int:
        return 2 * length * self.heads.count * self.heads.width

    def state_bytes(self, length: int) -> int:
        return 2 * 3 * self.heads.count * self.heads.width * length


class SeedEma(Form):
    """C is a decayed sum of each token's own query times its own key."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        self.decay = nn.Parameter(torch.empty(heads.count))
        declare(self, {"decay": values(lambda: first_decays(heads.count).logit().float())})

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, state: Running | None = None
    ) -> tuple[Tensor, Running | None]:
        terms = (q * k).to(exact(q.dtype))
        keep_H11 = self.decay.to(terms.dtype).sigmoid()[:, None, None]
        pos_B1T1 = layout.pos_BT[:, None, :, None]
        sums = running_sums(terms, keep_H11, pos_B1T1, None if state is None else state.sums)
        c = self.rotated((sums * (1 - keep_H11.square()).sqrt()).to(q.dtype), layout)
        k = self.rotated(k, layout)
        if state is None:
            return attend(c, k, v, layout, self.scale), None
        cache = extend(state.cache, k, v, layout)
        y = attend_naive(c, cache.k, cache.v, visible(layout, cache), self.scale)
        return y, Running(cache, sums[:, :, -1])

    def initial_state(self, rows: int, like: Tensor) -> Running:
        cache = empty_cache(rows, self.heads.count, self.heads.width, like)
        return Running(cache, like.new_zeros(rows, self.heads.count, self.heads.width))

    def flops_per_token(self, length: int) -> int:
        return 2 * length * self.heads.count * self.heads.width

    def state_bytes(self, length: int) -> int:
        return 2 * self.heads.count * self.heads.width * (2 * length + 1)
