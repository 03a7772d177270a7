"""Combination of modules by correlation: of all modules and positions, what is relevant to each token.

    u_t = Norm(sum_m W_u^m h^m_t),  q_t = W_q u_t,  k^m_s = W_k^m h^m_s,  v^m_s = W_v^m h^m_s
    S[t, (m, s)] = E^-1/2 sum_{l < L} w_l <q_{t-l}, k^m_{s-l}>,  s <= t;   A = softmax over all (m, s)
    relevance pi_{t,m} = mean over heads of sum_s A[t, (m, s)];  only the `top` modules are kept, A and pi renormalised
    mixture p = sum_m pi_{t,m} softmax(z^m_t + W_o concat_h sum_{m, s} A v^m_s)

The softmax over (m, s) is made of one over s for each module and one over modules of their log sums.

Shapes: M modules, B rows, T tokens, S keys, D width of a module, F width of the fusion, H heads, E = F / H,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.correlation.lag import first_weights
from pretrain.ensemble.shapes import Order, groups_of
from pretrain.groups import grouped, parts_of
from pretrain.init import Linear, constant, declare, linear, normal, values
from pretrain.layout import Layout
from pretrain.members import Members
from pretrain.mixer import ParamGroup
from pretrain.norms import RmsNorm
from pretrain.ops.heads import Cache, empty_cache, extend, visible
from pretrain.ops.lags import lag_scores, stack_keys, stack_queries
from pretrain.ops.scan import exact


class Fused(NamedTuple):
    """log_pi_MBT: log of the relevance, -inf for modules that are left out. log_all_MBT: before any was left out.
    found_BTF: what was found, before W_o."""

    log_pi_MBT: Tensor
    log_all_MBT: Tensor
    found_BTF: Tensor | None


class Stream(NamedTuple):
    """Keys and values of all modules (B, M H, S, E), and the last L - 1 queries' products with them."""

    cache: Cache
    rows: Tensor


