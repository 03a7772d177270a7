"""Softmax attention over packed documents, and lag-stacked queries and keys.

Shapes: B rows, H heads, T queries, S keys, E head width, L lags.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.layout import Layout
from pretrain.ops.mapped import at_once, is_mapped, of_all_members
from pretrain.ops.scan import exact

_EXPLICIT_BYTES, _BLOCK = 64 << 20, 64


def attend(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTV: Tensor, layout: Layout, scale: float) -> Tensor:
    """softmax(scale q k^T) v, causal, within documents. Keys and values may have fewer heads (GQA). (B, H, T, V)."""
    grouped = k_BHTE.shape[1] != q_BHTE.shape[1]
    if q_BHTE.device.type == "cpu" and is_mapped(q_BHTE, k_BHTE, v_BHTV):
        # torch.func.vmap would run the CPU's own kernel in a loop
        k_BHTE, v_BHTV = _as_many_heads(q_BHTE, k_BHTE, v_BHTV)
        if at_once(q_BHTE, k_BHTE, v_BHTV) and q_BHTE.dtype == k_BHTE.dtype == v_BHTV.dtype:
            bias = layout.mask_bias(q_BHTE.dtype)
            return of_all_members(lambda *qkv: _MembersAttention.apply(*qkv, bias, scale), q_BHTE, k_BHTE, v_BHTV)
        return _attend_explicit(q_BHTE, k_BHTE, v_BHTV, layout, scale)
    if q_BHTE.device.type == "cpu" and v_BHTV.shape[-1] != k_BHTE.shape[-1]:
        return _attend_narrow_values(q_BHTE, k_BHTE, v_BHTV, layout, scale)
    if layout.ramps:
        return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTV, is_causal=True, scale=scale, enable_gqa=grouped)
    return F.scaled_dot_product_attention(
        q_BHTE, k_BHTE, v_BHTV, attn_mask=layout.mask(), scale=scale, enable_gqa=grouped
    )


def _attend_narrow_values(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """The CPU has a fast kernel only for values as wide as keys: small scores are cheaper written out,
    and for large ones, which must not be kept, values are padded."""
    rows, heads, length = q.shape[:3]
    if rows * heads * length * length * q.element_size() <= _EXPLICIT_BYTES:
        return _attend_explicit(q, k, v, layout, scale)
    padded = attend(q, k, F.pad(v, (0, k.shape[-1] - v.shape[-1])), layout, scale)
    return padded[..., : v.shape[-1]]


def _attend_explicit(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """Scores are kept, and masked where they lie: no second matrix of them."""
    scores = (q * scale) @ k.transpose(-1, -2)
    return scores.add_(layout.mask_bias(q.dtype)).softmax(-1) @ v


class _MembersAttention(torch.autograd.Function):
    """`_attend_explicit` of all members of a map, without the blocks above the diagonal.

    q, k (M, B, H, T, E), v (M, B, H, T, V); bias as of `Layout.mask_bias`.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        heads = q.shape[:3]
        q, k, v = (x.flatten(0, 2).contiguous() for x in (q * scale, k, v))
        found, kept = [], []
        for rows, seen in _blocks(q.shape[1]):
            weights = torch.bmm(q[:, rows], k[:, seen].mT)
            weights.unflatten(0, heads).add_(bias[..., rows, seen])
            torch.softmax(weights, -1, out=weights)
            # never into a part of a whole: torch multiplies into what is not contiguous one matrix at a time
            found.append(torch.bmm(weights, v[:, seen]))
            kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.heads = scale, heads
        return torch.cat(found, 1).unflatten(0, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, *kept = ctx.saved_tensors
        grad = grad.flatten(0, 2).contiguous()
        # early keys are added to once for every block: in bf16 the sum would lose what each adds
        grads_q, grad_k, grad_v = [], *(torch.zeros_like(x, dtype=exact(x.dtype)) for x in (k, v))
        for (rows, seen), weights in zip(_blocks(q.shape[1]), kept):
            scores = torch.bmm(grad[:, rows], v[:, seen].mT)
            torch._softmax_backward_data(scores, weights, -1, weights.dtype, grad_input=scores)
            grads_q.append(torch.bmm(scores, k[:, seen]))
            grad_k[:, seen] += torch.bmm(scores.mT, q[:, rows])
            grad_v[:, seen] += torch.bmm(weights.mT, grad[:, rows])
        whole = torch.cat(grads_q, 1).mul_(ctx.scale), grad_k.to(k.dtype), grad_v.to(v.dtype)
        grads = [each.unflatten(0, ctx.heads) for each in whole]
        return grads[0], grads[1], grads[2], None, None


def _blocks(length: int) -> list[tuple[slice, slice]]:
    """Rows of queries, and the keys that at least one of them may see."""
    return [(slice(at, at + _BLOCK), slice(0, at + _BLOCK)) for at in range(0, length, _BLOCK)]


def _as_many_heads(q: Tensor, *kv: Tensor) -> list[Tensor]:
    """Keys and values, each given to all queries of its group."""
    groups = q.shape[1] // kv[0].shape[1]
    return [x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in kv]


def attend_naive(q_BHTE: Tensor, k_BHSE: Tensor, v_BHSV: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The equation itself. mask: (B or 1, 1, T, S) bool, true where a query sees a key; keys may have fewer heads."""
    k_BHSE, v_BHSV = _as_many_heads(q_BHTE, k_BHSE, v_BHSV)
    scores = (q_BHTE * scale) @ k_BHSE.transpose(-1, -2)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v_BHSV


def stack_queries(q_BHTE: Tensor, weights_HLE: Tensor, lags: int) -> Tensor:
    """Beside each query the `lags` - 1 before it, zero beyond the row, each times its weight. (B, H, T, L*E).

    weights_HLE: a factor for each lag, per head (H, L, 1) or channel (H, L, E). Queries of another document stay: they
    meet the zeros that `stack_keys` puts there, for a key that a query sees is no farther from the document's start.
    """
    return torch.cat([_earlier(q_BHTE, lag) * weights_HLE[:, lag, None] for lag in _lags_within(q_BHTE, lags)], dim=-1)


def stack_keys(k_BHTE: Tensor, lags: int, layout: Layout) -> Tensor:
    """Beside each key the `lags` - 1 before it, zero beyond its document. (B, H, T, L*E)."""
    pieces = [_earlier(k_BHTE, lag) for lag in _lags_within(k_BHTE, lags)]
    if not layout.ramps:
        pieces[1:] = [piece * layout.reaches(lag) for lag, piece in enumerate(pieces[1:], 1)]
    return torch.cat(pieces, dim=-1)


def _lags_within(x_BHTE: Tensor, lags: int) -> range:
    return range(min(lags, x_BHTE.shape[2]))


def _earlier(x_BHTE: Tensor, lag: int) -> Tensor:
    return F.pad(x_BHTE[:, :, :-lag], (0, 0, lag, 0)) if lag else x_BHTE


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
