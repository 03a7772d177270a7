"""Coupling of a module's two models: each correlates what it asks with what the other one holds.

    x_a += g_a MHC(q from Norm(x_a); k, v from Norm(x_b)),  and x_b likewise, both from x before the update

MHC is the lagged correlation of Leviathan; g is a scalar that begins at 0, so that at first the two are independent.

Shapes: B rows, T tokens, D width, H heads, E width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.block import dropped
from pretrain.correlation.form import Heads
from pretrain.correlation.lag import make_lag
from pretrain.init import constant, declare, linear, residual
from pretrain.layout import Layout
from pretrain.mixer import ParamGroup, Site, State
from pretrain.norms import NormName, make_norm
from pretrain.ops.heads import head_width

ROPE_BASE = 10000.0


class Coupling(nn.Module):
    """One direction: what one model takes from the other."""

    def __init__(self, site: Site, norm: NormName, heads: int, lags: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.width, self.dropout = heads, site.width, dropout
        width = head_width(site, heads, heads)
        self.norm_own, self.norm_other = (make_norm(norm, site.width, site.bias) for _ in range(2))
        self.query = linear(site.width, site.width, bias=site.bias)
        self.key_value = linear(site.width, 2 * site.width, bias=site.bias)
        self.out = residual(site.width, site.width, site.depth, bias=site.bias)
        self.form = make_lag(
            Heads(heads, width, ROPE_BASE if site.positions == "rope" else None), lags, "geometric", False
        )
        self.gate = nn.Parameter(torch.empty(1))
        declare(self, {"gate": constant(0.0)})

    def forward(self, x_BTD: Tensor, other_BTD: Tensor, state: State, layout: Layout) -> tuple[Tensor, State]:
        """x after the update, and the state after it (None without one)."""
        q = self._split(self.query(self.norm_own(x_BTD)), 1)[0]
        k, v = self._split(self.key_value(self.norm_other(other_BTD)), 2)
        y_BHTE, state = self.form(q, k, v, layout, state)
        y_BTD = self.out(y_BHTE.transpose(1, 2).flatten(2))
        return x_BTD + self.gate * dropped(y_BTD, self.dropout, self.training), state

    def initial_state(self, rows: int, like: Tensor) -> State:
        """The state before the first token of `rows` streams."""
        return self.form.initial_state(rows, like)

    def flops_per_token(self, length: int) -> int:
        """Operations of a forward pass per token of a row of `length`."""
        return 8 * self.width * self.width + self.form.flops_per_token(length)

    def state_bytes(self, length: int) -> int:
        """Bytes of the state of one sequence after `length` tokens, in bf16."""
        return self.form.state_bytes(length)

    def param_groups(self) -> list[ParamGroup]:
        """Weights of lags do not decay."""
        own = tuple(f"form.{name}" for name, _ in self.form.named_parameters())
        return [ParamGroup(own, decay=False)] if own else []

    def _split(self, x_BTD: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, H, T, E) for each of the parts."""
        return x_BTD.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
