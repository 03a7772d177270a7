"""Norms. RMSNorm (arXiv 1910.07467): y = w * x / sqrt(mean(x^2) + eps), the mean over the width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.mapped import at_once, is_mapped, of_all_members


def rms_norm_naive(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as its equation says. x: (..., D). weight: (D,)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm, in the fastest form the device has. x: (..., D). weight: (D,)."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        if not is_mapped(x, weight):
            return _RmsNorm.apply(x, weight, eps)
        if at_once(x, weight):
            return of_all_members(lambda *both: _RmsNorm.apply(*both, eps), x, weight)
    return F.rms_norm(x, weight.shape, weight, eps)


class _RmsNorm(torch.autograd.Function):
    """torch composes RMSNorm from seven passes over memory on a CPU; two forward and three backward are enough.

    Of several members at once: x (M, ..., D) and weight (M, D).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = rms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * _over_rows(weight, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        product = grad * unit
        rows = product.flatten(weight.ndim - 1, -2) if product.ndim > weight.ndim else product.unsqueeze(-2)
        # d/dx of w * x * s: s * (g*w - unit * mean(g*w*unit))
        inner = (rows @ weight.unsqueeze(-1)).div_(weight.shape[-1]).view(scale.shape)
        grad_x = torch.addcmul(grad * _over_rows(weight, grad), unit, inner, value=-1).mul_(scale)
        return grad_x, rows.sum(-2), None


def _over_rows(weight: Tensor, x: Tensor) -> Tensor:
    return weight if weight.ndim == 1 else weight.view(len(weight), *([1] * (x.ndim - 2)), -1)
