"""A model out of its configuration."""

from __future__ import annotations

import torch

from pretrain.config import ModelConfig
from pretrain.ensemble.mixture import mixture_model
from pretrain.model import Model
from pretrain.models.ensemble import LeviathanModelEnsemble
from pretrain.models.language_model import LanguageModel


def build(config: ModelConfig, vocab: int) -> Model:
    """The model on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return make_model(config, vocab)


def make_model(config: ModelConfig, vocab: int) -> Model:
    """The model on torch's default device, its parameters not yet filled."""
    if config.ensemble.fusion == "btx":
        return LanguageModel(mixture_model(config), vocab)
    return LeviathanModelEnsemble(config, vocab) if config.ensemble.modules else LanguageModel(config, vocab)
