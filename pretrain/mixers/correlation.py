"""Leviathan's multi-headed correlation (MHC), causal and differentiable: queries meet keys at a displacement.

    lag  y = softmax_s(S) v,  S[t, s] = sum_{l < L} w_l <q_{t-l}, k_{s-l}> / sqrt(E),  s <= t,  within a document

The published operator correlates queries with keys across batch and future, detached from autograd. Every form here
stays inside one head of one document: `corr` chooses it, pretrain/correlation has them, docs/CORRELATION.md tells which
is for what. The default is the windowed cross-correlation at displacement t - s; with one lag it is attention.

Source: "Leviathan" (attention-free-revolution); the causal definitions are this project's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from configs.schema import Config as Options
from configs.schema import key
from pretrain.correlation.convolution import Fft, FftSelf
from pretrain.correlation.diagonal import Iir, PrefixMean
from pretrain.correlation.form import Form, Heads
from pretrain.correlation.lag import LagInit, make_lag
from pretrain.correlation.lagbank import LagBank
from pretrain.correlation.seed import SeedEma, SeedFft
from pretrain.init import constant, declare, linear, residual
from pretrain.mixer import Layout, ParamGroup, Site, State, TokenMixer, register
from pretrain.ops.heads import head_width, split_heads

_FORMS: dict[str, tuple[Callable[..., Form], tuple[str, ...]]] = {
    # each with the options that are its own, in the order it takes them
    "lag": (make_lag, ("lags", "lag_init", "lag_channelwise")),
    "iir": (Iir, ()),
    "prefix_mean": (PrefixMean, ()),
    "lagbank": (LagBank, ("window",)),
    "fft": (Fft, ("n_exp",)),
    "fft_self": (FftSelf, ()),
    "seed_fft": (SeedFft, ()),
    "seed_ema": (SeedEma, ()),
}
_UNROTATED = ("fft", "fft_self")
"""Forms whose queries and keys meet no position, so that there is nothing to rotate."""
_EPS = 1e-6


class Config(Options):
    heads: int = key(4, "match", "heads", gt=0)
    corr: Literal["lag", "iir", "prefix_mean", "lagbank", "fft", "fft_self", "seed_fft", "seed_ema"] = key(
        "lag", "match", "the form of the correlation"
    )
    lags: int = key(4, "match", "of `lag`: lags L; 1 is attention", gt=0)
    lag_init: LagInit = key("geometric", "match", "of `lag`: how the weights of the lags begin")
    lag_channelwise: bool = key(False, "match", "of `lag`: weights for each channel, or rotated pair, not each head")
    window: int = key(32, "match", "of `lagbank`: displacements W that a token sees", gt=0)
    n_exp: int = key(4, "match", "of `fft`: exponentials in the filter of a channel", gt=0)
    qk_norm: bool = key(False, "match", "RMSNorm of queries and keys, each with a gain for every channel of a head")
    rope_base: float = key(10000.0, "match", "base of the rotary angles", gt=0)

    @model_validator(mode="after")
    def _has_only_options_of_its_form(self) -> Config:
        own = _FORMS[self.corr][1]
        for name in sorted(self.model_fields_set & {name for _, names in _FORMS.values() for name in names}):
            if name not in own:
                takes = f"takes {', '.join(own)}" if own else "has no options of its own"
                raise ValueError(f"{name} does not belong to corr {self.corr}, which {takes}; remove it")
        if self.corr in _UNROTATED and "rope_base" in self.model_fields_set:
            raise ValueError(f"rope_base does not belong to corr {self.corr}, which rotates nothing; remove it")
        return self


@register(Config)
class Correlation(TokenMixer):
    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        self.width, self.heads = site.width, config.heads
        rotates = site.positions == "rope" and config.corr not in _UNROTATED
        turned = site if rotates else replace(site, positions="none")
        self.head_width = head_width(turned, self.heads, self.heads)
        self.qkv = linear(site.width, 3 * site.width, bias=site.bias)
        self.out = residual(site.width, site.width, site.depth, bias=site.bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_gain, self.k_gain = (nn.Parameter(torch.empty(self.head_width)) for _ in range(2))
            declare(self, {"q_gain": constant(1.0), "k_gain": constant(1.0)})
        base = config.rope_base if rotates else None
        make, own = _FORMS[config.corr]
        self.form = make(Heads(self.heads, self.head_width, base), *(getattr(config, name) for name in own))
        self.rounding, self.dense = self.form.rounding, self.form.dense

    def forward(self, x_BTD: Tensor, layout: Layout, state: State = None) -> tuple[Tensor, State]:
        q, k, v = split_heads(self.qkv(x_BTD), self.heads, self.heads)
        if self.qk_norm:
            q, k = (F.rms_norm(x, (self.head_width,), w, _EPS) for x, w in ((q, self.q_gain), (k, self.k_gain)))
        y_BHTE, state = self.form(q, k, v, layout, state)
        return self.out(y_BHTE.transpose(1, 2).flatten(2)), state

    def initial_state(self, rows: int, like: Tensor) -> Any:
        return self.form.initial_state(rows, like)

    def flops_per_token(self, length: int) -> int:
        return 8 * self.width * self.width + self.form.flops_per_token(length)

    def halved_flops_per_token(self, length: int) -> int:
        return self.form.halved_flops_per_token(length)

    def state_bytes(self, length: int) -> int:
        return self.form.state_bytes(length)

    def param_groups(self) -> list[ParamGroup]:
        own = tuple(f"form.{name}" for name, _ in self.form.named_parameters())
        return [ParamGroup(own, decay=False)] if own else []
