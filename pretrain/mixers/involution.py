"""Causal involution: each token makes the kernel that is slid over its own past (Li et al., arXiv 2103.06255).

    kernel_t = W1 relu(norm(W0 x_t)) in R^{G x K};   y_t[c] = sum_{k < K} kernel_t[g(c), k] v_{t - k dilation}[c]

with v = x Wv, taps beyond the document's start 0, then Wo. Groups of channels share a kernel. The published norm is
BatchNorm, which lets rows see each other; here it is RMSNorm without a gain, which W1 would absorb. `softmax` over the
taps makes it a dynamic convolution (Wu et al., arXiv 1901.10430).

A layer sees (K - 1) dilation tokens back and keeps as many values while decoding. `dilation_growth` g multiplies the
dilation by g from layer to layer, and begins again where a kernel would outreach a training row.

The causal form and its values are this project's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import ConfigError
from configs.schema import Config as Options
from configs.schema import key
from pretrain.init import declare, linear, normal, residual, values
from pretrain.mixer import Layout, Site, TokenMixer, register
from pretrain.ops.involution import band_flops_per_channel, involution

_EPS = 1e-6


class Config(Options):
    kernel: int = key(32, "match", "taps K of a kernel; 1 is a gate", gt=0)
    groups: int | None = key(None, "match", "kernels of a token; empty: one for about 16 channels", gt=0)
    reduction: int = key(4, "match", "width over hidden width of what makes the kernels", gt=0)
    softmax: bool = key(False, "match", "kernels are positive and sum to 1")
    delta: bool = key(False, "match", "kernels begin with 1 more on the token itself")
    dilation: int = key(1, "match", "tokens from one tap to the next in the first layer", gt=0)
    dilation_growth: int = key(1, "match", "factor on the dilation from layer to layer", gt=0)


@register(Config)
class Involution(TokenMixer):
    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        self.width, self.taps, self.softmax = site.width, config.kernel, config.softmax
        self.groups = group_count(config.groups, site.width)
        self.dilation = layer_dilation(config, site)
        # a norm over one unit leaves its sign alone, and nothing to learn by
        hidden = max(2, site.width // config.reduction)
        self.squeeze = linear(site.width, hidden, bias=site.bias)
        self.kernel = nn.Linear(hidden, self.groups * self.taps, bias=site.bias or config.delta)
        fills = {"weight": normal(0.02)}
        if self.kernel.bias is not None:
            first = float(config.delta)
            fills["bias"] = values(lambda: F.pad(torch.full((self.groups, 1), first), (0, self.taps - 1)).flatten())
        declare(self.kernel, fills)
        self.value = linear(site.width, site.width, bias=site.bias)
        self.out = residual(site.width, site.width, site.depth, bias=site.bias)

    def forward(self, x_BTD: Tensor, layout: Layout, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        v_BTD = self.value(x_BTD)
        if state is None:
            v_BSD = F.pad(v_BTD, (0, 0, self._reach, 0))
        else:
            v_BSD = torch.cat((state, v_BTD), dim=1)
            state = v_BSD[:, v_BSD.shape[1] - self._reach :]
        y_BTGC = involution(self.kernels(x_BTD, layout), v_BSD.unflatten(-1, (self.groups, -1)), self.dilation)
        return self.out(y_BTGC.flatten(2)), state

    def kernels(self, x_BTD: Tensor, layout: Layout) -> Tensor:
        """(B, T, G, K): the kernel of every token and group, 0 beyond the document."""
        z_BTH = self.squeeze(x_BTD)
        z_BTH = F.relu(F.rms_norm(z_BTH, z_BTH.shape[-1:], eps=_EPS))
        kernel_BTGK = self.kernel(z_BTH).unflatten(-1, (self.groups, self.taps))
        if self.softmax:
            kernel_BTGK = kernel_BTGK.softmax(-1)
        if layout.ramps:
            return kernel_BTGK
        lag_K = self.dilation * torch.arange(self.taps, device=x_BTD.device)
        return kernel_BTGK * (layout.pos_BT[..., None] >= lag_K)[:, :, None]

    @property
    def _reach(self) -> int:
        return (self.taps - 1) * self.dilation

    def initial_state(self, rows: int, like: Tensor) -> Tensor:
        return like.new_zeros(rows, self._reach, self.width)

    def flops_per_token(self, length: int) -> int:
        made = self.squeeze.weight.numel() + self.kernel.weight.numel()
        return 2 * (made + 2 * self.width * self.width + self._taps_within(length) * self.width)

    def halved_flops_per_token(self, length: int) -> int:
        spent = band_flops_per_channel(length, self.taps, self.dilation) * self.width // length
        return spent - 2 * self._taps_within(length) * self.width

    def _taps_within(self, length: int) -> int:
        """Taps that meet a token of a row at all."""
        return min(self.taps, -(-length // self.dilation))

    def state_bytes(self, length: int) -> int:
        return 2 * self._reach * self.width


def group_count(groups: int | None, width: int) -> int:
    """Groups of channels, by default of about 16. Raises ConfigError where they do not divide the width."""
    divisors = [g for g in range(1, width + 1) if width % g == 0]
    if groups is None:
        return max(g for g in divisors if g <= max(1, width // 16))
    if groups not in divisors:
        near = min(divisors, key=lambda g: abs(g - groups))
        raise ConfigError(f"model.width {width} is not a multiple of {groups} groups; the nearest that fits is {near}")
    return groups


def layer_dilation(config: Config, site: Site) -> int:
    """The dilation of a layer: growing from the first, and again from the start where a row would be outreached."""
    dilations = [config.dilation]
    while (
        config.dilation_growth > 1
        and max(1, config.kernel - 1) * (after := dilations[-1] * config.dilation_growth) < site.length
    ):
        dilations.append(after)
    return dilations[site.layer % len(dilations)]
