"""Lagged scores: queries and keys with those before them beside them, and products of them written out.

Shapes: B rows, H heads, T queries, S keys, E head width, L lags.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.layout import Layout
from pretrain.ops.mapped import at_once, is_plain, of_all_members


def stack_queries(q_BHTE: Tensor, weights_HLE: Tensor, lags: int) -> Tensor:
    """Beside each query the `lags` - 1 before it, zero beyond the row, each times its weight. (B, H, T, L*E).

    weights_HLE: a factor for each lag, per head (H, L, 1) or channel (H, L, E). Queries of another document stay: they
    meet the zeros that `stack_keys` puts there, for a key that a query sees is no farther from the document's start.
    """
    return _stack(q_BHTE, weights_HLE[:, : min(lags, q_BHTE.shape[2]), None])


def stack_keys(k_BHTE: Tensor, lags: int, layout: Layout) -> Tensor:
    """Beside each key the `lags` - 1 before it, zero beyond its document. (B, H, T, L*E)."""
    return _stack(k_BHTE, layout.reaches_each(min(lags, k_BHTE.shape[2])))


def _stack(x_BHTE: Tensor, factors: Tensor) -> Tensor:
    """factors: weights (H, L, 1, 1 or E), or whether a token reaches so far back (B, 1, L, T, 1)."""
    if is_plain():
        return _Stacked.apply(x_BHTE, factors)
    if not at_once(x_BHTE, factors):
        return stack_plain(x_BHTE, factors)
    have_rows = factors.dtype == torch.bool
    return of_all_members(lambda x, each: _Stacked.apply(x, each if have_rows else each.unsqueeze(1)), x_BHTE, factors)


def stack_plain(x_BHTE: Tensor, factors: Tensor) -> Tensor:
    """The same, composed: the plain twin, and the form for torch.compile."""
    each = [x_BHTE if lag == 0 else F.pad(x_BHTE[:, :, :-lag], (0, 0, lag, 0)) for lag in range(factors.shape[-3])]
    return torch.cat([x * factor for x, factor in zip(each, factors.unbind(-3))], dim=-1)


class _Stacked(torch.autograd.Function):
    """torch composes it from four passes over memory for each lag, and six backwards; one and one are enough.

    Of several members at once: x (M, B, H, T, E) and weights (M, 1, H, L, 1, 1 or E).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor) -> Tensor:
        lags, length = factors.shape[-3], x.shape[-2]
        stacked = x.new_empty(*x.shape[:-1], lags, x.shape[-1])
        for lag, factor in enumerate(factors.unbind(-3)):
            beside = stacked.select(-2, lag)
            if lag:
                beside.narrow(-2, 0, lag).zero_()
            torch.mul(x.narrow(-2, 0, length - lag), _from(factor, lag), out=_from(beside, lag))
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, factors)
        return stacked.flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, factors = ctx.saved_tensors
        by_lag, length = factors.unbind(-3), grad.shape[-2]
        first, *rest = grad.unflatten(-1, (len(by_lag), -1)).unbind(-2)
        later = [_from(piece, lag) for lag, piece in enumerate(rest, 1)]
        grad_x = first * by_lag[0]
        for lag, (piece, factor) in enumerate(zip(later, by_lag[1:]), 1):
            grad_x.narrow(-2, 0, length - lag).addcmul_(piece, _from(factor, lag))
        if x is None:
            return grad_x, None
        products = [piece * x.narrow(-2, 0, length - lag) for lag, piece in enumerate((first, *later))]
        return grad_x, torch.stack([product.sum_to_size(by_lag[0].shape) for product in products], dim=-3)


def _from(by_token: Tensor, lag: int) -> Tensor:
    """Of tokens from the one that has `lag` before it; what is the same for all stays."""
    length = by_token.shape[-2]
    return by_token.narrow(-2, lag, length - lag) if lag and length > 1 else by_token


def lag_scores(rows_BHRS: Tensor, weights_HL: Tensor, pos_BT: Tensor, pos_BS: Tensor) -> Tensor:
    """S[t, s] = sum_l w_l P[t-l, s-l], terms from another document left out. (B, H, T, S).

    rows_BHRS: products P of the last T queries with all keys, and before them those of the L - 1 queries before.
    pos_BT, pos_BS: positions of queries and keys within their documents.
    """
    lags, length = weights_HL.shape[1], pos_BT.shape[1]
    total = None
    for lag in range(min(lags, pos_BS.shape[1])):
        start = lags - 1 - lag
        piece = rows_BHRS[:, :, start : start + length]
        if lag:
            piece = F.pad(piece[..., :-lag], (lag, 0))
            piece = piece * ((pos_BT >= lag)[:, None, :, None] & (pos_BS >= lag)[:, None, None, :])
        piece = piece * weights_HL[:, lag, None, None]
        total = piece if total is None else total + piece
    assert total is not None
    return total
