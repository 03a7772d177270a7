"""Norms. RMSNorm (arXiv 1910.07467): y = w * x / sqrt(mean(x^2) + eps), the mean over the width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_naive(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as its equation says. x: (..., D). weight: (D,)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm, in the fastest form the device has. x: (..., D). weight: (D,)."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        return _RmsNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class _RmsNorm(torch.autograd.Function):
    """torch composes RMSNorm from seven passes over memory on a CPU; two forward and three backward are enough."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = rms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        product = grad * unit
        grad_weight = product.reshape(-1, weight.shape[0]).sum(0)
        # d/dx of w * x * s: s * (g*w - unit * mean(g*w*unit))
        inner = (product @ weight).div_(weight.shape[0]).unsqueeze(-1)
        grad_x = torch.addcmul(grad * weight, unit, inner, value=-1).mul_(scale)
        return grad_x, grad_weight, None
