"""The one interface of what stands between a model's embedding and its last norm, and how stacks are found by name.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.channel import Aux, Teller
from pretrain.config import ModelConfig
from pretrain.layout import Layout
from pretrain.mixer import State, Streaming
from pretrain.registry import Registry


class StackOutput(NamedTuple):
    """x_BTD: before the last norm. state: where the stream stands, None without one. aux: of the parts that tell
    something, in the order of `Stack.tellers()`."""

    x_BTD: Tensor
    state: State
    aux: tuple[Aux, ...]


class Stack(Streaming):
    """(B, T, D) to (B, T, D), residuals and norms inside, causal and document by document as every mixer is."""

    recompute: bool = False
    """Whether segments are run again in the backward pass instead of keeping their activations."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, layout: Layout, state: State = None) -> StackOutput:
        """Without a state: the training form, whose returned state is None. With one: go on from where it ended."""

    @abstractmethod
    def segments(self) -> Sequence[nn.Module]:
        """What `recompute` runs again, one after the other."""

    def recompute_segments(self) -> None:
        """From now on run segments again in the backward pass."""
        self.recompute = True

    def training_outputs(self, x_BTD: Tensor, layout: Layout) -> tuple[list[Tensor], tuple[Aux, ...]]:
        """What the loss is averaged over, each (B, T, D): the output, unless a stack trains others with it."""
        out = self(x_BTD, layout)
        return [out.x_BTD], out.aux

    def tellers(self) -> list[tuple[str, Teller]]:
        """Parts with measures, by their names in this stack, in the order of a forward pass."""
        return [(n, m) for n, m in self.named_modules() if isinstance(m, Teller) and m.measure_names()]

    def run(self, segment: nn.Module, *inputs: Any) -> Any:
        """A segment's output; with `recompute`, in training, only its inputs are kept."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(segment, *inputs, use_reentrant=False)
        return segment(*inputs)


REGISTRY: Registry[Stack] = Registry("stack", Path(__file__).with_name("stacks"), "pretrain.stacks")
register = REGISTRY.register


def make(config: ModelConfig) -> Stack:
    """The stack that a model's configuration names, wrapped where it says so."""
    # the wrap is a stack itself: it stands on this file
    from pretrain.wrap import Wrap

    inner = REGISTRY.make(config.stack.name, config.stack.options, config, config.stack.file)
    return inner if config.wrap.passes == 1 else Wrap(inner, config.width, config.wrap)
