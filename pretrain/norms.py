"""The norms a model may choose: RMSNorm, LayerNorm, and LayerNorm without parameters."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.init import constant, declare
from pretrain.ops.norm import rms_norm

NormName = Literal["rmsnorm", "layernorm", "layernorm_plain"]


class RmsNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) with a gain, and no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        declare(self, {"weight": constant(1.0)})

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class LayerNorm(nn.Module):
    """LayerNorm (arXiv 1607.06450) with a gain and, where the model has biases, a bias."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        declare(self, {"weight": constant(1.0), "bias": constant(0.0)})

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


class PlainLayerNorm(nn.Module):
    """LayerNorm without gain and bias, as ELiTA has it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])


def make_norm(name: NormName, width: int, bias: bool = False) -> nn.Module:
    """The norm `name` over vectors of `width`."""
    if name == "rmsnorm":
        return RmsNorm(width)
    return LayerNorm(width, bias) if name == "layernorm" else PlainLayerNorm()
