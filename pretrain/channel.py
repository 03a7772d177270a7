"""The one interface of every channel mixer: what a block does within a token, across its width."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from configs.errors import ConfigError
from pretrain.layout import Layout
from pretrain.mixer import ParamGroup, Site, State
from pretrain.registry import Registry


class Aux(NamedTuple):
    """What a part of a model tells beside its output.

    loss: a scalar to add to the loss of each counted target, a mean over the micro-batch. measures: (K,) sums over its
    tokens, without gradient, named by `Teller.measure_names()`.
    """

    loss: Tensor
    measures: Tensor


class Teller(nn.Module):
    """A part of a stack that may tell something in every forward pass: an Aux, where it has measures."""

    def measure_names(self) -> tuple[str, ...]:
        """Of the sums in Aux.measures; empty where it has nothing to tell."""
        return ()

    def figures(self, measures: Sequence[float]) -> dict[str, float]:
        """What the measures of a step say to people, by name: shares and means rather than sums."""
        return dict(zip(self.measure_names(), measures))

    def settle(self, measures: Sequence[float]) -> None:
        """Told after every update the measures of the global batch, to adapt what is not trained by gradients."""


def hidden_width(mult: float, width: int, name: str = "mult") -> int:
    """Units of a hidden layer of `mult` times the width. Raises ConfigError where that is less than one."""
    if round(mult * width) < 1:
        raise ConfigError(f"{name} {mult:g} of a width of {width} leaves no hidden unit; make {name} larger")
    return round(mult * width)


class AsExpert(NamedTuple):
    """A channel mixer as one expert of a mixture. options: of the mixture. names: its parameters, by the experts'."""

    options: dict[str, Any]
    names: dict[str, str]


class ChannelMixer(Teller, ABC):
    """(B, T, D) to (B, T, D), each token by itself; one that looks at those before it has a state to decode with."""

    rounding: bool = False
    """Whether an output may change by rounding when another token does; else not by a bit."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, layout: Layout) -> tuple[Tensor, Aux | None]:
        """The mixed channels of every token; Aux where it has measures, else None."""

    def stream(self, x_BTD: Tensor, layout: Layout, state: State) -> tuple[Tensor, State]:
        """Decode: the mixed channels of tokens that go on from where `state` ended, and the state after them."""
        return self(x_BTD, layout)[0], state

    def initial_state(self, rows: int, like: Tensor) -> State:
        """The state before the first token of `rows` streams; None where every token is mixed by itself."""
        return None

    def state_bytes(self) -> int:
        """Bytes of the state of one sequence, in bf16."""
        return 0

    @abstractmethod
    def flops_per_token(self) -> int:
        """Operations of a forward pass per token; a multiply-add is 2."""

    def as_expert(self) -> AsExpert | None:
        """How a mixture of experts holds many of these; None where it cannot."""
        return None

    def param_groups(self) -> list[ParamGroup]:
        """Parameters that the general rule (matrices decay, all else does not) does not fit."""
        return []


REGISTRY: Registry[ChannelMixer] = Registry("channel", Path(__file__).with_name("channels"), "pretrain.channels")
register = REGISTRY.register


def make(name: str, options: Mapping[str, Any], site: Site, file: str | None = None) -> ChannelMixer:
    """The channel mixer `name`, with its options checked by its own configuration, built for `site`."""
    return REGISTRY.make(name, options, site, file)
