"""How a branch of a layer reads and writes the residual stream: plainly, or through hyper-connections.

    x += branch(x)

Hyper-connections (arXiv 2409.19606) keep N streams; a branch reads a mixture and writes to all, and streams mix:

    x = sum_n a_n0 h_n,     h_m <- sum_n a_nm h_n + b_m branch(x)
    a = one + A + s tanh(Norm(h) W_a),     b = 1 + B + s' tanh(Norm(h) W_b)

where `one` lets the branch read one stream and leaves all as they are, and A, B, W are 0 at first: as the streams begin
alike, the model begins as one with plain residuals. What decays, decays to that.

Shapes: B rows, T tokens, N streams, M = N + 1 mixtures, the first for the branch, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from pretrain.init import constant, declare
from pretrain.ops.norm import rms_norm
from pretrain.ops.scan import exact

Extra = TypeVar("Extra")
Branch = Callable[[Tensor], tuple[Tensor, Extra]]
"""(B, T, D) to (B, T, D), and whatever else comes of it."""


class Connection(nn.Module):
    """The plain residual."""

    def forward(self, x: Tensor, branch: Branch[Extra]) -> tuple[Tensor, Extra]:
        """The stream after a branch, and what else came of the branch."""
        y, extra = branch(x)
        return x + y, extra

    def flops_per_token(self) -> int:
        """Operations of a forward pass per token, the branch left out."""
        return 0


class HyperConnection(Connection):
    """N streams. index: of the branch in its model, from 0: branches take turns in reading the streams."""

    def __init__(self, streams: int, index: int, width: int) -> None:
        super().__init__()
        self.streams, self.reads, self.width = streams, index % streams, width
        self.gain = nn.Parameter(torch.empty(width))
        self.mix = nn.Parameter(torch.empty(streams, streams + 1))
        self.write = nn.Parameter(torch.empty(streams))
        self.mix_by = nn.Parameter(torch.empty(width, streams + 1))
        self.write_by = nn.Parameter(torch.empty(width, 1))
        self.scales = nn.Parameter(torch.empty(2))
        zero = constant(0.0)
        declare(
            self,
            {
                "gain": constant(1.0),
                "mix": zero,
                "write": zero,
                "mix_by": zero,
                "write_by": zero,
                "scales": constant(0.01),
            },
        )

    def forward(self, h_BTND: Tensor, branch: Branch[Extra]) -> tuple[Tensor, Extra]:
        unit_BTND = rms_norm(h_BTND, self.gain.to(h_BTND.dtype))
        one_NN = torch.eye(self.streams, dtype=h_BTND.dtype, device=h_BTND.device)
        one_NM = torch.cat((one_NN[:, self.reads, None], one_NN), dim=1)
        mix_BTNM = one_NM + self.mix + self.scales[0] * (unit_BTND @ self.mix_by.to(h_BTND.dtype)).tanh()
        write_BTN1 = 1 + self.write[:, None] + self.scales[1] * (unit_BTND @ self.write_by.to(h_BTND.dtype)).tanh()
        mixed_BTMD = mix_BTNM.transpose(-1, -2) @ h_BTND
        y_BTD, extra = branch(mixed_BTMD[:, :, 0].to(self.gain.dtype))
        return mixed_BTMD[:, :, 1:] + write_BTN1 * y_BTD[:, :, None], extra

    def flops_per_token(self) -> int:
        projections = 2 * self.streams * self.width * (self.streams + 2)
        return projections + 2 * self.streams * (self.streams + 1) * self.width


def make_connection(streams: int, index: int, width: int) -> Connection:
    """A connection for the `index`-th branch of a model with `streams` residual streams."""
    return Connection() if streams == 1 else HyperConnection(streams, index, width)


def open_streams(x_BTD: Tensor, streams: int) -> Tensor:
    """What connections work on: (B, T, N, D) in fp32 or fp64, the same in every stream; (B, T, D) as it is for one."""
    return x_BTD if streams == 1 else x_BTD.to(exact(x_BTD.dtype))[:, :, None].expand(-1, -1, streams, -1)


def close_streams(h: Tensor, streams: int) -> Tensor:
    """(B, T, D): the sum of the streams."""
    return h if streams == 1 else h.sum(2)
