"""Names of members' own parameters, for checkpoints: how eight models are laid out while they run is nobody's business.

The parameter `layers.0/mixer/qkv/weight` of all members, stacked, is saved as `modules.a.1.layers.0.mixer.qkv.weight`
and so on, one for each member. So a module that was trained alone is found by an ensemble, and by an ensemble of other
modules, under the names it was saved with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from pretrain.engine import Engine, EngineState, Fragment, FragmentReader, StepResult, Votes, no_votes
from pretrain.groups import without_groups
from pretrain.members import members_of
from pretrain.model import LossParts, Model

Stacked = dict[str, list[str]]
"""Names of members' parameters, by the name of the stacked one."""


def stacked_names(model: nn.Module) -> Stacked:
    """Every stacked parameter of a model, and the names its members' parts are saved under."""
    plain = without_groups(model)
    return {
        f"{path}.{name}": [f"modules.{member}.{plain(path)}.{name.replace('/', '.')}" for member in members.names]
        for path, members in members_of(model)
        for name, _ in members.named_parameters(recurse=False)
    }


class MemberEngine:
    """An engine whose state is told and loaded by members' own names; else the one it is given."""

    def __init__(self, engine: Engine) -> None:
        self.model: Model = engine.model
        self._engine, self._names = engine, stacked_names(engine.model)

    def step(self, batches: Sequence[Batch], step: int, lr_scale: float, votes: Votes = no_votes) -> StepResult:
        return self._engine.step(batches, step, lr_scale, votes)

    def evaluate(self, batch: Batch) -> LossParts:
        return self._engine.evaluate(batch)

    def state(self) -> EngineState:
        state = self._engine.state()
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in state.shapes.items():
            shapes |= dict.fromkeys(self._names[name], shape[1:]) if name in self._names else {name: shape}
        parts = [
            part
            for fragment in state.fragments
            for part in (self._split(fragment, state.shapes) if fragment.name in self._names else [fragment])
        ]
        return replace(state, fragments=parts, shapes=shapes)

    def load(self, reader: FragmentReader) -> None:
        shapes = self._engine.state().shapes
        self._engine.load(StackedReader(reader, self._names, {n: numel(shapes[n][1:]) for n in self._names}))

    def _split(self, fragment: Fragment, shapes: dict[str, tuple[int, ...]]) -> Iterator[Fragment]:
        size = numel(shapes[fragment.name][1:])
        for own, start, stop, at in pieces(self._names[fragment.name], size, fragment.offset, len(fragment.tensor)):
            yield Fragment(own, fragment.kind, start, fragment.tensor[at : at + stop - start])


class StackedReader:
    """Reads stacked parameters out of members' own. sizes: elements of one member's part."""

    def __init__(self, reader: FragmentReader, names: Stacked, sizes: dict[str, int]) -> None:
        self._reader, self._names, self._sizes = reader, names, sizes
        self.updates = reader.updates

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """As a `FragmentReader`, of names as the model has them."""
        if name not in self._names:
            return self._reader.read(name, kind, start, stop)
        parts = pieces(self._names[name], self._sizes[name], start, stop - start)
        return torch.cat([self._reader.read(own, kind, first, last) for own, first, last, _ in parts])


def by_model_names(reader: FragmentReader, model: nn.Module) -> FragmentReader:
    """A checkpoint read by the names that a model has; its parameters must be whole, not sharded."""
    sizes = {name: numel(tuple(p.shape[1:])) for name, p in model.named_parameters()}
    return StackedReader(reader, stacked_names(model), sizes)


def pieces(names: Sequence[str], size: int, offset: int, count: int) -> Iterator[tuple[str, int, int, int]]:
    """The members' parts of `count` elements of a stacked parameter from `offset` on.

    Yields the member's name, first and last element within its part, and where they lie among the `count`.
    """
    for number, own in enumerate(names):
        first, last = max(offset, number * size), min(offset + count, (number + 1) * size)
        if first < last:
            yield own, first - number * size, last - number * size, first - offset


def numel(shape: tuple[int, ...]) -> int:
    """Elements of a tensor of this shape."""
    return int(torch.Size(shape).numel())
