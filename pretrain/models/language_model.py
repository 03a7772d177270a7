"""The language model: embed, blocks of a token mixer and a channel mixer, norm, loss.

    x += Mixer(Norm(x));  x += Channel(Norm(x))   in each block;   logits = Norm(x) W_head^T

Shapes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.errors import UsageError
from data_pipeline.batch import Batch
from pretrain import channel, mixer
from pretrain.channel import ChannelMixer
from pretrain.config import ModelConfig
from pretrain.init import constant, declare, embedding, linear
from pretrain.layout import Layout
from pretrain.mixer import Site, State, TokenMixer
from pretrain.ops.loss import cross_entropy
from pretrain.ops.norm import rms_norm


class LossParts(NamedTuple):
    """The loss of a batch.

    total: summed over the counted targets, to differentiate. loss_BT: of each token, 0 where not counted, no gradient.
    """

    total: Tensor
    loss_BT: Tensor


class StreamState(NamedTuple):
    """Where a stream of text stands: one state per block, and the position and document of the last token (B,)."""

    blocks: tuple[State, ...]
    pos_B: Tensor
    doc_B: Tensor


class RmsNorm(nn.Module):
    """RMSNorm with a gain, and no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        declare(self, {"weight": constant(1.0)})

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class LayerNorm(nn.Module):
    """LayerNorm with a gain and, where the model has biases, a bias."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        declare(self, {"weight": constant(1.0), "bias": constant(0.0)})

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


class Block(nn.Module):
    """One token mixer and one channel mixer, each behind a norm and beside a residual."""

    def __init__(self, norms: tuple[nn.Module, nn.Module], mix: TokenMixer, chan: ChannelMixer, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.mixer, self.channel, self.dropout = mix, chan, dropout

    def forward(self, x_BTD: Tensor, layout: Layout, state: State = None) -> tuple[Tensor, State]:
        y_BTD, state = self.mixer(self.norm1(x_BTD), layout, state)
        x_BTD = x_BTD + self._drop(y_BTD)
        return x_BTD + self._drop(self.channel(self.norm2(x_BTD), layout)), state

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


class LanguageModel(nn.Module):
    """A causal language model over any mixers, tiled over its depth."""

    def __init__(self, config: ModelConfig, vocab: int) -> None:
        super().__init__()
        self.vocab, self.length, self.depth = vocab, config.length, config.depth
        self.width, self.dropout = config.width, config.dropout
        self.recompute = False
        """Whether blocks are run again in the backward pass instead of keeping their activations."""
        self.embed = embedding(vocab, config.width)
        self.places = embedding(config.length, config.width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList([self._block(config, layer) for layer in range(config.depth)])
        self.norm = _norm(config)
        self.head = None if config.tie else linear(config.width, vocab, bias=config.bias)

    @staticmethod
    def _block(config: ModelConfig, layer: int) -> Block:
        site = Site(config.width, config.length, layer, config.depth, config.bias, config.positions)
        chosen = config.mixers[layer % len(config.mixers)]
        mix = mixer.make(chosen.name, chosen.options, site, chosen.file)
        chan = channel.make(config.channel.name, config.channel.options, site, config.channel.file)
        return Block((_norm(config), _norm(config)), mix, chan, config.dropout)

    def forward(self, batch: Batch) -> LossParts:
        """The loss of a batch."""
        layout = Layout(batch.doc_BT, batch.pos_BT, not batch.packed)
        x_BTD, _ = self.hidden(batch.tokens_BT, layout)
        weight, bias = self._head()
        total, loss_N = cross_entropy(x_BTD.flatten(0, 1), weight, bias, batch.targets_BT.reshape(-1))
        return LossParts(total, loss_N.view(batch.targets_BT.shape))

    def logits(self, tokens_BT: Tensor, layout: Layout) -> Tensor:
        """(B, T, V): the logits of the token after each, by the training form."""
        x_BTD, _ = self.hidden(tokens_BT, layout)
        return F.linear(x_BTD, *self._head())

    def initial_state(self, rows: int) -> StreamState:
        """The state before the first token of `rows` streams."""
        like = self.embed.weight
        blocks = tuple(block.mixer.initial_state(rows, like) for block in self._blocks())
        ones = torch.ones(rows, dtype=torch.long, device=like.device)
        return StreamState(blocks, -ones, 0 * ones)

    def decode(self, tokens_BT: Tensor, state: StreamState, layout: Layout | None = None) -> tuple[Tensor, StreamState]:
        """(B, T, V) logits of the token after each, going on from `state`, and the state after them.

        Without a layout the tokens go on in the document that the state is in.
        """
        if layout is None:
            steps = torch.arange(1, tokens_BT.shape[1] + 1, device=tokens_BT.device)
            pos_BT = state.pos_B[:, None] + steps
            layout = Layout(state.doc_B[:, None].expand_as(pos_BT), pos_BT, False)
        x_BTD, blocks = self.hidden(tokens_BT, layout, state.blocks)
        return F.linear(x_BTD, *self._head()), StreamState(blocks, layout.pos_BT[:, -1], layout.doc_BT[:, -1])

    def hidden(
        self, tokens_BT: Tensor, layout: Layout, states: Sequence[State] | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """(B, T, D) after the last norm, and the blocks' states."""
        x_BTD = self.embed(tokens_BT)
        if self.places is not None:
            x_BTD = x_BTD + self.places(self._checked_places(layout, states is not None))
        if self.dropout and self.training:
            x_BTD = F.dropout(x_BTD, self.dropout)
        after = []
        for block, state in zip(self.blocks, states or [None] * self.depth):
            if self.recompute and self.training and torch.is_grad_enabled():
                x_BTD, state = checkpoint(block, x_BTD, layout, state, use_reentrant=False)
            else:
                x_BTD, state = block(x_BTD, layout, state)
            after.append(state)
        return self.norm(x_BTD), tuple(after)

    def flops_per_token(self) -> int:
        """Operations of a forward pass per token of a training row, the head included."""
        blocks = sum(b.mixer.flops_per_token(self.length) + b.channel.flops_per_token() for b in self._blocks())
        return blocks + 2 * self.width * self.vocab

    def state_bytes(self, length: int) -> int:
        """Bytes that decoding keeps for one sequence after `length` tokens, in bf16."""
        return sum(block.mixer.state_bytes(length) for block in self._blocks())

    def _head(self) -> tuple[Tensor, Tensor | None]:
        return (self.embed.weight, None) if self.head is None else (self.head.weight, self.head.bias)

    def _blocks(self) -> list[Any]:
        return list(self.blocks)

    def _checked_places(self, layout: Layout, streaming: bool) -> Tensor:
        # only a stream can run past the table; asking costs a wait for the device, so training does not
        if streaming and int(layout.pos_BT.max()) >= self.length:
            raise UsageError(
                f"this model has learned positions for {self.length} tokens and cannot go on after them;"
                " use a shorter prompt or fewer tokens, or train with model.positions rope"
            )
        return layout.pos_BT


def build(config: ModelConfig, vocab: int) -> LanguageModel:
    """The model on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return LanguageModel(config, vocab)


def _norm(config: ModelConfig) -> nn.Module:
    return RmsNorm(config.width) if config.norm == "rmsnorm" else LayerNorm(config.width, config.bias)
