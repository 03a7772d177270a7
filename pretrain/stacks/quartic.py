"""The quartic transformer, made causal: every pair of tokens has a vector, an edge, and edges attend to edges.

    e_ij = W_r Norm(x_i) + W_c Norm(x_j) + rel(i - j)     for j <= i of the same document
    S_h = q_i.k_j / sqrt(E) + W_b Norm(e_ij),   A = softmax(S + talk S) over j,   x_i += W_o (sigmoid(g_i) * A v)
    e_ij += W_e A_ij;   x += Channel(Norm(x));   e += Mixer(e) for each edge mixer;   e += W_2 gelu(W_1 Norm(e))

W_b and talk are 0 at first: it begins as attention with gated heads. Time and memory of a row grow with T^2, with a
factor of some hundred. Source: lucidrains/quartic-transformer; the causal form is this project's (docs/QUARTIC.md).

Shapes: B rows, T tokens, S tokens so far, D width, H heads, E width of a head, C width of an edge.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Config as Options
from configs.schema import key
from pretrain.block import site_of
from pretrain.channel import hidden_width
from pretrain.config import ModelConfig
from pretrain.edges.linear import ColumnMixer, PrefixMixer, RowMixer
from pretrain.edges.mixer import EdgeMixer, EdgeSizes
from pretrain.edges.part import EdgeUpdate, NodeMixer
from pretrain.edges.routed import DiagonalMixer, TopMixer
from pretrain.edges.stack import EdgeLayer, EdgeStack
from pretrain.edges.start import Rows
from pretrain.init import constant, declare, linear, residual
from pretrain.mixer import State
from pretrain.norms import make_norm
from pretrain.ops.heads import head_width, split_heads
from pretrain.ops.talking import exact_scores, masked_softmax, talk
from pretrain.stack import register

EDGE_MIXERS: dict[str, type[EdgeMixer]] = {
    "row": RowMixer,
    "col": ColumnMixer,
    "prefix": PrefixMixer,
    "top": TopMixer,
    "diagonal": DiagonalMixer,
}


class Config(Options):
    """Mixers of the model are not used: attention is the stack's own."""

    heads: int = key(4, "match", "heads of attention among tokens", gt=0)
    rope_base: float = key(10000.0, "match", "base of the rotary angles", gt=0)
    streams: int = key(1, "match", "residual streams of tokens; more than 1: hyper-connections", gt=0)
    edge_width: int = key(16, "match", "width of an edge", gt=0)
    edge_heads: int = key(2, "match", "heads of attention among edges", gt=0)
    edge_head_width: int = key(4, "match", "width of such a head; linear attention costs its cube", gt=0)
    edge_mixers: tuple[Literal["row", "col", "prefix", "top", "diagonal"], ...] = key(
        ("row", "col"), "match", "attention among edges, one after the other (docs/QUARTIC.md); may be none"
    )
    edge_mult: float = key(2.0, "match", "hidden width of the edges' feed-forward as a multiple of edge_width", gt=0)
    routed: int = key(8, "match", "edges that each row chooses for `top`", gt=0)
    iterations: int = key(20, "match", "passes of the choice for `top`", gt=0)


class Attended(NamedTuple):
    """What attention among tokens tells edges: scores averaged over heads, and weights."""

    scores_BTS: Tensor
    weights_BHTS: Tensor


