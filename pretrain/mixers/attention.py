"""Causal softmax attention (Vaswani et al., arXiv 1706.03762), masked at document boundaries.

    y = softmax(q k^T / sqrt(E)) v      with q = x Wq, k = x Wk, v = x Wv, per head, then Wo

`kv_heads` = heads is multi-head, 1 is multi-query (arXiv 1911.02150), between them grouped-query (arXiv 2305.13245).
"""

from __future__ import annotations

from torch import Tensor

from configs.schema import Config as Options
from configs.schema import key
from pretrain.init import linear, residual
from pretrain.mixer import Layout, Site, TokenMixer, register
from pretrain.ops.attention import attend, attend_naive
from pretrain.ops.heads import Cache, empty_cache, extend, head_width, split_heads, visible


class Config(Options):
    heads: int = key(4, "match", "query heads", gt=0)
    kv_heads: int | None = key(None, "match", "key and value heads; empty: as many as query heads, 1: MQA", gt=0)
    rope_base: float = key(10000.0, "match", "base of the rotary angles", gt=0)


@register(Config)
class Attention(TokenMixer):
    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.base = config.rope_base if site.positions == "rope" else None
        self.width, self.head_width = site.width, head_width(site, self.heads, self.kv_heads)
        self.qkv = linear(site.width, (self.heads + 2 * self.kv_heads) * self.head_width, bias=site.bias)
        self.out = residual(site.width, site.width, site.depth, bias=site.bias)

    def forward(self, x_BTD: Tensor, layout: Layout, state: Cache | None = None) -> tuple[Tensor, Cache | None]:
        q, k, v = split_heads(self.qkv(x_BTD), self.heads, self.kv_heads)
        if self.base is not None:
            rotary = layout.rotary(self.head_width, self.base, x_BTD.dtype)
            q, k = rotary.rotate(q), rotary.rotate(k)
        scale = self.head_width**-0.5
        if state is None:
            y = attend(q, k, v, layout, scale)
        else:
            state = extend(state, k, v, layout)
            y = attend_naive(q, state.k, state.v, visible(layout, state), scale)
        return self.out(y.transpose(1, 2).flatten(2)), state

    def initial_state(self, rows: int, like: Tensor) -> Cache:
        return empty_cache(rows, self.kv_heads, self.head_width, like)

    def flops_per_token(self, length: int) -> int:
        projections = 2 * self.width * (2 * self.width + 2 * self.kv_heads * self.head_width)
        return projections + self.halved_flops_per_token(length)

    def halved_flops_per_token(self, length: int) -> int:
        return 2 * length * self.width

    def state_bytes(self, length: int) -> int:
        return 2 * 2 * self.kv_heads * self.head_width * length
