"""A block: one token mixer and one channel mixer, each behind a norm and beside a residual.

    x += Mixer(Norm(x));  x += Channel(Norm(x))

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain import channel, mixer
from pretrain.channel import Aux, ChannelMixer
from pretrain.config import ModelConfig
from pretrain.layout import Layout
from pretrain.mixer import Site, State, TokenMixer
from pretrain.norms import make_norm


class Block(nn.Module):
    """One layer of a stack."""

    def __init__(self, norms: tuple[nn.Module, nn.Module], mix: TokenMixer, chan: ChannelMixer, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.mixer, self.channel, self.dropout = mix, chan, dropout

    def forward(self, x_BTD: Tensor, layout: Layout, state: State = None) -> tuple[Tensor, State, Aux | None]:
        of_mixer, of_channel = (None, None) if state is None else state
        y_BTD, of_mixer = self.mixer(self.norm1(x_BTD), layout, of_mixer)
        x_BTD, aux = x_BTD + dropped(y_BTD, self.dropout, self.training), None
        if state is None:
            y_BTD, aux = self.channel(self.norm2(x_BTD), layout)
        else:
            y_BTD, of_channel = self.channel.stream(self.norm2(x_BTD), layout, of_channel)
            state = of_mixer, of_channel
        return x_BTD + dropped(y_BTD, self.dropout, self.training), state, aux

    def initial_state(self, rows: int, like: Tensor) -> State:
        """The states of both mixers before the first token of `rows` streams."""
        return self.mixer.initial_state(rows, like), self.channel.initial_state(rows, like)

    def state_bytes(self, length: int) -> int:
        """Bytes of the state of one sequence after `length` tokens, in bf16."""
        return self.mixer.state_bytes(length) + self.channel.state_bytes()

    def flops_per_token(self, length: int) -> int:
        """Operations of a forward pass per token of a row of `length`."""
        return self.mixer.flops_per_token(length) + self.channel.flops_per_token()


def dropped(x: Tensor, share: float, training: bool) -> Tensor:
    """In training a share of `x` is set to 0, and the rest made larger for it."""
    return F.dropout(x, share) if share and training else x


def site_of(config: ModelConfig, layer: int) -> Site:
    """What the parts of a layer are told about where they are."""
    return Site(config.width, config.length, layer, config.depth, config.bias, config.positions)


def make_block(config: ModelConfig, layer: int) -> Block:
    """The block of a layer; mixers are tiled over the depth."""
    site, chosen, chan = site_of(config, layer), config.mixers[layer % len(config.mixers)], config.channel
    norms = (make_norm(config.norm, config.width, config.bias), make_norm(config.norm, config.width, config.bias))
    mix = mixer.make(chosen.name, chosen.options, site, chosen.file)
    return Block(norms, mix, channel.make(chan.name, chan.options, site, chan.file), config.dropout)