class Fusion(nn.Module):
    """One for the whole ensemble; what it keeps for a module is named as that module's own."""

    def __init__(self, model: ModelConfig, vocab: int) -> None:
        super().__init__()
        config, groups, self.order = model.ensemble, groups_of(model), Order(model)
        own, count = config.width, len(config.modules)
        self.count, self.heads, self.lags, self.top = count, config.heads, config.lags, config.top
        # of all modules together
        self.width = sum(len(group.ensemble.modules) * group.width for group in groups)
        self.inner, self.vocab = own, vocab
        self.scale = (own // config.heads) ** -0.5
        std = {group.width: (count * group.width) ** -0.5 for group in groups}
        self.mix = grouped([Members(partial(_linear, g.width, own, std[g.width]), g.ensemble.modules) for g in groups])
        self.norm = RmsNorm(own)
        self.query = linear(own, own)
        self.key_value = grouped([Members(partial(linear, g.width, 2 * own), g.ensemble.modules) for g in groups])
        self.weights = nn.Parameter(torch.empty(self.heads, self.lags, 1))
        declare(self, {"weights": values(lambda: first_weights("geometric", self.heads, self.lags)[..., None])})
        self.out = nn.Linear(own, vocab, bias=False)
        declare(self.out, {"weight": constant(0.0)})

    def forward(
        self, groups: Sequence[Tensor], layout: Layout, present: Sequence[bool], state: Stream | None = None
    ) -> tuple[Fused, Stream | None]:
        """What is relevant to each token. groups: h_MBTD of the modules of each shape. present: of each module whether
        it is there at all."""
        theres = [
            h.new_tensor([present[place] for place in own]).view(-1, 1, 1, 1)
            for h, own in zip(groups, self.order.groups)
        ]
        groups = [h_MBTD * there for h_MBTD, there in zip(groups, theres)]
        u, *others = [mix(h_MBTD).sum(0) for mix, h_MBTD in zip(parts_of(self.mix), groups)]
        q = self.query(self.norm(sum(others, u))).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        found = [key_value(h_MBTD) for key_value, h_MBTD in zip(parts_of(self.key_value), groups)]
        k, v = self._all_heads(self.order.of_all(found))
        weights = self.weights.to(q.dtype)
        if state is None:
            scores, v_all = self._scores(q, k, weights, layout), v
        else:
            scores, state = self._stream(q, k, v, weights, layout, state)
            v_all = state.cache.v
        return self._combined(scores, v_all, self.order.of_all(theres).view(1, -1, 1, 1) > 0), state

    def _all_heads(self, kv_MBTF: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M H, T, E) keys and values of all modules."""
        parts = kv_MBTF.unflatten(-1, (2, self.heads, -1)).permute(3, 1, 0, 4, 2, 5).flatten(2, 3)
        return parts[0], parts[1]

    def _scores(self, q: Tensor, k: Tensor, weights: Tensor, layout: Layout) -> Tensor:
        """(B, M H, T, T), -inf where a query may not see."""
        stacked_q = stack_queries(q * self.scale, weights, self.lags).repeat(1, self.count, 1, 1)
        stacked_k = stack_keys(k, self.lags, layout)
        return (stacked_q @ stacked_k.transpose(-1, -2)).add_(layout.mask_bias(q.dtype))

    def _stream(
        self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, layout: Layout, state: Stream
    ) -> tuple[Tensor, Stream]:
        cache = extend(state.cache, k, v, layout)
        before = torch.nn.functional.pad(state.rows, (0, k.shape[2]))
        queries = (q * self.scale).repeat(1, self.count, 1, 1)
        rows = torch.cat((before, queries @ cache.k.transpose(-1, -2)), dim=2)
        every = weights.repeat(self.count, 1, 1)[..., 0]
        scores = lag_scores(rows, every, layout.pos_BT, cache.pos_BS)
        scores = scores.masked_fill(~visible(layout, cache), -torch.inf)
        return scores, Stream(cache, rows[:, :, rows.shape[2] - (self.lags - 1) :])

    def _combined(self, scores: Tensor, v: Tensor, there: Tensor) -> Fused:
        # in bf16 shares would add up to 1 only to two digits, and the mixture's loss be off by as much
        size, scores = (self.count, self.heads), scores.to(exact(scores.dtype))
        total = scores.logsumexp(-1, keepdim=True)
        found = ((scores - total).exp().to(v.dtype) @ v).unflatten(1, size)
        log_mass = total.squeeze(-1).unflatten(1, size).masked_fill(~there, -torch.inf).log_softmax(1)
        log_all_BMT = log_mass.logsumexp(2) - torch.tensor(self.heads).log().to(log_mass.dtype)
        least = log_all_BMT.topk(self.top, dim=1).values[:, -1:]
        left_out = (log_all_BMT < least) | ~there.view(1, -1, 1)
        log_pi_BMT = log_all_BMT.masked_fill(left_out, -torch.inf).log_softmax(1)
        mass = log_mass.masked_fill(left_out[:, :, None], -torch.inf).softmax(1)
        found_BTHE = (mass.to(v.dtype)[..., None] * found).sum(1).transpose(1, 2)
        return Fused(log_pi_BMT.transpose(0, 1), log_all_BMT.transpose(0, 1), found_BTHE.flatten(2))

    def initial_state(self, rows: int, like: Tensor) -> Stream:
        """The state before the first token of `rows` streams."""
        heads = self.count * self.heads
        return Stream(
            empty_cache(rows, heads, self.inner // self.heads, like), like.new_zeros(rows, heads, self.lags - 1, 0)
        )

    def flops_per_token(self, length: int) -> int:
        """Operations of a forward pass per token of a row of `length`, W_o included."""
        of_modules = 6 * self.width * self.inner + self.count * (self.lags + 1) * length * self.inner
        return of_modules + 2 * self.inner * self.inner + 2 * self.inner * self.vocab

    def state_bytes(self, length: int) -> int:
        """Bytes of the state of one sequence after `length` tokens, in bf16."""
        return 2 * self.count * (2 * self.inner + self.heads * (self.lags - 1)) * length

    def param_groups(self) -> list[ParamGroup]:
        """Weights of lags do not decay."""
        return [ParamGroup(("weights",), decay=False)]


def _linear(fan_in: int, fan_out: int, std: float) -> nn.Linear:
    layer = Linear(fan_in, fan_out, bias=False)
    declare(layer, {"weight": normal(std)})
    return layer
