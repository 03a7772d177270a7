"""The one interface of every channel mixer: what a block does within a token, across its width."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pretrain.layout import Layout
from pretrain.mixer import ParamGroup, Site
from pretrain.registry import Registry


class ChannelMixer(nn.Module, ABC):
    """(B, T, D) to (B, T, D), each token by itself unless the layout says what came before it."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, layout: Layout) -> Tensor:
        """Mix the channels of every token."""

    @abstractmethod
    def flops_per_token(self) -> int:
        """Operations of a forward pass per token; a multiply-add is 2."""

    def param_groups(self) -> list[ParamGroup]:
        """Parameters that the general rule (matrices decay, all else does not) does not fit."""
        return []


REGISTRY: Registry[ChannelMixer] = Registry("channel", Path(__file__).with_name("channels"), "pretrain.channels")
register = REGISTRY.register


def make(name: str, options: Mapping[str, Any], site: Site, file: str | None = None) -> ChannelMixer:
    """The channel mixer `name`, with its options checked by its own configuration, built for `site`."""
    return REGISTRY.make(name, options, site, file)
