"""Experts on two real ranks against the same experts on every rank: losses, norms, parameters, checkpoints."""

from __future__ import annotations

import pytest
import torch

from configs.errors import ConfigError
from configs.load import Layers
from configs.load import build as checked
from pretrain.checkpoint_files import newest_readable, open_files
from pretrain.config import ModelConfig, RunConfig
from pretrain.init import initialise
from pretrain.models.build import build
from pretrain.ops.expert_parallel import shard_experts, shares_of
from pretrain.parallel import Ranks
from pretrain.run_folder import RunFolder
from tests.ranks import run_ranks

WORKER = "tests.pretrain.expert_worker"
STAGES = ["0", "1", "2"]
SHARED = {f"ep2-zero{stage}": {"stage": stage, "ep": 2} for stage in STAGES}
ALL = SHARED | {f"ep1-zero{stage}": {"stage": stage} for stage in STAGES}
OTHERS = {
    "bias": {"stage": "1", "ep": 2, "balance": "bias", "bias_step": 0.05, "corr_router": 3},
    "again": {"stage": "2", "ep": 2, "recompute": True},
    "free": {"stage": "1", "ep": 2, "clip": 0.0},
    "bf16-1": {"stage": "1", "ep": 2, "precision": "bf16"},
    "bf16-2": {"stage": "2", "ep": 2, "precision": "bf16"},
}
ALONE = {name: {key: value for key, value in case.items() if key != "ep"} for name, case in OTHERS.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every run on two ranks, and plain torch on one; what they gave and where they are."""
    out = tmp_path_factory.mktemp("experts")
    results = run_ranks(WORKER, "runs", 2, out / "two", timeout=200, cases=ALL)
    return results | run_ranks(WORKER, "runs", 1, out / "one", cases={"torch": {"stage": "torch"}}), out


def check_agree(one, other, limit=1e-6):
    """Losses, norms and measures of the same steps."""
    for (loss, norm, told), (expected, its_norm, its_told) in zip(one["rows"], other["rows"], strict=True):
        assert loss == pytest.approx(expected, rel=limit)
        assert norm == pytest.approx(its_norm, rel=limit)
        assert told == pytest.approx(its_told, rel=limit)


def values(folder):
    files = open_files(newest_readable(RunFolder(folder)))
    return {(name, kind): files.tensor(name, kind) for name in files.shapes for kind in files.kinds(name)}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", STAGES)
def test_shared_experts_give_losses_norms_and_parameters_of_experts_on_every_rank(trained, stage):
    results, out = trained
    assert all(norm > 0.3 for _, norm, _ in results["torch"]["rows"]), "nothing was clipped"
    for other in (f"ep1-zero{stage}", "torch"):
        check_agree(results[f"ep2-zero{stage}"], results[other])
    mine, its = (values(out / "two" / f"ep{ep}-zero{stage}") for ep in (2, 1))
    assert mine.keys() == its.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, its[key], rtol=1e-6, atol=1e-6, msg=str(key))


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_checkpoints_go_from_shared_experts_to_one_rank_and_back(trained, tmp_path):
    results, out = trained
    one = run_ranks(
        WORKER, "taken_over", 1, tmp_path / "one", source=str(out / "two"), cases={"torch": {"stage": "torch"}}
    )
    two = run_ranks(WORKER, "taken_over", 2, tmp_path / "two", source=str(out / "one"), cases=SHARED)
    again = run_ranks(WORKER, "taken_over", 2, tmp_path / "again", timeout=200, source=str(out / "two"), cases=SHARED)
    for pair, taken in (one | two | again).items():
        writer, reader = pair.split(">")
        assert taken["state"] == results[writer]["state"], pair
        assert taken["logits"] == pytest.approx(results[writer]["logits"], abs=1e-5), pair
        for (loss, norm, _), (expected, its_norm, _) in zip(taken["later"], results[writer]["later"]):
            assert (loss, norm) == pytest.approx((expected, its_norm), rel=1e-5), pair
        if writer == reader:
            assert taken["later"] == results[writer]["later"], pair


@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_biases_recomputation_bf16_and_no_clipping_change_nothing(tmp_path):
    shared = run_ranks(WORKER, "runs", 2, tmp_path / "2", timeout=200, cases=OTHERS)
    plain = run_ranks(WORKER, "runs", 2, tmp_path / "1", timeout=200, cases=ALONE)
    for name, case in OTHERS.items():
        check_agree(shared[name], plain[name], limit=3e-2 if "precision" in case else 1e-6)
    saved = values(tmp_path / "2" / "bias")
    for block in (0, 1):
        loads = torch.tensor([told[6 * block : 6 * block + 4] for _, _, told in shared["bias"]["rows"]])
        expected = torch.sign(loads.mean(1, keepdim=True) - loads).sum(0)
        assert saved[f"blocks.{block}.channel.router.nudges", "param"].tolist() == expected.tolist()


@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_four_ranks_in_two_pairs_and_all_four_together_are_one_run(tmp_path):
    cases = {f"ep{ep}-zero{stage}": {"stage": stage, "ep": ep} for stage in STAGES for ep in (2, 4)}
    shared = run_ranks(WORKER, "runs", 4, tmp_path / "4", timeout=300, cases=cases)
    plain = run_ranks(WORKER, "runs", 1, tmp_path / "1", cases={"torch": {"stage": "torch"}})
    for name in cases:
        check_agree(shared[name], plain["torch"])
    back = run_ranks(
        WORKER, "taken_over", 1, tmp_path / "b", source=str(tmp_path / "4"), cases={"torch": {"stage": "torch"}}
    )
    for name in cases:
        assert back[f"{name}>torch"]["state"] == shared[name]["state"]


def moe_model(**options):
    return build(
        checked(ModelConfig, Layers({"width": 16, "length": 8, "channel": {"name": "moe", "options": options}})), 67
    )


def test_a_rank_begins_with_its_slice_of_what_the_whole_begins_with():
    whole = moe_model(shared=1).to_empty(device="cpu")
    initialise(whole, 5)
    parts = []
    for rank in range(4):
        model = moe_model(shared=1)
        shard_experts(model, 4, Ranks(rank, 4, rank, "here"))
        initialise(model.to_empty(device="cpu"), 5)
        parts.append(model)
    shares = [shares_of(model) for model in parts]
    for name, value in whole.state_dict().items():
        own = [model.state_dict()[name] for model in parts]
        if ".experts." in name:
            assert torch.equal(torch.cat(own), value)
            assert [share[name].first for share in shares] == [rank * own[0].numel() for rank in range(4)]
            assert all(share[name].shape == value.shape for share in shares)
        else:
            assert all(torch.equal(each, value) for each in own)
            assert name not in shares[0]


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match="does not divide the 6 experts"):
        shard_experts(moe_model(experts=6), 4, Ranks(0, 4, 0, "here"))
    with pytest.raises(ConfigError, match="does not divide 3 ranks"):
        shard_experts(moe_model(), 2, Ranks(0, 3, 0, "here"))
    with pytest.raises(ConfigError, match="no experts to deal"):
        shard_experts(build(ModelConfig(width=16), 67), 2, Ranks(0, 2, 0, "here"))
    mistakes = {
        "needs engine.name deepspeed": {"name": "torch"},
        "set engine.expert_parallel=1": {"zero": 3},
        "in bf16 needs engine.zero 1 or 2": {"zero": 0, "precision": "bf16"},
    }
    for said, keys in mistakes.items():
        with pytest.raises(ConfigError, match=said):
            checked(RunConfig, Layers({"engine": {"expert_parallel": 2, **keys}}))
