"""Scores that gather all products at one displacement t - s, however long ago: sums along diagonals of (T, T).

    iir          S[t, s] = sqrt(1 - g^2) (P_t[s] + g S'[t-1, s-1]),  S' the sum without its factor,  g = sigmoid(r)
    prefix_mean  S[t, s] = e^theta mean_{u = t-s .. t} P_u[u - (t - s)],  u counted from the document's start

with P_t[s] = <q_t, k_s> / sqrt(E), then y = softmax_s(S) v. `iir` is the lagged form with w_l = g^l and no end;
`prefix_mean` is the causal form of what Autoformer (arXiv 2106.13008) averages over whole series. Both keep (T, T)
scores of every head while training, and one row of sums while decoding.

Shapes: B rows, H heads, T queries, S keys, E width of a head.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.correlation.doubling import along_diagonals, decayed_sums, doubled
from pretrain.correlation.form import Form, Heads, first_decays
from pretrain.init import constant, declare, values
from pretrain.layout import Layout
from pretrain.ops.heads import Cache, empty_cache, extend, visible
from pretrain.ops.scan import exact


class Stream(NamedTuple):
    """Keys and values, and the sums of the last query with every key (B, H, S)."""

    cache: Cache
    sums: Tensor


class Diagonal(Form):
    """What both forms share: products, their sums along diagonals, a softmax over what a query sees."""

    dense = True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, state: Stream | None = None
    ) -> tuple[Tensor, Stream | None]:
        q, k = self.rotated(q, layout), self.rotated(k, layout)
        if state is None:
            seen, mask = Cache(k, v, layout.doc_BT, layout.pos_BT), layout.mask()
        else:
            seen = extend(state.cache, k, v, layout)
            mask = visible(layout, seen)
        sums = ((q * self.scale) @ seen.k.transpose(-1, -2)).to(exact(q.dtype))
        if state is not None:
            sums = torch.cat((F.pad(state.sums, (0, q.shape[2]))[:, :, None], sums), dim=2)
        room_BS = seen.pos_BS[:, None, None]
        sums = self._summed(sums, room_BS)[:, :, -q.shape[2] :]
        scores = self._scores(sums, room_BS).masked_fill(~mask, -torch.inf)
        y = scores.softmax(-1).to(v.dtype) @ seen.v
        return y, None if state is None else Stream(seen, sums[:, :, -1])

    @abstractmethod
    def _summed(self, products_BHTS: Tensor, room_BS: Tensor) -> Tensor:
        """Sums along diagonals. room: how many products lie before each within its document."""

    @abstractmethod
    def _scores(self, sums_BHTS: Tensor, room_BS: Tensor) -> Tensor:
        """Logits of the softmax."""

    def initial_state(self, rows: int, like: Tensor) -> Stream:
        cache = empty_cache(rows, self.heads.count, self.heads.width, like)
        return Stream(cache, like.new_zeros(rows, self.heads.count, 0))

    def flops_per_token(self, length: int) -> int:
        return 2 * length * self.heads.count * self.heads.width

    def state_bytes(self, length: int) -> int:
        return 2 * self.heads.count * (2 * self.heads.width + 1) * length


class Iir(Diagonal):
    """A product counts g times less with each token that passes."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        self.decay = nn.Parameter(torch.empty(heads.count))
        declare(self, {"decay": values(lambda: first_decays(heads.count).logit().float())})

    def _summed(self, products_BHTS: Tensor, room_BS: Tensor) -> Tensor:
        keep_H11 = self.decay.to(products_BHTS.dtype).sigmoid()[:, None, None]
        return decayed_sums(products_BHTS, keep_H11, room_BS, along_diagonals)

    def _scores(self, sums_BHTS: Tensor, room_BS: Tensor) -> Tensor:
        keep_H11 = self.decay.to(sums_BHTS.dtype).sigmoid()[:, None, None]
        return sums_BHTS * (1 - keep_H11.square()).sqrt()


class PrefixMean(Diagonal):
    """All products of a displacement count the same."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        self.log_gain = nn.Parameter(torch.empty(heads.count))
        declare(self, {"log_gain": constant(0.0)})

    def _summed(self, products_BHTS: Tensor, room_BS: Tensor) -> Tensor:
        return doubled(products_BHTS, 1.0, room_BS, along_diagonals)

    def _scores(self, sums_BHTS: Tensor, room_BS: Tensor) -> Tensor:
        return sums_BHTS / (room_BS + 1) * self.log_gain.to(sums_BHTS.dtype).exp()[:, None, None]
