"""Softmax attention over packed documents.

Shapes: B rows, H heads, T queries, S keys, E head width.
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
        q, k, v = (x.flatten(0, 2).contiguous() for x in (q, k, v))
        found, kept = [], []
        for rows, seen in _blocks(q.shape[1]):
            weights = _product(q[:, rows], k[:, seen].mT, scale)
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
        grads_q: list[Tensor] = []
        grads: list[Tensor] = []
        # the last block first: it sees all keys, and the others add to what it gives
        for (rows, seen), weights in reversed([*zip(_blocks(q.shape[1]), kept)]):
            scores = torch.bmm(grad[:, rows], v[:, seen].mT)
            torch._softmax_backward_data(scores, weights, -1, weights.dtype, grad_input=scores)
            grads_q.append(_product(scores, k[:, seen], ctx.scale))
            # early keys are added to once for every block: in bf16 the sum would lose what each adds
            parts = (_product(scores.mT, q[:, rows], ctx.scale), torch.bmm(weights.mT, grad[:, rows]))
            if not grads:
                grads = [part.to(exact(part.dtype)) for part in parts]
                continue
            for total, part in zip(grads, parts):
                total[:, seen] += part
        every = torch.cat(grads_q[::-1], 1), grads[0].to(k.dtype), grads[1].to(v.dtype)
        grad_q, grad_k, grad_v = (each.unflatten(0, ctx.heads) for each in every)
        return grad_q, grad_k, grad_v, None, None


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a b of every matrix, the factor within the product."""
    out = a.new_empty(len(a), a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


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
