"""The relational transformer, made causal: queries, keys and values belong to pairs of tokens.

    q_ij = q_i + Q e_ij,   k_ij = k_j + K e_ij,   v_ij = v_j + V e_ij        for j <= i of the same document
    x_i += W_o sum_j softmax_j(q_ij.k_ij / sqrt(E)) v_ij;   x += Channel(Norm(x))
    e_ij += W [Norm(x_i), Norm(x_j), Norm(e_ij)]            e at first as in pretrain/edges/start.py

No q, k or v of a pair is ever made: per head, with n = Norm(e_ij) in the place of e,

    q_ij.k_ij = q_i.k_j + n.(K^T q_i + Q^T k_j + Q^T K n),      sum_j A_ij v_ij = sum_j A_ij v_j + V sum_j A_ij n_ij

takes T^2 H C numbers in the place of T^2 D. Rotary positions turn q_i.k_j alone: edges know the distance. Q, K and V
are 0 at first: it begins as attention. e_ji, of a later row, has no part in the update of e_ij.
Source: Relational Attention (arXiv 2210.05062), and its form in lucidrains/quartic-transformer (docs/QUARTIC.md).

Shapes: B rows, T tokens, S tokens so far, D width, H heads, E width of a head, C width of an edge.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from configs.schema import Config as Options
from configs.schema import key
from pretrain.block import site_of
from pretrain.config import ModelConfig
from pretrain.edges.part import EdgeUpdate, NodeMixer
from pretrain.edges.stack import EdgeLayer, EdgeStack
from pretrain.edges.start import Rows
from pretrain.init import constant, declare, linear, residual
from pretrain.norms import make_norm
from pretrain.ops.heads import head_width, split_heads
from pretrain.ops.talking import exact_scores, masked_softmax
from pretrain.stack import register


class Config(Options):
    """Mixers of the model are not used: attention is the stack's own."""

    heads: int = key(4, "match", "heads", gt=0)
    edge_width: int = key(16, "match", "width of an edge", gt=0)
    rope_base: float = key(10000.0, "match", "base of the rotary angles", gt=0)


class Keys(NamedTuple):
    """Of the tokens so far: rotated keys, values (B, H, S, E), and Q^T k of each (B, S, H, C)."""

    k: Tensor
    v: Tensor
    edge_k: Tensor


