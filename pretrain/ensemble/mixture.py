"""All models of an ensemble as one: a language model whose channel mixers are mixtures of the models' (`fusion: btx`).

    FF_1 .. FF_2M of the models become the experts of every block; whatever else they have is averaged; couplings are
    left out; the router is new

An average of models means something only while they lie near each other, so all must have begun from one seed.
Source: Branch-Train-MiX (arXiv 2403.07816).
"""

from __future__ import annotations

from configs.errors import ConfigError
from pretrain import channel
from pretrain.block import site_of
from pretrain.config import ModelConfig, PartConfig
from pretrain.ensemble.config import EnsembleConfig

EXPERTS = "moe"


def mixture_model(config: ModelConfig) -> ModelConfig:
    """The single model that an ensemble becomes. Raises ConfigError where its channel mixers cannot be experts."""
    expert, chan = as_expert(config), config.channel
    if config.wrap.passes > 1:
        raise ConfigError("fusion btx makes plain blocks of all models; set model.wrap.passes to 1")
    mult = expert.options["mult"] * config.ensemble.top
    options = {
        **expert.options,
        "mult": mult,
        "experts": 2 * len(config.ensemble.modules),
        "top_k": config.ensemble.top,
    }
    chan = PartConfig(name=EXPERTS, options=options)
    return config.model_copy(update={"channel": chan, "ensemble": EnsembleConfig()})


def as_expert(config: ModelConfig) -> channel.AsExpert:
    """How the ensemble's channel mixers are held by a mixture."""
    chan = config.channel
    expert = channel.make(chan.name, chan.options, site_of(config, 0), chan.file).as_expert()
    if expert is None:
        raise ConfigError(
            f"the channel mixer {chan.name} cannot become experts, as fusion btx wants; use mlp or swiglu"
        )
    return expert
