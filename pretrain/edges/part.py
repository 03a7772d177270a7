"""What every part of a layer with edges says of itself, as token mixers do.

Shapes: B rows, T tokens of a piece, S tokens so far, D width of a token, C width of an edge.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from pretrain.edges.start import Rows
from pretrain.mixer import State


class Part(nn.Module, ABC):
    """Something with a state and a cost."""

    @abstractmethod
    def initial_state(self, rows: int, like: Tensor) -> State:
        """The state before the first token of `rows` streams, of the type and on the device of `like`."""

    def flops_per_token(self, length: int) -> int:
        """Operations of a forward pass per token of a row of `length`; what is spent on no edge is left out."""
        return self.halved_flops_per_token(length)

    @abstractmethod
    def halved_flops_per_token(self, length: int) -> int:
        """The part of `flops_per_token` that was halved for causality: of all that is done once per pair."""

    @abstractmethod
    def state_bytes(self, length: int) -> int:
        """Bytes of the state of one sequence after `length` tokens, in bf16."""


class NodeMixer(Part):
    """Tokens, mixed with a look at their edges."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, e_BTSC: Tensor, rows: Rows, state: State) -> tuple[Tensor, Any, State]:
        """(B, T, D); what edges are told of it; the state after it, None without one."""


class EdgeUpdate(Part):
    """Edges, after the tokens of their layer."""

    @abstractmethod
    def forward(self, e_BTSC: Tensor, x_BTD: Tensor, told: Any, rows: Rows, state: State) -> tuple[Tensor, State]:
        """(B, T, S, C), and the state. x_BTD: the layer's output; told: what its NodeMixer told. Row i may depend on
        tokens and rows up to i, and only on the edges that there are."""
