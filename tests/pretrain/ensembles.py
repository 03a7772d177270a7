"""Small ensembles and batches for them, which several files of tests share."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch

from configs.load import Layers
from configs.load import build as checked
from data_pipeline.batch import IGNORE, Batch
from data_pipeline.clusters import Clusters, Facts, save, unit
from pretrain.config import ModelConfig
from pretrain.layout import Layout
from pretrain.member_names import stacked_names
from pretrain.models.build import build
from tests.contract.cases import shaken, tokens

ROWS, LENGTH, VOCAB, WIDTH = 3, 48, 61, 16
MODULES = ["one", "two", "three", "four"]
FUSIONS = ["mhc", "posterior", "uniform", "clusters"]
SHAPES = {"one": {"width": 24}, "three": {"width": 24}, "four": {"width": 8, "depth": 3}}
"""Of modules in three groups, of which the first is not in a row."""
IDS, BUCKETS, EMBEDDED = 3, 64, 6


@functools.cache
def clusters_file(names=tuple(MODULES), tokenizer="a" * 64, vocab=VOCAB):
    """A file of random clusters, kept while the tests run."""
    draw = np.random.default_rng(5)
    table = draw.standard_normal((BUCKETS, EMBEDDED)).astype(np.float32)
    centres = unit(draw.standard_normal((len(names), EMBEDDED))).astype(np.float32)
    folder = tempfile.TemporaryDirectory()
    KEPT.append(folder)
    path = Path(folder.name) / "clusters.safetensors"
    save(path, Clusters(Facts(tokenizer, vocab, IDS, BUCKETS, EMBEDDED, names), table, centres))
    return str(path)


KEPT = []


def of_clusters(file=None, **keys):
    """The section of an ensemble that has such clusters."""
    return {"file": file or clusters_file(), "ids": IDS, "buckets": BUCKETS, "width": EMBEDDED, **keys}


def config_of(modules=MODULES, **ensemble):
    mixers = [{"name": "correlation", "options": {"heads": 2, "lags": 2}}]
    own = {"couple_heads": 2, "couple_lags": 2, "width": 16, "heads": 2, "lags": 2, "top": min(2, len(modules))}
    if ensemble.get("fusion") == "clusters":
        own["clusters"] = of_clusters(temperature=1.0)  # so that each of several modules counts
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


def assert_documents_stand_alone(model, ids, layout, together):
    """Each document of packed rows, given by itself, has the logits it has in its row (`together`)."""
    for row in range(len(ids)):
        for number in layout.doc_BT[row].unique():
            place = torch.nonzero(layout.doc_BT[row] == number).flatten()
            alone = model.logits(ids[row : row + 1, place], Layout.single(1, len(place)))
            torch.testing.assert_close(together[row : row + 1, place], alone, rtol=0, atol=1e-12)
