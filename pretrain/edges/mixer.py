"""What every edge mixer is: attention among edges, each beside a residual that is not its own.

    q, k, v, g = W Norm(e),    y = W_o (sigmoid(g) * attention(q, k, v))

Shapes: B rows, T rows of edges, S columns, C width of an edge, H heads, E width of a head.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.edges.part import Part
from pretrain.edges.start import Rows
from pretrain.init import linear, residual
from pretrain.mixer import State
from pretrain.norms import make_norm


@dataclass(frozen=True)
class EdgeSizes:
    """Of edges and of attention among them. routed: edges that a row sends where only some may speak."""

    width: int
    heads: int
    head_width: int
    routed: int
    iterations: int


class EdgeMixer(Part):
    """(B, T, S, C) to (B, T, S, C): row i may depend on edges and scores of rows up to i, and only on those there."""

    def __init__(self, sizes: EdgeSizes, config: ModelConfig) -> None:
        super().__init__()
        self.sizes, self.inner = sizes, sizes.heads * sizes.head_width
        self.norm = make_norm(config.norm, sizes.width, config.bias)
        self.qkvg = linear(sizes.width, 4 * self.inner, bias=config.bias)
        self.out = residual(self.inner, sizes.width, config.depth, bias=config.bias)

    @abstractmethod
    def forward(self, e_BTSC: Tensor, scores_BTS: Tensor, rows: Rows, state: State) -> tuple[Tensor, State]:
        """Mixed edges. scores_BTS: of the attention among tokens. Without a state the returned one is None."""

    def project(self, e: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, g of edges (..., C), each (..., H, E)."""
        heads = self.qkvg(self.norm(e)).unflatten(-1, (4, self.sizes.heads, self.sizes.head_width))
        return tuple(heads.unbind(-3))

    def finish(self, y: Tensor, g: Tensor) -> Tensor:
        """(..., C) out of what attention found and gates, both (..., H, E)."""
        return self.out((y * g.sigmoid()).flatten(-2))

    def edge_flops(self) -> int:
        """Operations of `project` and `finish` per edge."""
        return 2 * (self.qkvg.weight.numel() + self.out.weight.numel())
