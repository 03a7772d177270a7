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

_EXPLICIT_BYTES, _CACHE_BYTES = 64 << 20, 1 << 20


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
    """`_attend_explicit` of all members of a map, whose scores stay in a core's cache from one operation to the next.

    q, k (M, B, H, T, E), v (M, B, H, T, V); bias as of `Layout.mask_bias`.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        heads = q.shape[1:3]
        q, k, v = (x.flatten(1, 2).contiguous() for x in (q * scale, k, v))
        weights, out = q.new_empty(*q.shape[:-1], k.shape[-2]), q.new_empty(*q.shape[:-1], v.shape[-1])
        for some in _cached(weights):
            part = weights[some].flatten(0, 1)
            torch.bmm(q[some].flatten(0, 1), k[some].flatten(0, 1).transpose(1, 2), out=part)
            part.view(-1, *heads, *part.shape[1:]).add_(bias)
            torch.softmax(part, -1, out=part)
            torch.bmm(part, v[some].flatten(0, 1), out=out[some].flatten(0, 1))
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.heads = scale, heads
        return out.unflatten(1, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, weights = ctx.saved_tensors
        grad = grad.flatten(1, 2).contiguous()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        buffer = torch.empty_like(weights[_cached(weights)[0]].flatten(0, 1))
        for some in _cached(weights):
            part, rows = weights[some].flatten(0, 1), grad[some].flatten(0, 1)
            torch.bmm(part.transpose(1, 2), rows, out=grad_v[some].flatten(0, 1))
            scores = buffer[: len(part)]
            torch.bmm(rows, v[some].flatten(0, 1).transpose(1, 2), out=scores)
            torch._softmax_backward_data(scores, part, -1, part.dtype, grad_input=scores)
            torch.bmm(scores, k[some].flatten(0, 1), out=grad_q[some].flatten(0, 1))
            torch.bmm(scores.transpose(1, 2), q[some].flatten(0, 1), out=grad_k[some].flatten(0, 1))
        grad_q.mul_(ctx.scale)
        grads = [grad.unflatten(1, ctx.heads) for grad in (grad_q, grad_k, grad_v)]
        return grads[0], grads[1], grads[2], None, None


def _cached(weights: Tensor) -> list[slice]:
    """All members, so many at a time that their weights fit into a core's cache; at least one."""
    members = len(weights)
    step = max(1, _CACHE_BYTES * members // max(1, weights.numel() * weights.element_size()))
    return [slice(first, first + step) for first in range(0, members, step)]


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
