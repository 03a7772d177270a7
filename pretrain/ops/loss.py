"""Cross-entropy of next tokens without keeping logits: (N, V) exists a chunk at a time.

The gradient is made in the forward pass, chunk by chunk, and scaled in the backward pass. So memory is O(chunk * V)
beside the gradients themselves, and no product is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.batch import IGNORE

CHUNK_ELEMENTS = 1 << 24
"""Logits held at once: 64 MiB in fp32."""


def cross_entropy_naive(x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
    """-log softmax(x W^T + b)[target] per token, 0 where the target is IGNORE. (N,)."""
    logits = (
        F.linear(x_ND, weight_VD, bias_V).float() if x_ND.dtype != torch.float64 else F.linear(x_ND, weight_VD, bias_V)
    )
    return F.cross_entropy(logits, targets_N, ignore_index=IGNORE, reduction="none")


def cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, chunk_elements: int = CHUNK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """The summed loss (a scalar to differentiate) and the loss of each token (N,), which carries no gradient.

    x_ND: hidden states. weight_VD, bias_V: the head. targets_N: ids or IGNORE.
    """
    if not torch.is_grad_enabled():
        loss_N = _forward(x_ND, weight_VD, bias_V, targets_N, chunk_elements)
        return loss_N.sum(), loss_N
    return _CrossEntropy.apply(x_ND, weight_VD, bias_V, targets_N, chunk_elements)


def _chunks(tokens: int, vocab: int, chunk_elements: int) -> list[slice]:
    size = max(1, chunk_elements // vocab)
    return [slice(at, min(at + size, tokens)) for at in range(0, tokens, size)]


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk_elements: int) -> Tensor:
    pieces = _chunks(len(x), len(weight), chunk_elements)
    return torch.cat([cross_entropy_naive(x[piece], weight, bias, targets[piece]) for piece in pieces])


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk_elements: int
    ) -> tuple[Tensor, Tensor]:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        losses, grad_x = [], torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=exact)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=exact)
        for piece in _chunks(len(x), len(weight), chunk_elements):
            logits = F.linear(x[piece], weight, bias).to(exact)
            counted = targets[piece] != IGNORE
            at = torch.where(counted, targets[piece], 0).unsqueeze(-1)
            top = logits.amax(-1, keepdim=True)
            target_logit = logits.gather(-1, at) - top
            odds = logits.sub_(top).exp_()
            total = odds.sum(-1, keepdim=True)
            losses.append((total.log() - target_logit).squeeze(-1).masked_fill(~counted, 0.0))
            # the same memory becomes the gradient of the logits: softmax - onehot, 0 where not counted
            grad = odds.mul_(counted.unsqueeze(-1) / total)
            grad.scatter_add_(-1, at, -counted.unsqueeze(-1).to(exact))
            low = grad.to(x.dtype)
            torch.mm(low, weight, out=grad_x[piece])
            grad_weight.addmm_(low.T, x[piece]) if x.dtype == exact else grad_weight.add_(low.T @ x[piece])
            if grad_bias is not None:
                grad_bias.add_(grad.sum(0))
        loss = torch.cat(losses)
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(loss)
        return loss.sum(), loss

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        scaled_bias = None if grad_bias is None else (grad_bias * grad_total).to(bias_dtype)
        return (
            grad_x * grad_total.to(grad_x.dtype),
            (grad_weight * grad_total).to(weight_dtype),
            scaled_bias,
            None,
            None,
        )
