"""A matrix times the outer product of two vectors, y_k = sum_{ij} W[k, (j, i)] a_i b_j, without the product in memory.

Shapes: I and J the widths of a and b, K the width of y; the columns of W are J blocks of I.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.ops.scan import exact


def outer_linear_naive(a: Tensor, b: Tensor, weight_KJI: Tensor) -> Tensor:
    """The equation itself, a (..., I), b (..., J), the weight as (K, J I): (..., K). Keeps I J numbers a token."""
    return torch.einsum("...i,...j,kji->...k", a, b, weight_KJI.unflatten(1, (b.shape[-1], a.shape[-1])))


def outer_linear(a: Tensor, b: Tensor, weight_KJI: Tensor) -> Tensor:
    """The same: J products of matrices, one after the other, and nothing kept but a, b and the weight."""
    return _OuterLinear.apply(a, b, weight_KJI)


class _OuterLinear(torch.autograd.Function):
    """autograd would keep each of the J factors or results; made again, they cost one pass over memory each."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        blocks = weight.split(a.shape[-1], dim=1)
        y = ((a * b[..., :1]) @ blocks[0].T).to(exact(a.dtype))
        for j, block in enumerate(blocks[1:], start=1):
            y += (a * b[..., j, None]) @ block.T
        return y.to(a.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, weight = ctx.saved_tensors
        grad_a, grad_b, grad_weight = torch.zeros_like(a, dtype=exact(a.dtype)), [], []
        for j, block in enumerate(weight.split(a.shape[-1], dim=1)):
            b_j, pulled = b[..., j, None], grad @ block
            grad_a = grad_a + b_j * pulled
            grad_b.append((a * pulled).sum(-1))
            grad_weight.append(grad.flatten(0, -2).T @ (a * b_j).flatten(0, -2))
        return grad_a.to(a.dtype), torch.stack(grad_b, dim=-1), torch.cat(grad_weight, dim=1)
