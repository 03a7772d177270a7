"""Every kind of model under every ZeRO stage on two real ranks: losses and gradients of the reference on one."""

from __future__ import annotations

import pytest

from tests.pretrain.ensembles import clusters_file, of_clusters
from tests.ranks import run_ranks

WORKER, STAGES = "tests.pretrain.engine_worker", ["0", "1", "2", "3"]
SMALL = {"width": 16, "depth": 2, "length": 24}
OTHERS = [
    *({"name": "correlation", "options": {"corr": form}}
      for form in ("iir", "prefix_mean", "lagbank", "fft", "fft_self", "seed_fft", "seed_ema")),
    {"name": "involution", "options": {"kernel": 5, "dilation": 2}},
]  # fmt: skip
"""Mixers that the models below are not made of: a layer each."""
SHAPES = {"two": {"width": 24, "depth": 1}}
MODELS: dict[str, dict[str, object]] = {
    "module of an ensemble": {**SMALL, "ensemble": {"modules": ["one"]}},
    "ensemble": {
        **SMALL,
        "ensemble": {"modules": ["one", "two"], "fusion": "mhc", "width": 16, "domains": {"0": "one"}},
    },
    "frozen ensemble of differing shapes": {
        **SMALL,
        "ensemble": {"modules": ["one", "two"], "fusion": "mhc", "width": 16, "freeze": "modules", "shapes": SHAPES},
    },
    # without what keeps relevance even: a mean over a micro-batch, as the losses of experts below
    "ensemble by what its tokens say, wrapped and of differing shapes": {
        **SMALL,
        "ensemble": {"modules": ["one", "two"], "fusion": "posterior", "balance_loss": 0.0, "shapes": SHAPES},
        "wrap": {"passes": 2, "loss": "mean_all", "checkpoint": True},
    },
    "ensemble by clusters": {
        **SMALL,
        "ensemble": {
            "modules": ["one", "two"],
            "fusion": "clusters",
            "balance_loss": 0.0,
            "clusters": of_clusters(clusters_file(("one", "two"), vocab=67)),
        },
    },
    "every other mixer": {**SMALL, "depth": len(OTHERS), "mixers": OTHERS},
    "elita": {
        **SMALL,
        "mixers": [{"name": "elita"}],
        "channel": {"name": "feedforward2"},
        "norm": "layernorm_plain",
    },
    "blocks": {**SMALL, "mixers": [{"name": "correlation"}, {"name": "attention"}]},
    # without auxiliary losses: they are means over a micro-batch, and two ranks cut smaller ones than one
    "moe": {**SMALL, "channel": {"name": "moe", "options": {"balance": "bias", "bias_step": 0.02, "z_loss": 0.0}}},
    "wrapped": {**SMALL, "wrap": {"passes": 3}},
    "wrapped, all passes trained and run again": {
        **SMALL,
        "channel": {"name": "moe", "options": {"balance": "bias", "bias_step": 0.02, "z_loss": 0.0}},
        "wrap": {"passes": 3, "loss": "mean_all", "checkpoint": True},
    },
    # at a fraction of the usual work for a token: that is done token by token, and took half of these tests' time
    "geodesic": {**SMALL, "stack": {"name": "geodesic", "options": {"steps": 2, "method": "semi_implicit"}}},
    "logits": {**SMALL, "tie": False, "bias": True, "norm": "layernorm", "logits": {"hidden": 12, "rank": 3}},
    "logits of a frozen backbone": {**SMALL, "logits": {"hidden": 12, "freeze_backbone": True}},
    "quartic": {
        **SMALL,
        "depth": 3,
        "stack": {"name": "quartic", "options": {"heads": 2, "streams": 2, "edge_mixers": ["row", "col", "prefix"]}},
    },
    "quartic routed": {
        **SMALL,
        "stack": {"name": "quartic", "options": {"heads": 2, "routed": 3, "edge_mixers": ["top", "diagonal"]}},
    },
    "multistream": {
        **SMALL,
        "stack": {"name": "multistream", "options": {"heads": 2, "talking": "nonlinear", "diversity": 0.01}},
    },
    "relational": {**SMALL, "stack": {"name": "relational", "options": {"heads": 2, "edge_width": 8}}},
}
BRIEF = ("ensemble", "moe", "wrapped", "multistream")
"""Those that are not left to the long tests: each is one of its kind to a sharding engine."""


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """Losses and norms of all models asked for: by the reference on one rank, and by every stage on two."""
    out = tmp_path_factory.mktemp("models")
    asked = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}
    configs = {name: MODELS[name] for name in MODELS if name in asked}
    alone = run_ranks(WORKER, "models", 1, out / "1", configs=configs, stages=["torch"])
    both = run_ranks(WORKER, "models", 2, out / "2", timeout=280, configs=configs, stages=STAGES)
    return alone | both


@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in BRIEF else pytest.mark.e2e) for name in MODELS]
)
def test_two_ranks_give_the_losses_and_gradients_of_one(results, name, stage):
    for (loss, norm), (expected, expected_norm) in zip(results[f"{name} {stage}"], results[f"{name} torch"]):
        assert loss == pytest.approx(expected, abs=2e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
