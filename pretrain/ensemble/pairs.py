"""The models of an ensemble: modules of two, coupled after blocks, all of them run at once.

Shapes: K models (2 for each module: the first, the second), B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.block import dropped, make_block, site_of
from pretrain.channel import Aux
from pretrain.config import ModelConfig
from pretrain.ensemble.config import FIRST, SECOND
from pretrain.ensemble.coupling import Coupling
from pretrain.init import embedding, linear
from pretrain.layout import Layout
from pretrain.members import Members, MemberTables
from pretrain.mixer import State
from pretrain.norms import make_norm
from pretrain.stack import StackOutput
from pretrain.wrap import Shift, merged


class LayerState(NamedTuple):
    """State of a layer's blocks and of its couplings, of all models."""

    blocks: State
    couplings: State


class Layer(nn.Module):
    """One block of every model, and the couplings after it, if it has any."""

    def __init__(self, config: ModelConfig, layer: int, names: Sequence[str]) -> None:
        super().__init__()
        ensemble = config.ensemble
        self.blocks = Members(lambda: make_block(config, layer), names)
        coupled = ensemble.couple_every and (layer + 1) % ensemble.couple_every == 0
        site, heads, lags = site_of(config, layer), ensemble.couple_heads, ensemble.couple_lags
        make = partial(Coupling, site, config.norm, heads, lags, config.dropout)
        self.couplings = Members(make, names) if coupled else None

    def forward(self, x_KBTD: Tensor, layout: Layout, state: LayerState | None) -> tuple[Tensor, Any, Aux | None]:
        block_state, state_of_couplings = (None, None) if state is None else state
        x_KBTD, block_state, aux = self.blocks(x_KBTD, layout, block_state)
        if self.couplings is not None:
            other_KBTD = x_KBTD.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
            x_KBTD, state_of_couplings = self.couplings(x_KBTD, other_KBTD, state_of_couplings, layout)
        return x_KBTD, None if state is None else LayerState(block_state, state_of_couplings), aux


class Ran(NamedTuple):
    """h_KBTD: after the last norm, of each pass that a loss is made of; the last is the last pass's. states: of the
    layers, in the order they were run. auxes: what channel mixers tell of all models."""

    h_KBTD: list[Tensor]
    states: tuple[Any, ...]
    auxes: tuple[Aux, ...]


class Pairs(nn.Module):
    """All models from ids to (K, B, T, D) after the last norm. A wrapped stack is run `passes` times."""

    def __init__(self, config: ModelConfig, vocab: int) -> None:
        super().__init__()
        names = [f"{module}.{which}" for module in config.ensemble.modules for which in (FIRST, SECOND)]
        self.width, self.vocab, self.count, self.recompute = config.width, vocab, len(names), False
        self.dropout = config.dropout
        self.embed = MemberTables(lambda: embedding(vocab, config.width), names)
        learned = config.positions == "learned"
        self.places = MemberTables(lambda: embedding(config.length, config.width), names) if learned else None
        self.passes, self.recompute_passes = config.wrap.passes, config.wrap.passes > 1 and config.wrap.checkpoint
        self.trains_all = config.wrap.loss == "mean_all"
        shifts = range(self.passes if self.passes > 1 else 0)
        self.shifts = nn.ModuleList(Members(lambda: Shift(config.width), names) for _ in shifts)
        self.layers = nn.ModuleList(Layer(config, layer, names) for layer in range(config.depth))
        self.norm = Members(lambda: make_norm(config.norm, config.width, config.bias), names)
        self.head = None if config.tie else Members(lambda: linear(config.width, vocab, bias=config.bias), names)

    def forward(self, tokens_BT: Tensor, layout: Layout, states: Sequence[Any] | None = None) -> Ran:
        x_KBTD = self.embed(tokens_BT)
        if self.places is not None:
            x_KBTD = x_KBTD + self.places(layout.pos_BT)
        x_KBTD = dropped(x_KBTD, self.dropout, self.training)
        passes: list[StackOutput] = []
        depth = len(self.layers)
        before = states or [None] * (self.passes * depth)
        for number in range(self.passes):
            if self.passes > 1:
                x_KBTD = self.shifts[number](x_KBTD)
            own = before[number * depth : (number + 1) * depth]
            passes.append(self._run(self.recompute_passes, self._pass, x_KBTD, layout, own))
            x_KBTD = passes[-1].x_BTD
        trained = passes if self.trains_all and torch.is_grad_enabled() else passes[-1:]
        every = tuple(state for out in passes for state in out.state)
        return Ran([self.norm(out.x_BTD) for out in trained], every, merged(passes))

    def _pass(self, x_KBTD: Tensor, layout: Layout, states: Sequence[Any]) -> StackOutput:
        """All layers once."""
        after: list[Any] = []
        auxes: list[Aux] = []
        for layer, before in zip(self.layers, states):
            x_KBTD, state, aux = self._run(self.recompute, layer, x_KBTD, layout, before)
            after.append(state)
            auxes += [aux] if aux is not None else []
        return StackOutput(x_KBTD, tuple(after), tuple(auxes))

    def _run(self, again: bool, part: Callable[..., Any], *inputs: Any) -> Any:
        """What a part gives; `again`: in training only its inputs are kept, and it is run again in the backward
        pass."""
        if again and self.training and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """(K, V, D) and (K, V): of every model's head."""
        # by attribute: whoever shards parameters sees here that the table is needed outside its own module
        table: Any = self.embed if self.head is None else self.head
        return table.weight, getattr(table, "bias", None)

    def initial_state(self, rows: int) -> tuple[LayerState, ...]:
        """The layers' states before the first token of `rows` streams."""
        like, once = self.head_weights()[0], []
        for layer in self._layers():
            parts = [layer.blocks.template, None if layer.couplings is None else layer.couplings.template]
            states = [None if part is None else part.initial_state(rows, like) for part in parts]
            once.append(LayerState(*(self._of_all(state) for state in states)))
        return tuple(once) * self.passes

    def _of_all(self, state: State) -> State:
        def stacked(leaf: Any) -> Any:
            return leaf.expand(self.count, *leaf.shape) if torch.is_tensor(leaf) else leaf

        return torch.utils._pytree.tree_map(stacked, state)

    def flops_per_token(self, length: int) -> int:
        """Operations of a forward pass of all models per token of a row of `length`, heads included."""
        once = 0
        for layer in self._layers():
            once += layer.blocks.template.flops_per_token(length)
            once += 0 if layer.couplings is None else layer.couplings.template.flops_per_token(length)
        return self.count * (self.passes * once + 2 * self.width * self.vocab)

    def state_bytes(self, length: int) -> int:
        """Bytes of the state of one sequence after `length` tokens, in bf16, of all models."""
        once = 0
        for layer in self._layers():
            once += layer.blocks.template.state_bytes(length)
            once += 0 if layer.couplings is None else layer.couplings.template.state_bytes(length)
        return self.count * self.passes * once

    def _layers(self) -> list[Any]:
        return list(self.layers)
