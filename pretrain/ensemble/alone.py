"""The runs that train an ensemble's parts before they are joined, derived from the configuration of the whole."""

from __future__ import annotations

import re
from collections.abc import Sequence

from configs.errors import ConfigError
from data_pipeline.config import SourceConfig
from pretrain.config import RUN_NAME, ModelConfig, RunConfig, shape_of
from pretrain.ensemble.config import EnsembleConfig, ModulesConfig, remaining

SEED = "seed"
_DIGITS = 4
"""Of a source's weight: they become whole numbers, which must not grow large."""


def module_run(config: RunConfig, module: str) -> RunConfig:
    """The run `NAME-MODULE` of a run that has a name: one module, mostly its own text, `modules.steps` steps.

    What only the joint run needs (the fusion, its losses) is left out, so that another fusion finds the same modules.
    Raises ConfigError where no source of text is for this module, or its name makes none for a run.
    """
    alone = _before_joining(config, module, module_model(config.model, module), config.modules.steps)
    data = config.data.model_copy(update={"sources": _sources(config, module)})
    return alone.model_copy(update={"data": data})


def module_model(model: ModelConfig, module: str) -> ModelConfig:
    """One module of an ensemble, as it is trained alone."""
    whole = model.ensemble
    alone = EnsembleConfig(
        modules=(module,), couple_every=whole.couple_every, couple_heads=whole.couple_heads,
        couple_lags=whole.couple_lags, alone_loss=whole.alone_loss,
    )  # fmt: skip
    width, depth = shape_of(model, module)
    return model.model_copy(update={"width": width, "depth": depth, "ensemble": alone})


def seed_run(config: RunConfig) -> RunConfig:
    """The run `NAME-seed` of a single model; every module's models begin from its checkpoints, the end and the half."""
    if SEED in config.model.ensemble.modules:
        raise ConfigError(f"a module is called {SEED}, as the run of the seed would be; give it another name")
    steps = config.modules.seed_steps
    alone = _before_joining(config, SEED, seed_model(config.model), steps)
    every = config.checkpoint.every if steps // 2 % config.checkpoint.every == 0 else steps // 2
    checkpoint = config.checkpoint.model_copy(update={"every": every, "keep_every": steps // 2})
    return alone.model_copy(update={"checkpoint": checkpoint})


def seed_model(model: ModelConfig) -> ModelConfig:
    """A single model of the shape that each of an ensemble's has."""
    return model.model_copy(update={"ensemble": EnsembleConfig()})


def _before_joining(config: RunConfig, part: str, model: ModelConfig, steps: int) -> RunConfig:
    """The run `NAME-PART` that trains a part of an ensemble. Raises ConfigError where that is no name for a run."""
    name = f"{config.run.name}-{part}"
    if not re.match(RUN_NAME, name):
        raise ConfigError(
            f"the run of {part} would be called {name!r}, which is too long or no plain name; give a shorter run.name,"
            " or the module another name"
        )
    parts = {
        "run": config.run.model_copy(update={"name": name}),
        "model": model,
        "optim": config.optim.model_copy(update={"lr": config.modules.lr or config.optim.lr}),
        "train": config.train.model_copy(update={"steps": steps, "tokens": None}),
        "modules": ModulesConfig(),
    }
    return config.model_copy(update=parts)


def _sources(config: RunConfig, module: str) -> dict[str, SourceConfig]:
    """The sources with the weights they have for a module: its own share what the others leave."""
    sources, domains = config.data.sources, config.model.ensemble.domains
    own = [name for name in sources if domains.get(name, name) == module]
    if not own:
        raise ConfigError(
            f"no source of text is for the module {module!r}; call one of {', '.join(sources) or 'them'} so, or say"
            " which with model.ensemble.domains"
        )
    others = [name for name in sources if name not in own]
    shared = config.modules.shared_fraction if others else 0.0
    weights: dict[str, float] = {}
    for names, share in ((own, 1 - shared), (others, shared)):
        total = sum(sources[name].weight for name in names)
        weights |= {name: share * sources[name].weight / total for name in names}
    least = 10**-_DIGITS
    return {
        name: source.model_copy(update={"weight": max(least, round(weights[name], _DIGITS))})
        for name, source in sources.items()
    }


def without_modules(config: RunConfig, left_out: Sequence[str]) -> RunConfig:
    """The ensemble of the other modules. Raises UsageError for one that is none, or where none is left."""
    ensemble = config.model.ensemble
    modules = remaining(ensemble.modules, left_out)
    changed = {
        "modules": modules,
        "top": min(ensemble.top, len(modules) * (2 if ensemble.fusion == "btx" else 1)),
        "domains": {source: module for source, module in ensemble.domains.items() if module in modules},
        "prior": {module: share for module, share in ensemble.prior.items() if module in modules},
        "shapes": {module: shape for module, shape in ensemble.shapes.items() if module in modules},
    }
    ensemble = ensemble.model_copy(update=changed)
    return config.model_copy(update={"model": config.model.model_copy(update={"ensemble": ensemble})})
