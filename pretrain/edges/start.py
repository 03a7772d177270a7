"""Edges, vectors of pairs of tokens, and what they begin as.

    e_ij = W_r Norm(x_i) + W_c Norm(x_j) + rel(i - j)        for every j of i's document that is not later than i

so that at every layer e_ij is to be a function of the tokens up to i, the later of the two. The rest of the matrix is
computed and never seen. `rel` is a small perceptron of log(1 + i - j), evaluated once for each distance.

Shapes: B rows, T tokens of a piece, S tokens so far, D width of a token, C width of an edge.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.init import constant, declare, linear, normal
from pretrain.layout import Layout
from pretrain.norms import make_norm
from pretrain.ops.scan import exact


class Seen(NamedTuple):
    """Tokens so far: W_c x of each (B, S, C), its document and its position (B, S)."""

    columns_BSC: Tensor
    doc_BS: Tensor
    pos_BS: Tensor


class Rows(NamedTuple):
    """The rows of edges of a piece. layout: of the piece. sees_BTS: bool, which edges there are."""

    layout: Layout
    sees_BTS: Tensor


class _ExactLinear(nn.Linear):
    """In fp32 or better: logarithms of neighbouring distances are the same number in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        kind = exact(self.weight.dtype)
        return F.linear(x.to(kind), self.weight.to(kind), self.bias.to(kind))


def _exact_linear(fan_in: int, fan_out: int) -> nn.Linear:
    layer = _ExactLinear(fan_in, fan_out)
    declare(layer, {"weight": normal(fan_in**-0.5), "bias": constant(0.0)})
    return layer


class EdgeStart(nn.Module):
    """The edges of a piece, out of its tokens and those before it."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.width = width
        self.norm = make_norm(config.norm, config.width, config.bias)
        self.row = linear(config.width, width, bias=config.bias)
        self.column = linear(config.width, width, bias=config.bias)
        # without biases it would tell distances by the size of one direction alone
        self.log_distance, self.distance = (_exact_linear(fan_in, width) for fan_in in (1, width))

    def forward(self, x_BTD: Tensor, layout: Layout, seen: Seen | None) -> tuple[Tensor, Rows, Seen | None]:
        """(B, T, S, C) edges, where they are, and what was seen with this piece behind it."""
        x_BTD = self.norm(x_BTD)
        columns = self.column(x_BTD)
        sees = layout.mask()[:, 0]
        if seen is not None:
            now = (columns, layout.doc_BT, layout.pos_BT)
            seen = Seen(*(torch.cat(pair, dim=1) for pair in zip(seen, now)))
            columns = seen.columns_BSC
            sees = (layout.doc_BT[:, :, None] == seen.doc_BS[:, None]) & (
                layout.pos_BT[:, :, None] >= seen.pos_BS[:, None]
            )
        e_BTSC = self.row(x_BTD)[:, :, None] + columns[:, None] + self._relative(x_BTD, columns.shape[1])
        return e_BTSC, Rows(layout, sees), seen

    def initial_state(self, rows: int, like: Tensor) -> Seen:
        """What was seen before the first token."""
        places = torch.empty(rows, 0, dtype=torch.long, device=like.device)
        return Seen(like.new_empty(rows, 0, self.width), places, places)

    def flops_per_token(self) -> int:
        """Operations of a forward pass per token; those of the distances are shared by a batch and not counted."""
        return 2 * (self.row.weight.numel() + self.column.weight.numel())

    def state_bytes(self, length: int) -> int:
        """Bytes of what was seen, in bf16."""
        return 2 * self.width * length

    def _relative(self, x_BTD: Tensor, count: int) -> Tensor:
        """rel of the last T of `count` tokens: (T, S, C). Documents do not have gaps: places tell distances."""
        places = torch.arange(count, device=x_BTD.device)
        table_SC = self.distance(F.silu(self.log_distance(places[:, None].float().log1p()))).to(x_BTD.dtype)
        return table_SC[(places[count - x_BTD.shape[1] :, None] - places).clamp(min=0)]
