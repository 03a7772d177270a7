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
        if torch._C._functorch.is_batchedtensor(x):
            return _MappedRmsNorm.apply(x, weight, eps)[0]
        return _RmsNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


# torch composes RMSNorm from seven passes over memory on a CPU; two forward and three backward are enough


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and what the gradient needs: x of size 1, and the factor that made it so."""
    rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = rms.mul_(rms).div_(x.shape[-1]).add_(eps).rsqrt_()
    unit = x * scale
    return unit * weight, unit, scale


def _backward(grad: Tensor, unit: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, None]:
    product = grad * unit
    grad_weight = product.reshape(-1, weight.shape[0]).sum(0)
    # d/dx of w * x * s: s * (g*w - unit * mean(g*w*unit))
    inner = (product @ weight).div_(weight.shape[0]).unsqueeze(-1)
    grad_x = torch.addcmul(grad * weight, unit, inner, value=-1).mul_(scale)
    return grad_x, grad_weight, None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, unit, scale = _forward(x, weight, eps)
        ctx.save_for_backward(unit, scale, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return _backward(grad, *ctx.saved_tensors)


class _MappedRmsNorm(torch.autograd.Function):
    """The same where torch.func.vmap can see into it, which costs some microseconds a call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(x, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, unit, scale = output
        ctx.save_for_backward(unit, scale, inputs[1])
        ctx.mark_non_differentiable(unit, scale)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor, Tensor, None]:
        return _backward(grad, *ctx.saved_tensors)
