"""Attention over the last W displacements, each scored by a running correlation. Linear in the length.

    rho_t[lag] = <q_t, k_{t-lag}> / sqrt(E) + g rho_{t-1}[lag],  lag < W,  g = sigmoid(r)
    y_t = sum_lag softmax_lag(sqrt(1 - g^2) rho_t + b)[lag] v_{t-lag}

With W >= T and b = 0 it is the `iir` form. Time is cut into blocks of about W tokens, each one product of matrices
with the keys in its reach, so that keys and values are laid out about twice and not W times.

Shapes: B rows, H heads, T tokens, S = T + W - 1 keys, E width of a head, W lags from the longest to 0, N blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.correlation.doubling import running_sums
from pretrain.correlation.form import Form, Heads, first_decays
from pretrain.init import constant, declare, values
from pretrain.layout import Layout
from pretrain.ops.blocks import even_blocks
from pretrain.ops.involution import band_flops_per_channel, involution
from pretrain.ops.scan import exact


class Window(NamedTuple):
    """What the last token saw: W keys and values (B, H, W, E), and the running correlation with each (B, H, W)."""

    k: Tensor
    v: Tensor
    sums: Tensor


class LagBank(Form):
    """A window of displacements with a running score and a bias each."""

    def __init__(self, heads: Heads, window: int) -> None:
        super().__init__(heads)
        self.window = window
        self.decay = nn.Parameter(torch.empty(heads.count))
        self.bias = nn.Parameter(torch.empty(heads.count, window))
        first = values(lambda: first_decays(heads.count).logit().float())
        declare(self, {"decay": first, "bias": constant(0.0)})

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, state: Window | None = None
    ) -> tuple[Tensor, Window | None]:
        q, k = self.rotated(q, layout), self.rotated(k, layout)
        if state is None:
            keys, values_ = (F.pad(x, (0, 0, self.window - 1, 0)) for x in (k, v))
        else:
            keys, values_ = torch.cat((state.k[:, :, 1:], k), dim=2), torch.cat((state.v[:, :, 1:], v), dim=2)
        lag_W = torch.arange(self.window - 1, -1, -1, device=q.device)
        room_B1TW = (layout.pos_BT[..., None] - lag_W)[:, None]  # products before it; below 0 there is no such key
        products = recent_products(q * self.scale, keys, self.window).to(exact(q.dtype))
        keep_H11 = self.decay.to(products.dtype).sigmoid()[:, None, None]
        sums = running_sums(products, keep_H11, room_B1TW, None if state is None else state.sums)
        scores = sums * (1 - keep_H11.square()).sqrt() + self.bias[:, None]
        weights = scores.masked_fill(room_B1TW < 0, -torch.inf).softmax(-1).to(v.dtype)
        y = involution(weights.flip(-1).transpose(1, 2), values_.transpose(1, 2)).transpose(1, 2)
        if state is not None:
            state = Window(torch.cat((state.k, k), dim=2)[:, :, -self.window :],
                           torch.cat((state.v, v), dim=2)[:, :, -self.window :], sums[:, :, -1])  # fmt: skip
        return y, state

    def initial_state(self, rows: int, like: Tensor) -> Window:
        none = like.new_zeros(rows, self.heads.count, self.window, self.heads.width)
        return Window(none, none, none[..., 0])

    def flops_per_token(self, length: int) -> int:
        return 4 * min(self.window, length) * self.heads.count * self.heads.width

    def halved_flops_per_token(self, length: int) -> int:
        spent = 2 * band_flops_per_channel(length, self.window, 1) * self.heads.count * self.heads.width // length
        return spent - self.flops_per_token(length)

    def state_bytes(self, length: int) -> int:
        return 2 * self.heads.count * self.window * (2 * self.heads.width + 1)


def recent_products(q_BHTE: Tensor, k_BHSE: Tensor, window: int) -> Tensor:
    """<q_t, k> for the last W keys up to t's own, oldest first; k begins W - 1 keys before q. (B, H, T, W)."""
    length = q_BHTE.shape[2]
    count, size = even_blocks(length, window)
    spare = count * size - length
    q_BHNIE = F.pad(q_BHTE, (0, 0, 0, spare)).unflatten(2, (count, size))
    spans_BHNEJ = F.pad(k_BHSE, (0, 0, 0, spare)).unfold(2, window + size - 1, size)
    # rows read as if they were one longer move by one from each to the next: the band becomes columns
    flat = F.pad((q_BHNIE @ spans_BHNEJ).flatten(-2), (0, size))
    return flat.unflatten(-1, (size, window + size))[..., :window].flatten(2, 3)[:, :, :length]


def recent_products_naive(q_BHTE: Tensor, k_BHSE: Tensor, window: int) -> Tensor:
    """The same, one lag after the other."""
    length = q_BHTE.shape[2]
    return torch.stack([(q_BHTE * k_BHSE[:, :, w : w + length]).sum(-1) for w in range(window)], dim=-1)
