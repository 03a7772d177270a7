"""States that begin with what other runs trained: modules with a seed, ensembles and mixtures with their modules.

Every parameter is read from where it was trained, or is the mean of several, or has its declared first value where
nobody trained it. It is a new run: no moments, no updates, the first row of the data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.errors import ConfigError, DataError
from pretrain.checkpoint_files import CheckpointFiles, newest_readable, open_files
from pretrain.config import ModelConfig
from pretrain.engine import PARAM, FragmentReader
from pretrain.ensemble.alone import module_model, seed_model
from pretrain.ensemble.config import FIRST, SECOND
from pretrain.ensemble.mixture import as_expert
from pretrain.init import first_values
from pretrain.member_names import Stacked, StackedReader, numel, stacked_names
from pretrain.models.build import build
from pretrain.run_folder import Record, RunFolder

Shapes = Mapping[str, tuple[int, ...]]
Places = dict[str, list[tuple[CheckpointFiles, str]]]
"""Where a parameter is read from: files, and its name there."""


class Gathered:
    """Reads a new run's state out of others' checkpoints, by the names that its own checkpoints will have.

    model: without memory. stacked: its stacked parameters, and what their parts are called.
    """

    updates = 0

    def __init__(self, places: Places, model: nn.Module, stacked: Stacked, seed: int) -> None:
        self._places = places
        named = {name: stacked.get(name, [name]) for name in model.state_dict()}
        fresh = [name for name, parts in named.items() if parts[0] not in places]
        self._first: dict[str, Tensor] = {}
        for name, value in first_values(model, seed, fresh).items():
            parts = value if name in stacked else [value]
            self._first |= {part: own.flatten() for part, own in zip(named[name], parts)}

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """As a `FragmentReader`."""
        if kind != PARAM:
            return torch.zeros(stop - start)
        if name in self._first:
            return self._first[name][start:stop]
        read = [files.read(there, PARAM, start, stop) for files, there in self._places[name]]
        return read[0] if len(read) == 1 else torch.stack(read).mean(0)


def join(modules: Mapping[str, Record], config: ModelConfig, vocab: int, tokenizer: str, seed: int) -> FragmentReader:
    """The state that an ensemble's joint training begins with.

    modules: {"run", "step"} of each. tokenizer: its sha256. Raises DataError for a checkpoint that is missing, damaged
    or of another tokenizer, ConfigError for a module of another shape, or of another seed where models are averaged.
    """
    files = {}
    for name, origin in modules.items():
        where, files[name] = _opened(f"the module {name}", origin, tokenizer)
        expected = own_shapes(build(module_model(config, name), vocab))
        besides = f", or say in model.ensemble.shapes.{name} what it is" if config.ensemble.fusion != "btx" else ""
        _check_shapes(where, _of_module(name, files[name].shapes), expected, besides)
    model = build(config, vocab)
    if config.ensemble.fusion == "btx":
        _check_one_seed(modules)
        return _mixed(files, config, model, seed)
    places: Places = {n: [(of, n)] for name, of in files.items() for n in _of_module(name, of.shapes)}
    return Gathered(places, model, stacked_names(model), seed)


def begin_from_seed(
    models: Mapping[str, Record], config: ModelConfig, vocab: int, tokenizer: str, seed: int
) -> FragmentReader:
    """The state that a module begins with whose models have a seed. models: {"run", "step"} of each, as MODULE.a."""
    places: Places = {}
    for member, origin in models.items():
        where, files = _opened(f"the seed of {member}", origin, tokenizer)
        _check_shapes(where, files.shapes, own_shapes(build(seed_model(config), vocab)))
        places |= {f"modules.{member}.{_in_pair(name)}": [(files, name)] for name in files.shapes}
    model = build(config, vocab)
    lost = sorted(places.keys() - own_shapes(model).keys())
    if lost:
        raise AssertionError(f"{lost[0]} of a seed has no place in its module")
    return Gathered(places, model, stacked_names(model), seed)


def own_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of every parameter by the names that checkpoints have."""
    members, out = stacked_names(model), dict[str, tuple[int, ...]]()
    for name, value in model.state_dict().items():
        shape = tuple(value.shape)
        out |= dict.fromkeys(members[name], shape[1:]) if name in members else {name: shape}
    return out


