"""The one interface of every token mixer, and how mixers are found by name.

Shapes: B rows, T tokens, S keys, D width, H heads, E width of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from pretrain.layout import Layout
from pretrain.registry import Registry

__all__ = ["REGISTRY", "Layout", "ParamGroup", "Positions", "Site", "State", "TokenMixer", "make", "register"]

State = Any
"""Whatever a mixer carries from one piece of a stream to the next; only that mixer looks inside."""

Positions = Literal["rope", "learned", "none"]


@dataclass(frozen=True)
class Site:
    """What a mixer or a channel mixer is told about the place it is built for.

    length: tokens of a training row. layer: from 0. depth: layers of the model.
    """

    width: int
    length: int
    layer: int
    depth: int
    bias: bool = False
    positions: Positions = "rope"


@dataclass(frozen=True)
class ParamGroup:
    """Parameters of a mixer that want a learning rate or a weight decay of their own.

    names: as in the mixer's `named_parameters()`. lr: factor on the learning rate. decay: whether weights decay.
    """

    names: tuple[str, ...]
    lr: float = 1.0
    decay: bool = True


class Streaming(nn.Module, ABC):
    """What reads tokens in a row or in pieces: the state between pieces, and what it costs."""

    @abstractmethod
    def initial_state(self, rows: int, like: Tensor) -> State:
        """The state before the first token of `rows` streams, of the type and on the device of `like`."""

    @abstractmethod
    def flops_per_token(self, length: int) -> int:
        """Operations of a forward pass per token of a row of `length`; a multiply-add is 2, a causal matrix half."""

    def halved_flops_per_token(self, length: int) -> int:
        """The part of `flops_per_token` that was halved for causality: a dense form spends it twice."""
        return 0

    @abstractmethod
    def state_bytes(self, length: int) -> int:
        """Bytes of the state of one sequence after `length` tokens, in bf16."""


class TokenMixer(Streaming):
    """Mix information across time, (B, T, D) to (B, T, D), and nothing else.

    Residual, norm and channel mixer belong to the block. The flags are promises that the certificate holds.
    """

    causal: ClassVar[bool] = True
    """y[t] depends on x[0..t] only."""
    streams: ClassVar[bool] = True
    """Pieces run one after the other with a state give what the whole gives."""
    isolates: ClassVar[bool] = True
    """Documents packed in one row cannot see each other."""
    rounding: bool = False
    """Whether an output may change by rounding when a later token does, as an FFT's do; else not by a bit."""
    dense: bool = False
    """Whether training keeps a (T, T) matrix of a row, so that its memory grows with the square of the length."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, layout: Layout, state: State = None) -> tuple[Tensor, State]:
        """Without a state: the training form, whose returned state is None. With one: go on from where it ended."""

    def param_groups(self) -> list[ParamGroup]:
        """Parameters that the general rule (matrices decay, all else does not) does not fit."""
        return []


REGISTRY: Registry[TokenMixer] = Registry("mixer", Path(__file__).with_name("mixers"), "pretrain.mixers")
register = REGISTRY.register


def make(name: str, options: Mapping[str, Any], site: Site, file: str | None = None) -> TokenMixer:
    """The mixer `name`, with its options checked by its own configuration, built for `site`."""
    return REGISTRY.make(name, options, site, file)
