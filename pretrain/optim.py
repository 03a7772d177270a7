"""Optimizers, the groups their parameters fall into, and the learning rate of every step.

Everything is torch's own: AdamW (arXiv 1711.05101), fused; Muon for matrices (torch.optim.Muon).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from math import cos, pi, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from pretrain.config import OptimConfig
from pretrain.members import members_of

STATE_KEYS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
"""The tensors that each kind of optimizer keeps for a parameter."""


def param_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters by what they share: kind of optimizer, learning rate, weight decay.

    Matrices decay; vectors, embeddings and what a mixer excepts do not. With `muon`, matrices inside blocks go to Muon.
    """
    rules = _rules(model)
    if config.name == "muon" and members_of(model):
        raise ConfigError("muon is not for the stacked matrices of an ensemble; set optim.name=adamw")
    groups: dict[tuple[str, float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, decays = rules[name]
        muon = config.name == "muon" and parameter.ndim == 2 and decays and name.startswith("blocks.")
        kind = "muon" if muon else "adamw"
        group = groups.setdefault((kind, factor, decays), _new_group(kind, factor, decays, config))
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _new_group(kind: str, factor: float, decays: bool, config: OptimConfig) -> dict[str, Any]:
    lr = factor * (config.muon_lr if kind == "muon" else config.lr)
    own = {"momentum": 0.95, "nesterov": True} if kind == "muon" else {"betas": config.betas, "eps": config.eps}
    decay = config.weight_decay if decays else 0.0
    return {"params": [], "names": [], "kind": kind, "lr": lr, "highest_lr": lr, "weight_decay": decay, **own}


def _rules(model: nn.Module) -> dict[str, tuple[float, bool]]:
    """Of every parameter the factor on its learning rate and whether it decays. Members have their template's."""
    tables = {f"{path}.weight".lstrip(".") for path, m in model.named_modules() if isinstance(m, nn.Embedding)}
    rules = {name: (1.0, p.ndim >= 2 and name not in tables) for name, p in model.named_parameters()}
    for path, members in members_of(model):
        rules |= {f"{path}.{name.replace('.', '/')}": rule for name, rule in _rules(members.template).items()}
    return rules | _special(model)


def _special(model: nn.Module) -> dict[str, tuple[float, bool]]:
    """What parts except from the general rule by `param_groups()`: (factor on the learning rate, whether it decays).

    Raises ConfigError for a name that the mixer does not have: the general rule would silently hold for what was meant.
    """
    out: dict[str, tuple[float, bool]] = {}
    for path, module in model.named_modules():
        if callable(getattr(module, "param_groups", None)):
            there = [name for name, _ in module.named_parameters()]
            for group in module.param_groups():
                for name in group.names:
                    if name not in there:
                        raise ConfigError(
                            f"param_groups() of {path} ({type(module).__name__}) names {name!r}, which is no parameter;"
                            f" it has {', '.join(there) or 'none'}"
                        )
                    out[f"{path}.{name}".lstrip(".")] = (group.lr, group.decay)
    return out


def make_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over `groups`."""
    if config.name == "muon":
        return MuonAdamW(groups)
    return AdamW(groups, lr=config.lr, fused=True)


class AdamW(torch.optim.AdamW):
    """torch's AdamW without what torch's compiler would have to know of it: we compile models, never optimizers.

    Its methods import that compiler as they are called: a third of what a rank takes to start.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon over the groups of kind `muon` and torch's AdamW over the others, behind one face."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self._parts: list[torch.optim.Optimizer] = []
        for kind, make in (("muon", torch.optim.Muon), ("adamw", _fused_adamw)):
            mine = [group for group in self.param_groups if group["kind"] == kind]
            if mine:
                part = make([dict(group) for group in mine])
                # one state and one set of groups, seen from both sides
                for group, full in zip(mine, part.param_groups):
                    group |= {key: value for key, value in full.items() if key not in group}
                part.param_groups, part.state = mine, self.state
                self._parts.append(part)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every group."""
        for part in self._parts:
            part.step()


def _fused_adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return AdamW(groups, fused=True)


def prime(optimizer: torch.optim.Optimizer, parameters: list[Tensor], kind: str) -> None:
    """Create the state that `optimizer` would create for `parameters` at its first step, so that it can be loaded."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        if not state:
            if kind == "adamw":
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for key in STATE_KEYS[kind]:
                state[key] = torch.zeros_like(parameter)


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Tell AdamW how many updates its moments have seen."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(updates))


def set_lr(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Give every group `scale` of its highest learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["highest_lr"] * scale


def lr_scale(config: OptimConfig, steps: int) -> Callable[[int], float]:
    """The learning rate of step s (from 0) of `steps`, as a share of the highest: a pure function of s.

    Warm-up is linear over `warmup_steps`; then cosine to `final_lr`; wsd: constant, then linear to `final_lr` over the
    last `decay_steps`; constant; or inverse_sqrt: sqrt(warmup / s).
    """
    warmup, final = config.warmup_steps, config.final_lr
    decay = config.decay_steps or max(1, steps // 10)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "cosine":
            done = min(1.0, (step - warmup) / max(1, steps - warmup))
            return final + (1 - final) * 0.5 * (1 + cos(pi * done))
        if config.schedule == "wsd":
            fallen = min(1.0, max(0.0, (step + 1 - (steps - decay)) / decay))
            return 1 - (1 - final) * fallen
        if config.schedule == "inverse_sqrt":
            return sqrt(max(1, warmup) / max(1, step + 1))
        return 1.0

    return scale