def _mixed(files: Mapping[str, CheckpointFiles], config: ModelConfig, model: nn.Module, seed: int) -> FragmentReader:
    """A mixture of experts out of modules: feed-forwards side by side, a fresh router, the mean of all else."""
    models = [(of, f"modules.{name}.{which}.") for name, of in files.items() for which in (FIRST, SECOND)]
    own, places, stacked, sizes = as_expert(config).names, Places(), Stacked(), {}
    for name, value in model.state_dict().items():
        expert = re.fullmatch(r"(blocks\.\d+\.channel)\.experts\.(\w+)", name)
        if expert is not None:
            there = _in_pair(f"{expert[1]}.{own[expert[2]]}")
            stacked[name], sizes[name] = [prefix + name for _, prefix in models], numel(tuple(value.shape[1:]))
            places |= {prefix + name: [(of, prefix + there)] for of, prefix in models}
        elif ".channel." not in name:
            places[name] = [(of, prefix + _in_pair(name)) for of, prefix in models]
    return StackedReader(Gathered(places, model, stacked, seed), stacked, sizes)


def _in_pair(name: str) -> str:
    """What a single model's parameter is called in a pair."""
    # a wrapped model has its stack and its shifts in `blocks`; a pair has both itself
    bare = re.sub(r"^blocks\.shifts\.", "shifts.", name)
    return "models." + re.sub(r"^blocks\.(?:inner\.)?(\d+)\.", r"layers.\1.blocks.", bare)


def _opened(what: str, origin: Record, tokenizer: str) -> tuple[str, CheckpointFiles]:
    """A verified checkpoint of the same tokenizer, and what to call it in a message."""
    found = newest_readable(RunFolder(Path(origin["run"])), origin["step"])
    where, theirs = f"{what} ({found.path})", found.facts["data"]["tokenizer"]
    if theirs != tokenizer:
        raise DataError(
            f"{where} was trained with another tokenizer: {theirs[:12]}…, expected {tokenizer[:12]}… as the shards here"
            " have; join what has one tokenizer"
        )
    return where, open_files(found)


def _of_module(module: str, shapes: Shapes) -> Shapes:
    """What belongs to the two models of a module."""
    models = (f"modules.{module}.{FIRST}.", f"modules.{module}.{SECOND}.")
    return {name: shape for name, shape in shapes.items() if name.startswith(models)}


def _check_shapes(where: str, theirs: Shapes, mine: Shapes, shape: str = "") -> None:
    """Say in what a part differs from what it is to be a part of. shape: what to do besides about a width or depth."""
    if not set(mine) & set(theirs):
        raise ConfigError(f"{where} holds nothing of that name; name a run that trained it")
    found, expected = _sizes(theirs), _sizes(mine)
    sizes = [(name, found[name], expected[name]) for name in expected]
    of_each = [(name, theirs.get(name, "absent"), mine.get(name, "absent")) for name in {**mine, **theirs}]
    for name, there, here in [*sizes, *of_each]:
        if there != here:
            besides = shape if name in ("width", "depth") else ""
            raise ConfigError(
                f"{where} has {name} {there}, expected {here}; train it as a part of this ensemble{besides}"
            )


def _sizes(shapes: Shapes) -> dict[str, int]:
    """What a model is called by, out of its parameters' shapes."""
    vocabulary, width = next(shape for name, shape in shapes.items() if name.endswith("embed.weight"))
    layers = {found[1] for name in shapes if (found := re.search(r"(?:layers|blocks)\.(\d+)\.", name))}
    return {"vocabulary": vocabulary, "width": width, "depth": len(layers)}


def _check_one_seed(modules: Mapping[str, Record]) -> None:
    seeds = {}
    for name, origin in modules.items():
        models = RunFolder(Path(origin["run"])).facts().get("from", {}).get("models", {})
        seeds[name] = next((model["run"] for model in models.values()), "nothing")
    if len(set(seeds.values())) > 1 or "nothing" in seeds.values():
        told = ", ".join(f"{name} began from {seed}" for name, seed in seeds.items())
        raise ConfigError(
            f"fusion btx averages models, which must have begun from one seed, but {told}; set modules.seed_steps and"
            " train the modules anew with `leviathan ensemble`"
        )
