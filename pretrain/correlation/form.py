"""The interface of every form of the correlation.

Shapes: B rows, H heads, T tokens of a row or piece, S tokens so far, E width of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pretrain.layout import Layout
from pretrain.mixer import State

SLOWEST, FASTEST = 0.7, 0.1
"""How much of a correlation is left a token later, at first, in the last head and in the first."""


@dataclass(frozen=True)
class Heads:
    """count: heads. width: channels of each. rope_base: base of the angles that turn what is compared, if any are."""

    count: int
    width: int
    rope_base: float | None


class Form(nn.Module, ABC):
    """(B, H, T, E) queries, keys and values to (B, H, T, E), inside one head and one document.

    Queries and keys come unrotated: each form turns what it compares by a product over channels.
    """

    rounding: ClassVar[bool] = False
    """Whether an output may change by rounding when a later token does."""
    dense: ClassVar[bool] = False
    """Whether training keeps a (T, T) matrix."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads = heads
        self.scale = heads.width**-0.5

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, state: State = None) -> tuple[Tensor, State]:
        """Without a state: the training form, whose returned state is None. With one: go on from where it ended."""

    @abstractmethod
    def initial_state(self, rows: int, like: Tensor) -> State:
        """The state before the first token of `rows` streams."""

    @abstractmethod
    def flops_per_token(self, length: int) -> int:
        """Operations of all heads beside the projections, per token of a row of `length`, a causal matrix half."""

    def halved_flops_per_token(self, length: int) -> int:
        """What the training form spends beyond `flops_per_token`: the other half of its matrices."""
        return self.flops_per_token(length)

    @abstractmethod
    def state_bytes(self, length: int) -> int:
        """Bytes of the state of one sequence after `length` tokens, in bf16, all heads."""

    def rotated(self, x_BHTE: Tensor, layout: Layout) -> Tensor:
        """Queries or keys turned by their positions, where the model's positions are rotary."""
        if self.heads.rope_base is None:
            return x_BHTE
        return layout.rotary(self.heads.width, self.heads.rope_base, x_BHTE.dtype).rotate(x_BHTE)


def first_decays(heads: int) -> Tensor:
    """(H,) shares of a correlation that are left a token later, from short to long memories."""
    return torch.linspace(FASTEST, SLOWEST, heads, dtype=torch.float64)
