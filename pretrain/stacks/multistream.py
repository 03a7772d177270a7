"""Multistream: several streams of the same tokens through the same weights, whose attention heads talk to each other.

    x_s = a_s * x + b_s     for s = 1 ... N streams;  then in every layer, over the N H heads of all streams together,
    A = softmax(mask(talk(q k^T / sqrt(E)))),   x += W_o (talk'(A) v),   x += Channel(Norm(x));      y = sum_s x_s

    linear talk:     S + W S over heads (arXiv 2003.02436)
    nonlinear talk:  S + W_2 gelu(W_1 RMSNorm(S)), of scores alone: a norm over heads would make the smallest weights
                     as large as the largest

The mask comes after the first talk; the second mixes rows of zeros where nothing may be seen, so that it stays causal.
W and W_2 are 0 at first: streams begin as copies that differ by b. `diversity` subtracts from the loss the entropy of
attention averaged over streams, which is high where streams look at different tokens.
Source: lucidrains/quartic-transformer, which is not causal and has no loss figure (docs/QUARTIC.md).

Shapes: B rows, N streams, F = B N, T tokens, S tokens so far, D width, H heads, M = N H, E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Config as Options
from configs.schema import key
from pretrain import channel
from pretrain.block import site_of
from pretrain.channel import Aux, Teller
from pretrain.config import ModelConfig
from pretrain.init import constant, declare, embedding, linear, normal, residual
from pretrain.layout import Layout
from pretrain.mixer import State
from pretrain.norms import make_norm
from pretrain.ops.heads import Cache, empty_cache, extend, head_width, split_heads, visible
from pretrain.ops.norm import rms_norm
from pretrain.ops.talking import exact_scores, masked_softmax, talk
from pretrain.stack import Stack, StackOutput, register


class Config(Options):
    """Mixers of the model are not used: attention is the stack's own."""

    streams: int = key(2, "match", "streams N; each costs as much as a model", gt=0)
    heads: int = key(4, "match", "heads of each stream", gt=0)
    talking: Literal["none", "linear", "nonlinear"] = key("linear", "match", "how heads of all streams are mixed")
    diversity: float = key(0.0, "match", "weight of the entropy of attention averaged over streams", ge=0)
    rope_base: float = key(10000.0, "match", "base of the rotary angles", gt=0)


class Silence(nn.Module):
    """Heads that do not talk."""

    def forward(self, a_BMTS: Tensor) -> Tensor:
        return a_BMTS

    def flops_per_pair(self) -> int:
        """Operations per query and key, over all heads."""
        return 0


class Talk(Silence):
    """Heads mixed linearly, beside a residual."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, heads))
        declare(self, {"weight": constant(0.0)})

    def forward(self, a_BMTS: Tensor) -> Tensor:
        return talk(a_BMTS, self.weight)

    def flops_per_pair(self) -> int:
        """Operations per query and key, over all heads."""
        return 2 * self.weight.numel()


class NonlinearTalk(Silence):
    """A small perceptron over heads, beside a residual."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(heads))
        self.up, self.down = (nn.Parameter(torch.empty(shape)) for shape in ((2 * heads, heads), (heads, 2 * heads)))
        declare(self, {"gain": constant(1.0), "up": normal(heads**-0.5), "down": constant(0.0)})

    def forward(self, a_BMTS: Tensor) -> Tensor:
        gain, up, down = (weight.to(a_BMTS.dtype) for weight in (self.gain, self.up, self.down))
        hidden = F.gelu(F.linear(rms_norm(a_BMTS.movedim(1, -1), gain), up))
        return a_BMTS + F.linear(hidden, down).movedim(-1, 1)

    def flops_per_pair(self) -> int:
        """Operations per query and key, over all heads."""
        return 2 * (self.up.numel() + self.down.numel())


def make_talks(kind: Literal["none", "linear", "nonlinear"], heads: int) -> tuple[Silence, Silence]:
    """How heads are mixed before the mask, and after softmax."""
    if kind == "none":
        return Silence(), Silence()
    return Talk(heads) if kind == "linear" else NonlinearTalk(heads), Talk(heads)


