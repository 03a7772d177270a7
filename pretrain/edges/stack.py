"""A stack of layers over tokens and edges.

    x += Nodes(Norm(x), e);   x += Channel(Norm(x));   e <- Update(e, x)

After the last look at edges their update would reach nothing: the last layer has none.

Shapes: B rows, T tokens of a piece, S tokens so far, D width of a token, C width of an edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain import channel
from pretrain.block import site_of
from pretrain.channel import Aux
from pretrain.config import ModelConfig
from pretrain.connections import close_streams, make_connection, open_streams
from pretrain.edges.part import EdgeUpdate, NodeMixer, Part
from pretrain.edges.start import EdgeStart, Rows
from pretrain.layout import Layout
from pretrain.mixer import State
from pretrain.norms import make_norm
from pretrain.stack import Stack, StackOutput


class EdgeLayer(nn.Module):
    """One layer. number: from 0. streams: residual streams of tokens."""

    def __init__(self, config: ModelConfig, number: int, nodes: NodeMixer, update: EdgeUpdate, streams: int) -> None:
        super().__init__()
        part, self.dropout, self.streams = config.channel, config.dropout, streams
        self.norm1, self.norm2 = (make_norm(config.norm, config.width, config.bias) for _ in range(2))
        self.nodes = nodes
        self.channel = channel.make(part.name, part.options, site_of(config, number), part.file)
        self.connect1, self.connect2 = (make_connection(streams, 2 * number + n, config.width) for n in range(2))
        self.update = update if number < config.depth - 1 else None

    def forward(self, h: Tensor, e_BTSC: Tensor, rows: Rows, state: State) -> tuple[Tensor, Tensor, State, Aux | None]:
        """Tokens in their streams, edges, the state after them, and what the channel mixer tells."""
        of_nodes, of_channel, of_update = (None, None, None) if state is None else state

        def mix_tokens(x_BTD: Tensor) -> tuple[Tensor, tuple[Any, State]]:
            y_BTD, told, after = self.nodes(self.norm1(x_BTD), e_BTSC, rows, of_nodes)
            return self._drop(y_BTD), (told, after)

        def mix_channels(x_BTD: Tensor) -> tuple[Tensor, Any]:
            x_BTD = self.norm2(x_BTD)
            if state is None:
                y_BTD, extra = self.channel(x_BTD, rows.layout)
            else:
                y_BTD, extra = self.channel.stream(x_BTD, rows.layout, of_channel)
            return self._drop(y_BTD), extra

        h, (told, of_nodes_after) = self.connect1(h, mix_tokens)
        h, extra = self.connect2(h, mix_channels)
        after_BTSC = e_BTSC
        if self.update is not None:
            x_BTD = close_streams(h, self.streams).to(e_BTSC.dtype)
            after_BTSC, of_update = self.update(e_BTSC, x_BTD, told, rows, of_update)
        if state is None:
            return h, after_BTSC, None, extra
        return h, after_BTSC, (of_nodes_after, extra, of_update), None

    def initial_state(self, rows: int, like: Tensor) -> State:
        """The states of tokens, channel mixer and edges before the first token of `rows` streams."""
        of_update = None if self.update is None else self.update.initial_state(rows, like)
        return self.nodes.initial_state(rows, like), self.channel.initial_state(rows, like), of_update

    def state_bytes(self, length: int) -> int:
        """Bytes of the state of one sequence after `length` tokens, in bf16."""
        return self.channel.state_bytes() + sum(part.state_bytes(length) for part in self.parts())

    def parts(self) -> list[Part]:
        """Those whose cost per token depends on the length."""
        return [self.nodes] if self.update is None else [self.nodes, self.update]

    def flops_per_token(self, length: int) -> int:
        """Operations of a forward pass per token of a row of `length`."""
        once = self.connect1.flops_per_token() + self.connect2.flops_per_token() + self.channel.flops_per_token()
        return once + sum(part.flops_per_token(length) for part in self.parts())

    def _drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout) if self.dropout and self.training else y


class EdgeStack(Stack):
    """Layers over edges of `width`. A subclass says what is in them."""

    def __init__(self, config: ModelConfig, width: int, layers: Sequence[EdgeLayer]) -> None:
        super().__init__()
        self.streams = layers[0].streams
        self.start = EdgeStart(config, width)
        self.layers = nn.ModuleList(layers)

    def forward(self, x_BTD: Tensor, layout: Layout, state: State = None) -> StackOutput:
        seen, befores = (None, [None] * len(self.layers)) if state is None else state
        e_BTSC, rows, seen = self.start(x_BTD, layout, seen)
        h, afters, auxes = open_streams(x_BTD, self.streams), [], []
        for layer, before in zip(self.layers, befores):
            h, e_BTSC, after, aux = self.run(layer, h, e_BTSC, rows, before)
            afters.append(after)
            auxes += [aux] if aux is not None else []
        x_BTD = close_streams(h, self.streams).to(x_BTD.dtype)
        return StackOutput(x_BTD, None if state is None else (seen, tuple(afters)), tuple(auxes))

    def initial_state(self, rows: int, like: Tensor) -> State:
        return self.start.initial_state(rows, like), tuple(layer.initial_state(rows, like) for layer in self._layers())

    def flops_per_token(self, length: int) -> int:
        return self.start.flops_per_token() + sum(layer.flops_per_token(length) for layer in self._layers())

    def halved_flops_per_token(self, length: int) -> int:
        return sum(part.halved_flops_per_token(length) for layer in self._layers() for part in layer.parts())

    def state_bytes(self, length: int) -> int:
        return self.start.state_bytes(length) + sum(layer.state_bytes(length) for layer in self._layers())

    def segments(self) -> Sequence[nn.Module]:
        return self._layers()

    def _layers(self) -> list[EdgeLayer]:
        return list(self.layers)  # type: ignore[arg-type]
