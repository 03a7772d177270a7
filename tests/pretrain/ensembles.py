"""Small ensembles and batches for them, which several files of tests share."""

from __future__ import annotations

import torch

from configs.load import Layers
from configs.load import build as checked
from data_pipeline.batch import IGNORE, Batch
from pretrain.config import ModelConfig
from pretrain.layout import Layout
from pretrain.member_names import stacked_names
from pretrain.models.build import build
from tests.contract.cases import shaken, tokens

ROWS, LENGTH, VOCAB, WIDTH = 3, 48, 61, 16
MODULES = ["one", "two", "three", "four"]
FUSIONS = ["mhc", "posterior", "uniform"]
SHAPES = {"one": {"width": 24}, "three": {"width": 24}, "four": {"width": 8, "depth": 3}}
"""Of modules in three groups, of which the first is not in a row."""


def config_of(modules=MODULES, **ensemble):
    mixers = [{"name": "correlation", "options": {"heads": 2, "lags": 2}}]
    own = {"couple_heads": 2, "couple_lags": 2, "width": 16, "heads": 2, "lags": 2, "top": min(2, len(modules))}
    keys = {key: ensemble.pop(key) for key in list(ensemble) if key in ModelConfig.model_fields}
    return checked(
        ModelConfig,
        Layers({"width": WIDTH, "depth": 2, "length": LENGTH, "mixers": mixers, **keys,
                "ensemble": {"modules": list(modules), **own, **ensemble}}),
    )  # fmt: skip


def make(modules=MODULES, **ensemble):
    """An ensemble in float64 with random parameters, none of them zero."""
    model = shaken(build(config_of(modules, **ensemble), VOCAB).to_empty(device="cpu"))
    model.know_sources(modules)
    return model


def own_values(model):
    """Every member's own parameters, by the names that checkpoints have."""
    stacked = stacked_names(model)
    return {
        own: value
        for name, p in model.named_parameters()
        for own, value in zip(stacked.get(name, [name]), p if name in stacked else [p])
    }


def batch_of(layout: Layout, source=(0, 1, 2)) -> Batch:
    ids = tokens(rows=ROWS, length=LENGTH + 1)
    last = torch.diff(layout.doc_BT, append=layout.doc_BT[:, -1:]) != 0
    targets = ids[:, 1:].masked_fill(last, IGNORE)
    count = int((targets != IGNORE).sum())
    return Batch(ids[:, :-1], targets, layout.doc_BT, layout.pos_BT, torch.tensor(source), count, True)