class StreamAttention(Teller):
    """Attention of all streams. Its state: the cache of their M heads."""

    def __init__(self, options: Config, config: ModelConfig) -> None:
        super().__init__()
        self.streams, self.heads, self.width = options.streams, options.heads, config.width
        self.head_width = head_width(site_of(config, 0), options.heads, options.heads)
        self.base = options.rope_base if config.positions == "rope" else None
        self.diversity = options.diversity
        self.qkv = linear(config.width, 3 * config.width, bias=config.bias)
        self.talk, self.talk_after = make_talks(options.talking, options.streams * options.heads)
        self.out = residual(config.width, config.width, config.depth, bias=config.bias)

    def forward(self, x_FTD: Tensor, layout: Layout, state: Cache | None) -> tuple[Tensor, Cache | None, Aux | None]:
        of_streams = split_heads(self.qkv(x_FTD), self.heads, self.heads)
        q, k, v = (x_FHTE.unflatten(0, (-1, self.streams)).flatten(1, 2) for x_FHTE in of_streams)
        if self.base is not None:
            rotary = layout.rotary(self.head_width, self.base, x_FTD.dtype)
            q, k = rotary.rotate(q), rotary.rotate(k)
        mask_B1TS = layout.mask()
        if state is not None:
            state = extend(state, k, v, layout)
            k, v, mask_B1TS = state.k, state.v, visible(layout, state)
        weights_BMTS = masked_softmax(self.talk(exact_scores(q, k)), mask_B1TS[:, 0])
        y_BMTE = self.talk_after(weights_BMTS).to(v.dtype) @ v
        y_FTHE = y_BMTE.unflatten(1, (self.streams, self.heads)).flatten(0, 1).transpose(1, 2)
        return self.out(y_FTHE.flatten(2)), state, self._told(weights_BMTS)

    def initial_state(self, rows: int, like: Tensor) -> Cache:
        return empty_cache(rows, self.streams * self.heads, self.head_width, like)

    def flops_per_token(self, length: int) -> int:
        return 8 * self.streams * self.width * self.width + self.halved_flops_per_token(length)

    def halved_flops_per_token(self, length: int) -> int:
        talks = self.talk.flops_per_pair() + self.talk_after.flops_per_pair()
        return length * (4 * self.streams * self.width + talks) // 2

    def state_bytes(self, length: int) -> int:
        return 2 * 2 * self.streams * self.width * length

    def measure_names(self) -> tuple[str, ...]:
        return ("entropy", "tokens") if self.diversity else ()

    def figures(self, measures: Sequence[float]) -> dict[str, float]:
        """Nats of a token's attention."""
        entropy, tokens = measures
        return {"entropy": entropy / tokens}

    def _told(self, weights_BMTS: Tensor) -> Aux | None:
        """Minus the weighted entropy, in nats, of attention averaged over streams; summed over tokens, as a measure."""
        if not self.diversity:
            return None
        mean_BHTS = weights_BMTS.unflatten(1, (self.streams, self.heads)).mean(1)
        # p log p is 0 at p = 0, and its gradient has to be a number
        smallest = torch.finfo(mean_BHTS.dtype).tiny
        entropy_BT = -(mean_BHTS * mean_BHTS.clamp(min=smallest).log()).sum(-1).mean(1)
        told = torch.stack((entropy_BT.detach().sum(), entropy_BT.new_tensor(entropy_BT.numel())))
        return Aux(-self.diversity * entropy_BT.mean(), told)


class Layer(nn.Module):
    """Attention and channel mixer, both of all streams."""

    def __init__(self, options: Config, config: ModelConfig, number: int) -> None:
        super().__init__()
        part, self.dropout = config.channel, config.dropout
        self.norm1, self.norm2 = (make_norm(config.norm, config.width, config.bias) for _ in range(2))
        self.attention = StreamAttention(options, config)
        self.channel = channel.make(part.name, part.options, site_of(config, number), part.file)

    def forward(
        self, x_FTD: Tensor, layout: Layout, of_streams: Layout, state: State
    ) -> tuple[Tensor, State, list[Aux]]:
        of_attention, of_channel = (None, None) if state is None else state
        y_FTD, of_attention, told = self.attention(self.norm1(x_FTD), layout, of_attention)
        x_FTD = x_FTD + self._drop(y_FTD)
        if state is not None:
            y_FTD, of_channel = self.channel.stream(self.norm2(x_FTD), of_streams, of_channel)
            return x_FTD + self._drop(y_FTD), (of_attention, of_channel), []
        y_FTD, aux = self.channel(self.norm2(x_FTD), of_streams)
        return x_FTD + self._drop(y_FTD), None, [each for each in (told, aux) if each is not None]

    def _drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout) if self.dropout and self.training else y


@register(Config)
class MultiStream(Stack):
    def __init__(self, options: Config, config: ModelConfig) -> None:
        super().__init__()
        self.streams = options.streams
        # tables, as what they hold has no direction to decay from: a and b of every stream
        self.gain, self.shift = nn.Embedding(options.streams, config.width), embedding(options.streams, config.width)
        declare(self.gain, {"weight": constant(1.0)})
        self.layers = nn.ModuleList(Layer(options, config, number) for number in range(config.depth))

    def forward(self, x_BTD: Tensor, layout: Layout, state: State = None) -> StackOutput:
        numbers = torch.arange(self.streams, device=x_BTD.device)
        x_FTD = (x_BTD[:, None] * self.gain(numbers)[:, None] + self.shift(numbers)[:, None]).flatten(0, 1)
        doc_FT, pos_FT = (x.repeat_interleave(self.streams, dim=0) for x in (layout.doc_BT, layout.pos_BT))
        of_streams, states, auxes = Layout(doc_FT, pos_FT, layout.ramps), [], []
        for layer, before in zip(self.layers, state or [None] * len(self.layers)):
            x_FTD, after, told = self.run(layer, x_FTD, layout, of_streams, before)
            states.append(after)
            auxes += told
        x_BTD = x_FTD.unflatten(0, (-1, self.streams)).sum(1)
        return StackOutput(x_BTD, None if state is None else tuple(states), tuple(auxes))

    def initial_state(self, rows: int, like: Tensor) -> State:
        return tuple(
            (layer.attention.initial_state(rows, like), layer.channel.initial_state(rows * self.streams, like))
            for layer in self._layers()
        )

    def flops_per_token(self, length: int) -> int:
        channels = sum(layer.channel.flops_per_token() for layer in self._layers())
        return self.streams * channels + sum(layer.attention.flops_per_token(length) for layer in self._layers())

    def halved_flops_per_token(self, length: int) -> int:
        return sum(layer.attention.halved_flops_per_token(length) for layer in self._layers())

    def state_bytes(self, length: int) -> int:
        channels = self.streams * sum(layer.channel.state_bytes() for layer in self._layers())
        return channels + sum(layer.attention.state_bytes(length) for layer in self._layers())

    def segments(self) -> Sequence[nn.Module]:
        return self._layers()

    def _layers(self) -> list[Layer]:
        return list(self.layers)  # type: ignore[arg-type]
