"""Sparse mixture of experts: each token is read by the k of E small networks that a router chooses for it.

    p = softmax(W_r f)                  in fp32; f is the token, or the mean of the tokens just before it and itself
    chosen = the k largest of p + b     b is 0, unless loads are balanced by it
    y = sum_{e chosen} g_e W2_e act(W1_e x),   g = p over the chosen, divided by their sum; where k = 1, p itself, for
                                               of one alone the sum would leave the router nothing to learn by

Dropless: as many rows as tokens times k are computed, whatever the load, so that no token's output depends on others.
Choice by token, as choice by expert is not causal (arXiv 2603.11535). An expert has mult * D / (k + shared) hidden
units: a token meets as many parameters as in mlp.

Loads are balanced by a loss, E sum_e f_e mean(p_e) with f_e the share of rows that expert e has (arXiv 2101.03961), or
without one (arXiv 2412.19437): b_e rises by a fixed step after an update in which e had less than its share, and falls
after one in which it had more. b only chooses; it does not weigh. The loss mean(lse^2) keeps the logits small (arXiv
2202.08906).

Shapes: B rows, T tokens, N = B T, K = k, A = N K, E experts, D width, L tokens that decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from pydantic import model_validator
from torch import Tensor, nn

from configs.schema import Config as Options
from configs.schema import key
from pretrain.channel import Aux, ChannelMixer, hidden_width, register
from pretrain.init import constant, declare, normal
from pretrain.layout import Layout
from pretrain.mixer import ParamGroup, Site
from pretrain.ops.experts import Experts, permuted, sorting
from pretrain.ops.mapped import is_mapped


class Config(Options):
    experts: int = key(8, "match", "how many experts there are", gt=0)
    top_k: int = key(2, "match", "experts that each token is read by", gt=0)
    shared: int = key(0, "match", "experts beside them that read every token", ge=0)
    mult: float = key(4.0, "match", "hidden width of all experts of a token, as a multiple of the width", gt=0)
    activation: Literal["gelu", "relu", "leaky_relu", "swiglu"] = key(
        "gelu", "match", "the function between the two layers; swiglu has a third, so mult 8/3 costs what 4 does"
    )
    balance: Literal["loss", "bias", "none"] = key("loss", "match", "what spreads tokens over experts")
    balance_loss: float = key(0.01, "match", "weight of the balancing loss", ge=0)
    bias_step: float = key(0.001, "match", "how far `balance: bias` moves an expert's bias at a time", gt=0)
    z_loss: float = key(0.001, "match", "weight of the loss on the router's logits", ge=0)
    corr_router: int = key(1, "match", "last tokens of the document whose mean decides; 1: the token alone", gt=0)

    @model_validator(mode="after")
    def _has_enough(self) -> Config:
        if self.top_k > self.experts:
            raise ValueError(f"has top_k {self.top_k} of {self.experts} experts; choose at most all of them")
        for name, needed in (("balance_loss", "loss"), ("bias_step", "bias")):
            if name in self.model_fields_set and self.balance != needed:
                raise ValueError(
                    f"{name} does nothing with balance {self.balance}; remove it, or set balance: {needed}"
                )
        return self


class Router(nn.Module):
    """Logits of the experts, and the biases that choose among them. `nudges`: steps up minus steps down, whole numbers,
    so that the biases are the same on all ranks and in every precision."""

    nudges: Tensor | None

    def __init__(self, width: int, experts: int, biased: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("nudges", torch.empty(experts, dtype=torch.long) if biased else None)
        declare(self, {"weight": normal(width**-0.5), "nudges": constant(0)})

    def forward(self, features_ND: Tensor) -> Tensor:
        """(N, E), in fp32 or better: bf16 has three digits, and choices hang on less."""
        at_least = torch.promote_types(features_ND.dtype, torch.float32)
        return nn.functional.linear(features_ND.to(at_least), self.weight.to(at_least))


class Choice(NamedTuple):
    """What the router decided: log p (N, E), log of the sum of exp of the logits (N,), the chosen (N, K), gates (N, K),
    and which are chosen (N, E), as 0 and 1."""

    log_p_NE: Tensor
    lse_N: Tensor
    index_NK: Tensor
    gate_NK: Tensor
    chosen_NE: Tensor


@register(Config)
class MixtureOfExperts(ChannelMixer):
    rounding = True  # a product of other rows beside a token's own may round it otherwise

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        self.config, self.width = config, site.width
        hidden = hidden_width(config.mult / (config.top_k + config.shared), site.width, "mult / (top_k + shared)")
        self.router = Router(site.width, config.experts, config.balance == "bias")
        make = partial(Experts, width=site.width, depth=site.depth, activation=config.activation, bias=site.bias)
        self.experts = make(config.experts, hidden=hidden)
        self.shared = make(1, hidden=config.shared * hidden) if config.shared else None

    def forward(self, x_BTD: Tensor, layout: Layout) -> tuple[Tensor, Aux | None]:
        before_BLD = self.initial_state(len(x_BTD), x_BTD)
        return self._mixed(x_BTD, self._features(x_BTD, before_BLD, layout))

    def stream(self, x_BTD: Tensor, layout: Layout, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y_BTD, _ = self._mixed(x_BTD, self._features(x_BTD, state, layout))
        return y_BTD, None if state is None else torch.cat((state, x_BTD), dim=1)[:, -state.shape[1] :]

    def initial_state(self, rows: int, like: Tensor) -> Tensor | None:
        lags = self.config.corr_router - 1
        return like.new_zeros(rows, lags, self.width) if lags else None

    def state_bytes(self) -> int:
        return 2 * (self.config.corr_router - 1) * self.width

    def _features(self, x_BTD: Tensor, before_BLD: Tensor | None, layout: Layout) -> Tensor:
        """The mean of the last tokens of the document up to each. before: those that came before the piece."""
        if before_BLD is None:
            return x_BTD
        seen_BSD, length = torch.cat((before_BLD, x_BTD), dim=1), x_BTD.shape[1]
        lags, total_BTD = before_BLD.shape[1], x_BTD
        for lag in range(1, lags + 1):
            earlier_BTD = seen_BSD[:, lags - lag : lags - lag + length]
            total_BTD = total_BTD + earlier_BTD * (layout.pos_BT >= lag)[..., None]
        return total_BTD / (layout.pos_BT + 1).clamp_max(lags + 1)[..., None]

    def _mixed(self, x_BTD: Tensor, features_BTD: Tensor) -> tuple[Tensor, Aux]:
        x_ND, choice = x_BTD.flatten(0, 1), self._choose(features_BTD.flatten(0, 1))
        # under vmap no shape may depend on the choice
        mapped = is_mapped(choice.log_p_NE)
        y_ND = self._everywhere(x_ND, choice) if mapped else self._where_chosen(x_ND, choice)
        return y_ND.reshape(x_BTD.shape), self._told(choice)

    def _choose(self, features_ND: Tensor) -> Choice:
        logits_NE = self.router(features_ND)
        lse_N = logits_NE.logsumexp(-1)
        log_p_NE = logits_NE - lse_N[:, None]
        score_NE = log_p_NE.detach().exp()
        if self.router.nudges is not None:
            score_NE = score_NE + self.config.bias_step * self.router.nudges
        index_NK = score_NE.topk(self.config.top_k, dim=-1).indices
        chosen_NK = log_p_NE.gather(-1, index_NK)
        gate_NK = chosen_NK.exp() if self.config.top_k == 1 else chosen_NK.softmax(-1)
        chosen_NE = torch.zeros_like(score_NE).scatter(-1, index_NK, 1.0)
        return Choice(log_p_NE, lse_N, index_NK, gate_NK, chosen_NE)

    def _where_chosen(self, x_ND: Tensor, choice: Choice) -> Tensor:
        """Rows of tokens sorted by expert, through the experts, back and weighted."""
        count, k = choice.index_NK.shape
        order_A, inverse_A = sorting(choice.index_NK.flatten())
        rows_AD = x_ND[:, None].expand(count, k, self.width).reshape(count * k, self.width)
        y_AD = self.experts(permuted(rows_AD, order_A, inverse_A), choice.chosen_NE.sum(0).long())
        y_NKD = permuted(y_AD, inverse_A, order_A).view(count, k, self.width)
        y_ND = (choice.gate_NK.to(y_NKD.dtype)[..., None] * y_NKD).sum(1)
        return y_ND if self.shared is None else y_ND + self.shared(x_ND, choice.index_NK.new_full((1,), count))

    def _everywhere(self, x_ND: Tensor, choice: Choice) -> Tensor:
        """Every expert for every token: more work, but of one shape."""
        gates_NE = torch.zeros_like(choice.log_p_NE).scatter(-1, choice.index_NK, choice.gate_NK)
        y_ND = self.experts.dense(x_ND, gates_NE.to(x_ND.dtype))
        return y_ND if self.shared is None else y_ND + self.shared.dense(x_ND, torch.ones_like(x_ND[:, :1]))

    def _told(self, choice: Choice) -> Aux:
        config, load_E = self.config, choice.chosen_NE.sum(0)
        p_NE = choice.log_p_NE.exp()
        loss = config.z_loss * choice.lse_N.square().mean()
        if config.balance == "loss":
            share_E = load_E / load_E.sum()
            loss = loss + config.balance_loss * config.experts * (share_E * p_NE.mean(0)).sum()
        entropy = -(p_NE * choice.log_p_NE).sum()
        dropped = choice.index_NK.numel() - load_E.sum()
        return Aux(loss, torch.cat((load_E, torch.stack((entropy, dropped)))).detach())

    def measure_names(self) -> tuple[str, ...]:
        return (*(f"load.{number}" for number in range(self.config.experts)), "entropy", "dropped")

    def figures(self, measures: Sequence[float]) -> dict[str, float]:
        """Shares of the rows, nats of a token's choice, rows that were not computed."""
        *loads, entropy, dropped = measures
        rows = sum(loads)
        shares = {name: load / rows for name, load in zip(self.measure_names(), loads)}
        return shares | {"entropy": entropy * self.config.top_k / rows, "dropped": dropped}

    @torch.no_grad()
    def settle(self, measures: Sequence[float]) -> None:
        # a frozen router chooses as it did
        if self.router.nudges is not None and self.router.weight.requires_grad:
            load_E = torch.tensor(measures[: self.config.experts], dtype=torch.float64)
            self.router.nudges += torch.sign(load_E.mean() - load_E).long().to(self.router.nudges.device)

    def flops_per_token(self) -> int:
        shared = 0 if self.shared is None else self.shared.flops_per_row()
        return 2 * self.router.weight.numel() + self.config.top_k * self.experts.flops_per_row() + shared

    def param_groups(self) -> list[ParamGroup]:
        # an expert's biases are vectors, though stacked; a router that decays forgets what it chose
        vectors = [n for n, _ in self.named_parameters() if n.endswith("_bias")]
        return [ParamGroup(("router.weight", *vectors), decay=False)]
