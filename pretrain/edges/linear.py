"""Linear attention among edges (pretrain/ops/taylor.py): along a row, a column, or over all rows so far.

    row      (i, j) sees (i, j')    for every j'
    column   (i, j) sees (i', j)    for i' <= i
    prefix   (i, j) sees (i', j')   for i' <= i and every j'

always among edges there are: of one document, the later token first. Row i is complete when token i is, so rows and
columns are not alike: within a row every j' is in the past of the pair, along a column only what is above.

Shapes: B rows, T rows of edges, S columns, C width of an edge, H heads, E width of a head, P features, U = E + 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.edges.mixer import EdgeMixer
from pretrain.edges.start import Rows
from pretrain.layout import Layout
from pretrain.mixer import State
from pretrain.ops.scan import exact
from pretrain.ops.taylor import feature_count, scan_flops, taylor_read, taylor_scan, taylor_sums, with_one


class RowMixer(EdgeMixer):
    """Each row by itself: no state, as a row is never looked at again."""

    def forward(self, e_BTSC: Tensor, scores_BTS: Tensor, rows: Rows, state: State) -> tuple[Tensor, State]:
        *qkv, g_BTSHE = self.project(e_BTSC)
        q, k, v = (x.transpose(2, 3) for x in qkv)
        sums_BTHPU = taylor_sums(k, with_one(v, rows.sees_BTS[:, :, None, :, None]))
        sums_BTHPU, state = self._gathered(sums_BTHPU, rows.layout, state)
        return self.finish(taylor_read(q, sums_BTHPU).transpose(2, 3), g_BTSHE), state

    def initial_state(self, rows: int, like: Tensor) -> State:
        return ()

    def halved_flops_per_token(self, length: int) -> int:
        return length * (self.edge_flops() + 4 * self._sum_size()) // 2

    def state_bytes(self, length: int) -> int:
        return 0

    def _gathered(self, sums_BTHPU: Tensor, layout: Layout, state: State) -> tuple[Tensor, State]:
        """What each row reads, out of the sums of all rows."""
        return sums_BTHPU, state

    def _sum_size(self) -> int:
        return self.sizes.heads * feature_count(self.sizes.head_width) * (self.sizes.head_width + 1)


class PrefixMixer(RowMixer):
    """Rows read the sums of all rows so far: attention over the whole graph of edges, with a state of constant size."""

    def initial_state(self, rows: int, like: Tensor) -> Tensor:
        heads, width = self.sizes.heads, self.sizes.head_width
        return like.new_zeros(rows, heads, feature_count(width), width + 1, dtype=exact(like.dtype))

    def halved_flops_per_token(self, length: int) -> int:
        return super().halved_flops_per_token(length) + length * self._sum_size()

    def state_bytes(self, length: int) -> int:
        return 2 * self._sum_size()

    def _gathered(self, sums_BTHPU: Tensor, layout: Layout, state: State) -> tuple[Tensor, State]:
        sums = sums_BTHPU.to(exact(sums_BTHPU.dtype))
        # a product with the mask, not a cumulative sum: nothing is ever taken away again at the start of a document
        total = (layout.mask()[:, 0].to(sums.dtype) @ sums.flatten(2)).view_as(sums)
        if state is not None:
            goes_on_BT = layout.pos_BT > torch.arange(sums.shape[1], device=sums.device)
            total = total + goes_on_BT[:, :, None, None, None] * state[:, None]
            state = total[:, -1]
        return total.to(sums_BTHPU.dtype), state


class ColumnMixer(EdgeMixer):
    """Each column by itself, downwards. Its state are the sums of all columns: they grow with the text."""

    def forward(self, e_BTSC: Tensor, scores_BTS: Tensor, rows: Rows, state: State) -> tuple[Tensor, State]:
        *qkv, g_BTSHE = self.project(e_BTSC)
        q, k, v = (x.permute(0, 2, 3, 1, 4) for x in qkv)
        # edges of other documents are not there: a column that its document has left is not read again
        there = rows.sees_BTS.transpose(1, 2)[:, :, None, :, None]
        before = self.initial_state(len(e_BTSC), e_BTSC) if state is None else state
        before_BSHPU = F.pad(before, (0, 0) * 3 + (0, e_BTSC.shape[2] - before.shape[1]))
        y_BSHTE, sums = taylor_scan(q, k, with_one(v, there), before_BSHPU)
        return self.finish(y_BSHTE.permute(0, 3, 1, 2, 4), g_BTSHE), None if state is None else sums

    def initial_state(self, rows: int, like: Tensor) -> Tensor:
        heads, width = self.sizes.heads, self.sizes.head_width
        return like.new_zeros(rows, 0, heads, feature_count(width), width + 1, dtype=exact(like.dtype))

    def halved_flops_per_token(self, length: int) -> int:
        return length * (self.edge_flops() + self.sizes.heads * scan_flops(length, self.sizes.head_width)) // 2

    def state_bytes(self, length: int) -> int:
        heads, width = self.sizes.heads, self.sizes.head_width
        return 2 * length * heads * feature_count(width) * (width + 1)