class RelationalAttention(NodeMixer):
    """Attention among tokens by way of their edges."""

    def __init__(self, options: Config, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.width, self.edge_width = options.heads, config.width, options.edge_width
        self.head_width = head_width(site_of(config, 0), options.heads, options.heads)
        self.base = options.rope_base if config.positions == "rope" else None
        self.qkv = linear(config.width, 3 * config.width, bias=config.bias)
        self.norm = make_norm(config.norm, options.edge_width, config.bias)
        shape = (self.heads, self.head_width, options.edge_width)
        self.edge_q, self.edge_k, self.edge_v = (nn.Parameter(torch.empty(shape)) for _ in range(3))
        declare(self, {name: constant(0.0) for name in ("edge_q", "edge_k", "edge_v")})
        self.out = residual(config.width, config.width, config.depth, bias=config.bias)

    def forward(
        self, x_BTD: Tensor, e_BTSC: Tensor, rows: Rows, state: Keys | None
    ) -> tuple[Tensor, None, Keys | None]:
        q, k, v = split_heads(self.qkv(x_BTD), self.heads, self.heads)
        edge_q_BTHC = torch.einsum("bhte,hec->bthc", q, self.edge_k)
        edge_k_BSHC = torch.einsum("bhse,hec->bshc", k, self.edge_q)
        if self.base is not None:
            rotary = rows.layout.rotary(self.head_width, self.base, x_BTD.dtype)
            q, k = rotary.rotate(q), rotary.rotate(k)
        if state is not None:
            state = Keys(
                torch.cat((state.k, k), dim=2),
                torch.cat((state.v, v), dim=2),
                torch.cat((state.edge_k, edge_k_BSHC), dim=1),
            )
            k, v, edge_k_BSHC = state
        n_BTSC = self.norm(e_BTSC)
        both_HCC = torch.einsum("hec,hed->hcd", self.edge_q, self.edge_k)
        edge_BTSHC = torch.einsum("btsc,hcd->btshd", n_BTSC, both_HCC) + edge_q_BTHC[:, :, None] + edge_k_BSHC[:, None]
        from_edges_BTSH = (edge_BTSHC * n_BTSC[:, :, :, None]).sum(-1) * self.head_width**-0.5
        scores_BHTS = exact_scores(q, k) + from_edges_BTSH.permute(0, 3, 1, 2)
        weights_BHTS = masked_softmax(scores_BHTS, rows.sees_BTS).to(v.dtype)
        seen_BTHC = weights_BHTS.transpose(1, 2) @ n_BTSC
        y_BTHE = (weights_BHTS @ v).transpose(1, 2) + torch.einsum("bthc,hec->bthe", seen_BTHC, self.edge_v)
        return self.out(y_BTHE.flatten(2)), None, state

    def initial_state(self, rows: int, like: Tensor) -> Keys:
        none = like.new_empty(rows, self.heads, 0, self.head_width)
        return Keys(none, none, like.new_empty(rows, 0, self.heads, self.edge_width))

    def flops_per_token(self, length: int) -> int:
        projections = 8 * self.width * self.width + 6 * self.width * self.edge_width
        return projections + self.halved_flops_per_token(length)

    def halved_flops_per_token(self, length: int) -> int:
        of_edges = self.heads * self.edge_width * (self.edge_width + 1)
        return length * (2 * self.width + of_edges)

    def state_bytes(self, length: int) -> int:
        return 2 * length * (2 * self.width + self.heads * self.edge_width)


class RelationalUpdate(EdgeUpdate):
    """W [Norm(x_i), Norm(x_j), Norm(e_ij)], token by token where it can. Its state: what W makes of x_j, (B, S, C)."""

    def __init__(self, options: Config, config: ModelConfig) -> None:
        super().__init__()
        self.width = options.edge_width
        self.norm = make_norm(config.norm, config.width, config.bias)
        self.edge_norm = make_norm(config.norm, options.edge_width, config.bias)
        self.row = residual(config.width, self.width, config.depth, bias=config.bias)
        self.column = residual(config.width, self.width, config.depth)
        self.edge = residual(self.width, self.width, config.depth)

    def forward(
        self, e_BTSC: Tensor, x_BTD: Tensor, told: None, rows: Rows, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x_BTD = self.norm(x_BTD)
        columns_BSC = self.column(x_BTD)
        if state is not None:
            columns_BSC = state = torch.cat((state, columns_BSC), dim=1)
        tokens_BTSC = self.row(x_BTD)[:, :, None] + columns_BSC[:, None]
        return e_BTSC + tokens_BTSC + self.edge(self.edge_norm(e_BTSC)), state

    def initial_state(self, rows: int, like: Tensor) -> Tensor:
        return like.new_empty(rows, 0, self.width)

    def flops_per_token(self, length: int) -> int:
        tokens = 2 * (self.row.weight.numel() + self.column.weight.numel())
        return tokens + self.halved_flops_per_token(length)

    def halved_flops_per_token(self, length: int) -> int:
        return length * self.edge.weight.numel()

    def state_bytes(self, length: int) -> int:
        return 2 * self.width * length


@register(Config)
class Relational(EdgeStack):
    def __init__(self, options: Config, config: ModelConfig) -> None:
        layers = [
            EdgeLayer(config, number, RelationalAttention(options, config), RelationalUpdate(options, config), 1)
            for number in range(config.depth)
        ]
        super().__init__(config, options.edge_width, layers)
