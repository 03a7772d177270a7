"""Rotary positions (RoFormer, arXiv 2104.09864), in the interleaved layout.

Channels 2i and 2i+1 of a query or key at position m are rotated by the angle m * base^(-2i/E), so that the product of
a query at m with a key at n depends on m - n alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """cos and sin of every token's angles, (1 or B, 1, T, E/2), in fp32 (fp64 for fp64 models)."""

    cos: Tensor
    sin: Tensor
    phase: Tensor | None

    @classmethod
    def of(cls, pos_BT: Tensor, width: int, base: float, dtype: torch.dtype) -> Rotary:
        """The angles of tokens at `pos_BT` for heads of an even `width`."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        # powers in fp64: an fp32 exponent is off by whole turns at positions beyond 1e6
        steps = torch.arange(0, width, 2, device=pos_BT.device, dtype=torch.float64) / width
        angles = (pos_BT[:, None, :, None].double() * base**-steps).to(exact)
        cos, sin = angles.cos(), angles.sin()
        # one complex product is three times faster than four real ones on a CPU; GPU compilers know only real ones
        phase = torch.complex(cos, sin) if pos_BT.device.type == "cpu" and dtype == exact else None
        return cls(cos, sin, phase)

    def rotate(self, x_BHTE: Tensor) -> Tensor:
        """Queries or keys turned by their positions."""
        if self.phase is not None and not torch.compiler.is_compiling():
            pairs = torch.view_as_complex(x_BHTE.unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * self.phase).flatten(-2)
        return rotate_real(x_BHTE, self.cos, self.sin)


def rotate_real(x_BHTE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation in real arithmetic: the plain twin, and the form for GPUs and low precision."""
    even, odd = x_BHTE.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x_BHTE.dtype)
