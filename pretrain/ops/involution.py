"""Involution in one dimension (Li et al., arXiv 2103.06255): a kernel of its own at every token, shared by channels.

    y_t[g, c] = sum_{k < K} kernel_t[g, k] v_{t - k dilation}[g, c]

The fast form cuts time into blocks of about K tokens and writes the kernels of a block as a banded matrix, so that a
block is one product of matrices and values are laid out about twice, not K times.

Shapes: B rows, T tokens, S = T + (K - 1) dilation values, G groups, C channels of a group, K taps, R residues of time
modulo the dilation, N blocks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.blocks import even_blocks


def involution_naive(kernel_BTGK: Tensor, v_BSGC: Tensor, dilation: int = 1) -> Tensor:
    """The equation itself; the first (K - 1) dilation values are those before the first token. (B, T, G, C)."""
    length, taps = kernel_BTGK.shape[1], kernel_BTGK.shape[3]
    starts = [(taps - 1 - k) * dilation for k in range(taps)]
    return sum(kernel_BTGK[..., k, None] * v_BSGC[:, start : start + length] for k, start in enumerate(starts))  # type: ignore[return-value]


def involution(kernel_BTGK: Tensor, v_BSGC: Tensor, dilation: int = 1) -> Tensor:
    """The same as products of matrices, O(T K) in time and memory."""
    length, taps = kernel_BTGK.shape[1], kernel_BTGK.shape[3]
    count, size = even_blocks(-(-length // dilation), taps)
    spare = count * size * dilation - length
    kernel_BRGTK = _by_residue(F.pad(kernel_BTGK.flip(-1), (0, 0, 0, 0, 0, spare)), dilation)
    v_BRGSC = _by_residue(F.pad(v_BSGC, (0, 0, 0, 0, 0, spare)), dilation)
    # rows one longer than wide, read as if they were wide, move by one from each to the next: a band
    padded = F.pad(kernel_BRGTK.unflatten(3, (count, size)), (0, size)).flatten(-2)
    band = padded[..., :-size].unflatten(-1, (size, taps + size - 1))
    windows = v_BRGSC.unfold(3, taps + size - 1, size)
    y_BRGTC = (band @ windows.transpose(-1, -2)).flatten(3, 4)
    return y_BRGTC.permute(0, 3, 1, 2, 4).flatten(1, 2)[:, :length]


def band_flops_per_channel(length: int, taps: int, dilation: int) -> int:
    """Operations of `involution` on a row of `length`, per channel, the zeros of the bands included."""
    count, size = even_blocks(-(-length // dilation), taps)
    return 2 * count * size * dilation * (taps + size - 1)


def _by_residue(x_BTGE: Tensor, dilation: int) -> Tensor:
    """(B, R, G, T / R, E): tokens that a dilated kernel sees together, side by side."""
    return x_BTGE.unflatten(1, (-1, dilation)).permute(0, 2, 3, 1, 4)
