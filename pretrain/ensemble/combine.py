"""One ensemble out of modules that were trained alone: the state that its joint training begins with.

Every parameter that a module's checkpoint holds is read from there under the same name; all others (the fusion) have
their declared first values. The joint training is a new one: no moments, no updates, the first row of the data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.errors import ConfigError, DataError
from pretrain.checkpoint_files import CheckpointFiles, newest_readable, open_files
from pretrain.engine import PARAM
from pretrain.ensemble.pairs import FIRST, SECOND
from pretrain.init import first_values
from pretrain.member_names import stacked_names
from pretrain.run_folder import Record, RunFolder

Shapes = Mapping[str, tuple[int, ...]]


class Joined:
    """Reads an ensemble's state out of its modules' checkpoints. model: the ensemble, without memory."""

    updates = 0

    def __init__(self, files: Mapping[str, CheckpointFiles], model: nn.Module, seed: int) -> None:
        self._owners = {name: of for module, of in files.items() for name in _of_module(module, of.shapes)}
        members = stacked_names(model)
        saved_as = {name: members.get(name, [name]) for name in model.state_dict()}
        fresh = [name for name, parts in saved_as.items() if parts[0] not in self._owners]
        self._first: dict[str, Tensor] = {}
        for name, value in first_values(model, seed, fresh).items():
            parts = value if name in members else [value]
            self._first |= {part: own.flatten() for part, own in zip(saved_as[name], parts)}

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """As a `FragmentReader`, of members' own names."""
        if kind != PARAM:
            return torch.zeros(stop - start)
        if name in self._owners:
            return self._owners[name].read(name, kind, start, stop)
        return self._first[name][start:stop]


def join(modules: Mapping[str, Record], model: nn.Module, tokenizer_sha256: str, seed: int) -> Joined:
    """The state that joint training begins with.

    modules: {"run", "step"} of each module. model: the ensemble, without memory. Raises DataError for a checkpoint that
    is missing, damaged or of another tokenizer, ConfigError for a module of another shape.
    """
    shapes = own_shapes(model)
    files = {}
    for name, origin in modules.items():
        found = newest_readable(RunFolder(Path(origin["run"])), origin["step"])
        where = f"the module {name} ({found.path})"
        theirs = found.facts["data"]["tokenizer"]
        if theirs != tokenizer_sha256:
            raise DataError(
                f"{where} was trained with another tokenizer: {theirs[:12]}…, expected {tokenizer_sha256[:12]}… as the"
                " shards here have; join modules of one tokenizer"
            )
        files[name] = open_files(found)
        _check_shapes(where, name, _of_module(name, files[name].shapes), _of_module(name, shapes))
    return Joined(files, model, seed)


def own_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of every parameter by the names that checkpoints have."""
    members = stacked_names(model)
    out: dict[str, tuple[int, ...]] = {}
    for name, value in model.state_dict().items():
        shape = tuple(value.shape)
        out |= dict.fromkeys(members[name], shape[1:]) if name in members else {name: shape}
    return out


def _of_module(module: str, shapes: Shapes) -> Shapes:
    """What belongs to the two models of a module."""
    models = (f"modules.{module}.{FIRST}.", f"modules.{module}.{SECOND}.")
    return {name: shape for name, shape in shapes.items() if name.startswith(models)}


def _check_shapes(where: str, module: str, theirs: Shapes, mine: Shapes) -> None:
    """Say in what a module differs from what the ensemble is made for."""
    if not theirs:
        raise ConfigError(f"{where} holds no module of that name; name a run that trained {module}")
    found, expected = _sizes(theirs), _sizes(mine)
    sizes = [(name, found[name], expected[name]) for name in expected]
    of_each = [(name, theirs.get(name, "absent"), mine.get(name, "absent")) for name in {**mine, **theirs}]
    for name, there, here in [*sizes, *of_each]:
        if there != here:
            raise ConfigError(f"{where} has {name} {there}, expected {here}; train it as a part of this ensemble")


def _sizes(shapes: Shapes) -> dict[str, int]:
    """What a model is called by, out of its parameters' shapes."""
    vocabulary, width = next(shape for name, shape in shapes.items() if name.endswith(".embed.weight"))
    layers = {found[1] for name in shapes if (found := re.search(r"\.layers\.(\d+)\.", name))}
    return {"vocabulary": vocabulary, "width": width, "depth": len(layers)}