class NodeAttention(NodeMixer):
    """Attention among tokens, biased by edges. Its state: keys and values, (B, H, S, E) each."""

    def __init__(self, options: Config, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.width = options.heads, config.width
        self.head_width = head_width(site_of(config, 0), options.heads, options.heads)
        self.base = options.rope_base if config.positions == "rope" else None
        self.qkv = linear(config.width, 3 * config.width, bias=config.bias)
        self.gate = linear(config.width, options.heads, bias=config.bias)
        self.edge_norm = make_norm(config.norm, options.edge_width, config.bias)
        self.edge_bias = nn.Linear(options.edge_width, options.heads, bias=False)
        declare(self.edge_bias, {"weight": constant(0.0)})
        self.talk = nn.Parameter(torch.empty(options.heads, options.heads))
        declare(self, {"talk": constant(0.0)})
        self.out = residual(config.width, config.width, config.depth, bias=config.bias)

    def forward(self, x_BTD: Tensor, e_BTSC: Tensor, rows: Rows, state: State) -> tuple[Tensor, Attended, State]:
        q, k, v = split_heads(self.qkv(x_BTD), self.heads, self.heads)
        if self.base is not None:
            rotary = rows.layout.rotary(self.head_width, self.base, x_BTD.dtype)
            q, k = rotary.rotate(q), rotary.rotate(k)
        if state is not None:
            k, v = state = tuple(torch.cat(pair, dim=2) for pair in zip(state, (k, v)))
        bias_BHTS = self.edge_bias(self.edge_norm(e_BTSC)).permute(0, 3, 1, 2)
        scores = exact_scores(q, k) + bias_BHTS
        weights = masked_softmax(talk(scores, self.talk), rows.sees_BTS).to(v.dtype)
        y_BTHE = (weights @ v).transpose(1, 2) * self.gate(x_BTD).sigmoid()[..., None]
        return self.out(y_BTHE.flatten(2)), Attended(scores.mean(1), weights), state

    def initial_state(self, rows: int, like: Tensor) -> State:
        none = like.new_empty(rows, self.heads, 0, self.head_width)
        return none, none

    def flops_per_token(self, length: int) -> int:
        return 2 * self.width * (4 * self.width + self.heads) + self.halved_flops_per_token(length)

    def halved_flops_per_token(self, length: int) -> int:
        return length * (2 * self.width + self.edge_bias.weight.numel() + self.talk.numel())

    def state_bytes(self, length: int) -> int:
        return 2 * 2 * self.width * length


class QuarticUpdate(EdgeUpdate):
    """What edges learn from attention among tokens and from each other."""

    def __init__(self, options: Config, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = options.edge_width, hidden_width(options.edge_mult, options.edge_width, "edge_mult")
        sizes = EdgeSizes(width, options.edge_heads, options.edge_head_width, options.routed, options.iterations)
        self.learn = residual(options.heads, width, config.depth, bias=config.bias)
        self.mixers = nn.ModuleList(EDGE_MIXERS[name](sizes, config) for name in options.edge_mixers)
        self.norm = make_norm(config.norm, width, config.bias)
        self.up = linear(width, hidden, bias=config.bias)
        self.down = residual(hidden, width, config.depth, bias=config.bias)

    def forward(self, e_BTSC: Tensor, x_BTD: Tensor, told: Attended, rows: Rows, state: State) -> tuple[Tensor, State]:
        e_BTSC = e_BTSC + self.learn(told.weights_BHTS.permute(0, 2, 3, 1))
        states = []
        for mix, before in zip(self.mixers, state or [None] * len(self.mixers)):
            y_BTSC, after = mix(e_BTSC, told.scores_BTS, rows, before)
            e_BTSC = e_BTSC + y_BTSC
            states.append(after)
        e_BTSC = e_BTSC + self.down(F.gelu(self.up(self.norm(e_BTSC))))
        return e_BTSC, None if state is None else tuple(states)

    def initial_state(self, rows: int, like: Tensor) -> State:
        return tuple(mix.initial_state(rows, like) for mix in self._mixers())

    def flops_per_token(self, length: int) -> int:
        return self._own_flops(length) + sum(mix.flops_per_token(length) for mix in self._mixers())

    def halved_flops_per_token(self, length: int) -> int:
        return self._own_flops(length) + sum(mix.halved_flops_per_token(length) for mix in self._mixers())

    def state_bytes(self, length: int) -> int:
        return sum(mix.state_bytes(length) for mix in self._mixers())

    def _own_flops(self, length: int) -> int:
        return length * sum(part.weight.numel() for part in (self.learn, self.up, self.down))

    def _mixers(self) -> list[EdgeMixer]:
        return list(self.mixers)  # type: ignore[arg-type]


@register(Config)
class Quartic(EdgeStack):
    def __init__(self, options: Config, config: ModelConfig) -> None:
        layers = [
            EdgeLayer(config, number, NodeAttention(options, config), QuarticUpdate(options, config), options.streams)
            for number in range(config.depth)
        ]
        super().__init__(config, options.edge_width, layers)
