"""Softmax attention among a few edges: the diagonal, or those that rows choose.

    diagonal   (i, i) sees (j, j) for j <= i
    top        each row i chooses k edges by the scores of attention among tokens; a chosen edge sees those chosen in
               rows up to i, and what it finds is multiplied by its gate, so that the choice is trained

The choice (pretrain/ops/routing.py) is made row by row: over all edges at once it would depend on later rows.

Shapes: B rows, T rows of edges, S columns, C width of an edge, H heads, E width of a head, K edges chosen in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.edges.mixer import EdgeMixer
from pretrain.edges.start import Rows
from pretrain.layout import Layout
from pretrain.mixer import State
from pretrain.ops.attention import attend_naive
from pretrain.ops.heads import Cache, empty_cache, extend, visible
from pretrain.ops.routing import coordinate_descent

SPARE = 9 / 8
"""Gates sum to this many times K, so that the last of the K largest are not on the slope (as in CoLT5)."""
NOWHERE = -1
"""The document of an edge that is chosen where a row has fewer than K."""


class DiagonalMixer(EdgeMixer):
    """Attention among the edges of tokens with themselves."""

    def forward(self, e_BTSC: Tensor, scores_BTS: Tensor, rows: Rows, state: State) -> tuple[Tensor, State]:
        length, past = e_BTSC.shape[1], e_BTSC.shape[2] - e_BTSC.shape[1]
        y_BTC, after = self.among(e_BTSC.diagonal(past, 1, 2).transpose(1, 2), rows.layout, rows.layout, state)
        places = torch.arange(past + length, device=e_BTSC.device)
        y_BTSC = y_BTC[:, :, None] * (places[past:, None] == places)[..., None]
        return y_BTSC, None if state is None else after

    def initial_state(self, rows: int, like: Tensor) -> Cache:
        return empty_cache(rows, self.sizes.heads, self.sizes.head_width, like)

    def flops_per_token(self, length: int) -> int:
        return self.edge_flops() + self.halved_flops_per_token(length)

    def halved_flops_per_token(self, length: int) -> int:
        return 2 * length * self.inner

    def state_bytes(self, length: int) -> int:
        return 2 * 2 * self.inner * length

    def among(self, e_BNC: Tensor, queries: Layout, keys: Layout, state: Cache | None) -> tuple[Tensor, Cache]:
        """Attention among N edges, whose places as queries and as keys are two layouts, and those before them."""
        *qkv, g_BNHE = self.project(e_BNC)
        q, k, v = (x.transpose(1, 2) for x in qkv)
        cache = extend(self.initial_state(len(e_BNC), e_BNC) if state is None else state, k, v, keys)
        y = attend_naive(q, cache.k, cache.v, visible(queries, cache), self.sizes.head_width**-0.5)
        return self.finish(y.transpose(1, 2), g_BNHE), cache


class TopMixer(DiagonalMixer):
    """Attention among the edges that rows choose."""

    def forward(self, e_BTSC: Tensor, scores_BTS: Tensor, rows: Rows, state: State) -> tuple[Tensor, State]:
        gates_BTS = coordinate_descent(scores_BTS, rows.sees_BTS, SPARE * self.sizes.routed, self.sizes.iterations)
        count = min(self.sizes.routed, e_BTSC.shape[2])
        # by scores: gates of the same order may tie at 1
        chosen_BTK = scores_BTS.masked_fill(~rows.sees_BTS, -torch.inf).topk(count, dim=-1).indices
        there_BTK = rows.sees_BTS.gather(2, chosen_BTK)
        index_BTKC = chosen_BTK[..., None].expand(*chosen_BTK.shape, e_BTSC.shape[-1])
        doc_BN, pos_BN = (x.repeat_interleave(count, dim=1) for x in (rows.layout.doc_BT, rows.layout.pos_BT))
        queries = Layout(doc_BN, pos_BN, False)
        keys = Layout(doc_BN.masked_fill(~there_BTK.flatten(1), NOWHERE), pos_BN, False)
        y_BNC, after = self.among(e_BTSC.gather(2, index_BTKC).flatten(1, 2), queries, keys, state)
        y_BTKC = y_BNC.view(index_BTKC.shape) * gates_BTS.gather(2, chosen_BTK)[..., None].to(y_BNC.dtype)
        return torch.zeros_like(e_BTSC).scatter(2, index_BTKC, y_BTKC), None if state is None else after

    def flops_per_token(self, length: int) -> int:
        return self._count(length) * self.edge_flops() + self.halved_flops_per_token(length)

    def halved_flops_per_token(self, length: int) -> int:
        return self._count(length) ** 2 * super().halved_flops_per_token(length)

    def state_bytes(self, length: int) -> int:
        return self.sizes.routed * super().state_bytes(length)

    def _count(self, length: int) -> int:
        return min(self.sizes.routed, length)
