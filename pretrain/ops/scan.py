"""Scans over a row that forget at the start of each document: softmax means of all prefixes.

    mean_i = sum_{j <= i} e^(l_j) v_j / sum_{j <= i} e^(l_j),     lse_i = log sum_{j <= i} e^(l_j)

over the tokens j of i's document. Sums are kept relative to the largest logit *so far* (Milakov and Gimelshein,
arXiv 1805.02867): the largest of the row would let one later logit push the sums before it below the smallest number.
Arithmetic is fp32, fp64 for fp64 models.

Shapes: B rows, H heads, T tokens, V value width, U = V + 1 (values and a one), N blocks of I queries or J keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.blocks import even_blocks

BLOCK = 32
"""Tokens within which weights are written out; beyond it they are summed up."""


class PrefixState(NamedTuple):
    """The document so far: its largest logit (B, H), and sums of e^(l - top) times (v, 1), (B, H, U).

    What is meant is sums * e^top, whatever the top, so that no gradient flows through it.
    """

    top: Tensor
    sums: Tensor


class PrefixSoftmax(NamedTuple):
    """mean_BHTV and lse_BHT of every prefix, and the state after the last token."""

    mean_BHTV: Tensor
    lse_BHT: Tensor
    state: PrefixState


def exact(dtype: torch.dtype) -> torch.dtype:
    """The type to accumulate in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_prefix(rows: int, heads: int, width: int, like: Tensor) -> PrefixState:
    """The state before the first token, for values of `width`."""
    like = like.to(exact(like.dtype))
    return PrefixState(like.new_full((rows, heads), -torch.inf), like.new_zeros(rows, heads, width + 1))


def prefix_softmax_naive(logits_BHT: Tensor, v_BHTV: Tensor, pos_BT: Tensor, state: PrefixState) -> PrefixSoftmax:
    """One token after the other. pos_BT: positions within documents; a row may go on in the state's document."""
    logits, u, (top, sums), tops, steps = logits_BHT, _with_one(v_BHTV), state, [], []
    for t in range(logits.shape[2]):
        top = top.masked_fill(pos_BT[:, t, None] == 0, -torch.inf)
        now = torch.maximum(top, logits[:, :, t].detach())
        sums = (top - now).exp()[..., None] * sums + (logits[:, :, t] - now).exp()[..., None] * u[:, :, t]
        top = now
        tops.append(top)
        steps.append(sums)
    return _result(torch.stack(tops, dim=2), torch.stack(steps, dim=2))


def prefix_softmax(logits_BHT: Tensor, v_BHTV: Tensor, pos_BT: Tensor, state: PrefixState) -> PrefixSoftmax:
    """The same, block by block: matrices within a block, one state from each block to the next. O(T BLOCK)."""
    length = logits_BHT.shape[2]
    count, size = even_blocks(length, BLOCK)
    top_BHT = running_max(logits_BHT.detach(), pos_BT, state.top)
    spare = count * size - length  # tokens that fill the last block are documents of their own
    logits_BHNJ, top_BHNI = (F.pad(x, (0, spare)).unflatten(2, (count, size)) for x in (logits_BHT, top_BHT))
    u_BHNJU = F.pad(_with_one(v_BHTV), (0, 0, 0, spare)).unflatten(2, (count, size))
    pos_B1NI = F.pad(pos_BT, (0, spare)).unflatten(1, (count, size))[:, None]

    place = torch.arange(size, device=pos_BT.device)
    back_IJ = place[:, None] - place
    sees_B1NIJ = (back_IJ >= 0) & (back_IJ <= pos_B1NI[..., None])
    within = (logits_BHNJ[..., None, :] - top_BHNI[..., None]).masked_fill(~sees_B1NIJ, -torch.inf).exp() @ u_BHNJU

    before_BHN = torch.cat((state.top[..., None], top_BHNI[:, :, :-1, -1]), dim=2)
    decay_BHNI = (before_BHN[..., None] - top_BHNI).masked_fill(pos_B1NI <= place, -torch.inf).exp()
    sums_BHU, entering = state.sums, []
    for block in range(count):
        entering.append(sums_BHU)
        sums_BHU = within[:, :, block, -1] + decay_BHNI[:, :, block, -1, None] * sums_BHU
    sums_BHNIU = within + decay_BHNI[..., None] * torch.stack(entering, dim=2)[..., None, :]
    return _result(top_BHT, sums_BHNIU.flatten(2, 3)[:, :, :length])


def running_max(x_BHT: Tensor, pos_BT: Tensor, before_BH: Tensor) -> Tensor:
    """The largest value of the document so far, by doubling. before_BH: that of the tokens before the first."""
    length, reach = x_BHT.shape[2], 1
    top = x_BHT
    while reach < length:
        earlier = F.pad(top[..., :-reach], (reach, 0), value=-torch.inf)
        top = torch.where(pos_BT[:, None] >= reach, torch.maximum(top, earlier), top)
        reach *= 2
    goes_on_BT = pos_BT > torch.arange(length, device=pos_BT.device)
    return torch.where(goes_on_BT[:, None], torch.maximum(top, before_BH[..., None]), top)


def prefix_flops(length: int, width: int) -> int:
    """Operations of `prefix_softmax` per token and head on a row of `length`, both halves of a block's matrix."""
    count, size = even_blocks(length, BLOCK)
    return 2 * (width + 1) * size * count * size // length


def _with_one(v_BHTV: Tensor) -> Tensor:
    return torch.cat((v_BHTV, torch.ones_like(v_BHTV[..., :1])), dim=-1)


def _result(top_BHT: Tensor, sums_BHTU: Tensor) -> PrefixSoftmax:
    total_BHT = sums_BHTU[..., -1]
    mean_BHTV = sums_BHTU[..., :-1] / total_BHT[..., None]
    return PrefixSoftmax(mean_BHTV, top_BHT + total_BHT.log(), PrefixState(top_BHT[..., -1], sums_BHTU[:, :, -1]))
