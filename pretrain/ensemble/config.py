"""What an ensemble is: modules of two models, how the two are coupled, how modules are combined, what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import model_validator

from configs.errors import UsageError
from configs.schema import Config, key, section

FIRST, SECOND = "a", "b"
"""A module's two models."""

Fusion = Literal["none", "mhc", "posterior", "uniform", "clusters", "btx"]


class ClustersConfig(Config):
    """Of `fusion: clusters`: what `leviathan data cluster` writes into its clusters.yaml."""

    file: str | None = key(
        None, "record", "clusters.safetensors of `leviathan data cluster`; read once, when a run begins"
    )
    ids: int = key(3, "match", "token ids in an n-gram, as in that file", ge=1, le=8)
    buckets: int = key(16384, "match", "buckets of n-grams, as in that file", gt=0)
    width: int = key(32, "match", "width of an embedding, as in that file", gt=0)
    temperature: float = key(0.1, "match", "squared distance that costs a module a factor e of its relevance", gt=0)


class ShapeConfig(Config):
    """The shape of a module's two models, where it is not the model's own."""

    width: int | None = key(None, "match", "width of its models; empty: model.width", gt=0)
    depth: int | None = key(None, "match", "blocks of its models; empty: model.depth", gt=0)


class EnsembleConfig(Config):
    """The LeviathanModelEnsemble; off while `modules` is empty."""

    modules: tuple[str, ...] = key((), "match", "names of the modules, two models each; empty: a single model")
    shapes: dict[str, ShapeConfig] = key({}, "match", "module: its own width and depth; empty: all have the model's")
    couple_every: int = key(1, "match", "blocks between couplings of a module's two models; 0: never", ge=0)
    couple_heads: int = key(4, "match", "heads of a coupling", gt=0)
    couple_lags: int = key(4, "match", "lags of a coupling's correlation", gt=0)
    alone_loss: float = key(0.3, "record", "weight of each model's own loss while a module is trained alone", ge=0)
    fusion: Fusion = key(
        "none", "match",
        "how modules are combined; `none` is for one module alone, `btx` makes all models one mixture of experts",
    )  # fmt: skip
    width: int = key(64, "match", "of `mhc`: width of the fusion", gt=0)
    heads: int = key(4, "match", "of `mhc`: heads of the fusion", gt=0)
    lags: int = key(4, "match", "of `mhc`: lags of the fusion's correlation", gt=0)
    top: int = key(2, "match", "of `mhc`: modules kept for each token; of `btx`: experts that read it", gt=0)
    clusters: ClustersConfig = section(ClustersConfig)
    memory: float = key(1.0, "match", "of `posterior`: share of the evidence left a token later", gt=0, le=1)
    prior: dict[str, float] = key(
        {}, "record",
        "of `posterior`: module: what it is worth before anything is read, as shares of any sum; empty: all alike",
    )  # fmt: skip
    freeze: Literal["modules", "embeddings", "none"] = key("none", "match", "what is not trained")
    domains: dict[str, str] = key({}, "match", "source of data: module it is for; empty: modules named as sources")
    own_loss: float = key(0.1, "record", "weight of a module's own loss on its domain, jointly trained", ge=0)
    domain_loss: float = key(0.1, "record", "weight of -log relevance of the right module, at first", ge=0)
    domain_steps: int = key(100, "record", "steps over which `domain_loss` falls to 0", ge=0)
    domain_from: int = key(16, "record", "tokens of a document that are read before its domain must be known", ge=0)
    balance_loss: float = key(0.01, "record", "weight of uneven mean relevance, where no domain is known", ge=0)

    @model_validator(mode="after")
    def _fits(self) -> EnsembleConfig:
        twice = sorted({name for name in self.modules if self.modules.count(name) > 1})
        if twice:
            raise ValueError(f"names the module {twice[0]!r} twice; give each a name of its own")
        bad = [name for name in self.modules if not name or not name.replace("-", "_").isidentifier()]
        if bad:
            raise ValueError(f"calls a module {bad[0]!r}; use letters, digits, - and _, not a digit first")
        if len(self.modules) > 1 and self.fusion == "none":
            raise ValueError(
                f"has {len(self.modules)} modules but fusion none; choose mhc, posterior, uniform, clusters or btx"
            )
        if self.fusion == "clusters" and self.clusters.file is None:
            raise ValueError(
                "has fusion clusters and no clusters.file; give the clusters.yaml of `leviathan data cluster` too"
            )
        if self.fusion == "mhc" and self.top > len(self.modules):
            raise ValueError(f"keeps the top {self.top} of {len(self.modules)} modules; set top to at most that")
        if self.fusion == "btx" and self.top > 2 * len(self.modules):
            raise ValueError(
                f"has a token read by {self.top} of {2 * len(self.modules)} experts; set top to at most that"
            )
        if self.fusion == "btx" and self.top == 1:
            raise ValueError(
                "has a token read by one expert, weighed by a router that knows nothing yet; set top to 2 or more for"
                " fusion btx"
            )
        if self.fusion == "btx" and self.freeze != "none":
            raise ValueError(f"freezes {self.freeze}, which fusion btx makes parts of one model; set freeze to none")
        if self.fusion == "mhc" and self.width % self.heads:
            raise ValueError(f"has a fusion of width {self.width} for {self.heads} heads; make it a multiple")
        if self.freeze == "modules" and self.fusion != "mhc":
            raise ValueError(f"freezes its modules, and fusion {self.fusion} has nothing to train; set freeze none")
        if self.modules:
            self._check_names()
        return self

    def _check_names(self) -> None:
        named = {
            "sends a domain to": self.domains.values(),
            "has a prior for": self.prior,
            "gives a shape to": self.shapes,
        }
        for what, names in named.items():
            lost = sorted(set(names) - set(self.modules))
            if lost:
                raise ValueError(f"{what} {lost[0]!r}, which is no module; name one of {', '.join(self.modules)}")
        left_out = [name for name in self.modules if name not in self.prior]
        if self.prior and left_out:
            raise ValueError(f"has a prior for some modules, but none for {left_out[0]!r}; give every module one")
        bad = [name for name, share in self.prior.items() if share <= 0]
        if bad:
            raise ValueError(
                f"has a prior of {self.prior[bad[0]]:g} for {bad[0]!r}; make it more than 0, or leave the module out"
            )


class ModulesConfig(Config):
    """How each module of an ensemble is trained alone, by `leviathan ensemble`, before all are joined."""

    seed_steps: int = key(
        0, "record", "even steps of a single model, on all text, that every module's models begin from; 0: none",
        ge=0, multiple_of=2,
    )  # fmt: skip
    steps: int = key(250, "record", "steps of each module alone", gt=0)
    lr: float | None = key(None, "record", "highest learning rate of a module alone; empty: optim.lr", gt=0)
    shared_fraction: float = key(
        0.05, "record", "share of a module's rows that are of other modules' sources, so that it knows of them",
        gt=0, lt=1,
    )  # fmt: skip
    side_by_side: int = key(1, "free", "modules trained here at the same time, where there is room for them", gt=0)


def remaining(modules: Sequence[str], left_out: Sequence[str]) -> tuple[str, ...]:
    """The modules that are left. Raises UsageError where one is none of them, or none is left."""
    lost = sorted(set(left_out) - set(modules))
    if lost:
        raise UsageError(f"there is no module {lost[0]!r}; this ensemble has {', '.join(modules)}")
    kept = tuple(name for name in modules if name not in left_out)
    if not kept:
        raise UsageError("all modules are left out; keep at least one")
    return kept
