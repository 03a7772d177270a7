"""Decayed sums by doubling: y_t = x_t + g y_{t-1}, all at once in log2(T) steps, cut at document boundaries.

After a step that reaches m terms back, y holds 2 m terms: y_t <- y_t + g^m y_{t-m}. What "earlier" means is the
caller's: one token, or one step along a diagonal of queries and keys.

Shapes: B rows, H heads, T tokens, S keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Shift = Callable[[Tensor, int], Tensor]


def later(x_BHT: Tensor, by: int) -> Tensor:
    """(B, H, T, ...) moved on by some tokens."""
    return F.pad(x_BHT[:, :, :-by], (0, 0) * (x_BHT.ndim - 3) + (by, 0))


def along_diagonals(x_BHTS: Tensor, by: int) -> Tensor:
    """(B, H, T, S) moved on by some tokens in both queries and keys."""
    return F.pad(x_BHTS[..., :-by, :-by], (by, 0, by, 0))


def doubled(x: Tensor, keep: Tensor | float, room: Tensor, shift: Shift) -> Tensor:
    """sum_{m <= room} keep^m shift(x, m) over (B, H, T, ...). room: terms before each within its document."""
    reach = 1
    while reach < x.shape[2]:
        x = torch.addcmul(x, shift(x, reach), keep**reach * (room >= reach).to(x.dtype))
        reach *= 2
    return x


def summed_naive(x: Tensor, keep: Tensor | float, room: Tensor, shift: Shift) -> Tensor:
    """The same, one term after the other."""
    terms = (shift(x, back) * keep**back * (room >= back) for back in range(1, x.shape[2]))
    return x + sum(terms)


def decayed_sums(x: Tensor, keep: Tensor, room: Tensor, shift: Shift) -> Tensor:
    """`doubled` for a trained `keep`, without a copy of y kept for each step (first derivatives only).

    y solves y = x + keep shift(y, 1), so the derivative by `keep` is that of one such step from the solution, summed
    up in the same way.
    """
    fixed = keep.detach()
    if torch.is_grad_enabled():
        with torch.no_grad():
            before = shift(doubled(x, fixed, room, shift), 1) * (room >= 1)
        # nothing is added but the path of the gradient
        x = x + (keep - fixed) * before
    return doubled(x, fixed, room, shift)


def running_sums(x_BHT: Tensor, keep: Tensor, room: Tensor, before: Tensor | None) -> Tensor:
    """`decayed_sums` over time, going on from the sum `before` the first token (B, H, ...) where there is one."""
    if before is None:
        return decayed_sums(x_BHT, keep, room, later)
    x_BHT = torch.cat((before[:, :, None], x_BHT), dim=2)
    room = F.pad(room, (0, 0) * (room.ndim - 3) + (1, 0))
    return decayed_sums(x_BHT, keep, room, later)[:, :, 1:]
