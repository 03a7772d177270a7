"""Both engines, all ZeRO stages, real gloo ranks."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks

WORKER = "tests.pretrain.engine_worker"
STAGES = ["0", "1", "2", "3"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Twenty steps of the torch engine."""
    out = tmp_path_factory.mktemp("torch")
    return run_ranks(WORKER, "agree", 1, out, stages=["torch"], precision="fp32", steps=20)["torch"]


@pytest.mark.parametrize("world", [1, 2])
def test_all_stages_agree_with_plain_torch_over_twenty_steps(world, reference, tmp_path):
    results = run_ranks(WORKER, "agree", world, tmp_path, stages=STAGES, precision="fp32", steps=20)
    for stage in STAGES:
        for (loss, norm, by_source, tokens), (loss0, norm0, by_source0, tokens0) in zip(results[stage], reference):
            assert loss == pytest.approx(loss0, rel=1e-5), stage
            assert norm == pytest.approx(norm0, rel=1e-4), stage
            assert by_source == pytest.approx(by_source0, rel=1e-5), stage
            assert tokens * world == tokens0


@pytest.mark.e2e
def test_in_bf16_all_stages_follow_plain_torch(tmp_path):
    results = run_ranks(WORKER, "agree", 2, tmp_path, stages=STAGES, precision="bf16", steps=8)
    plain = run_ranks(WORKER, "agree", 1, tmp_path / "t", stages=["torch"], precision="bf16", steps=8)["torch"]
    for stage in STAGES:
        for row, row0 in zip(results[stage], plain):
            assert row[0] == pytest.approx(row0[0], rel=2e-3), stage


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.e2e)])
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(precision, tmp_path):
    results = run_ranks(WORKER, "skip", 2, tmp_path, stages=STAGES, precision=precision)
    plain = run_ranks(WORKER, "skip", 1, tmp_path / "t", stages=["torch"], precision=precision)
    for stage, (skipped, norm, untouched, later_skipped, later_loss) in (results | plain).items():
        assert (skipped, norm, later_skipped) == (True, None, False), stage
        assert untouched, f"stage {stage}: parameters or moments changed in a skipped step"
        assert 3.0 < later_loss < 6.0


@pytest.mark.e2e
def test_accumulation_changes_nothing_but_rounding(tmp_path):
    results = run_ranks(WORKER, "accumulate", 2, tmp_path, stages=STAGES)
    for stage in STAGES:
        for micro in (2, 4):
            for row, row0 in zip(results[f"{stage} {micro}"], results[f"{stage} 1"]):
                assert row == pytest.approx(row0, rel=1e-5), (stage, micro)


@pytest.mark.e2e
def test_activation_checkpointing_changes_no_loss(tmp_path):
    results = run_ranks(WORKER, "options", 2, tmp_path, stages=STAGES, key="activation_checkpointing")
    for stage in STAGES:
        assert results[f"{stage} True"] == results[f"{stage} False"], stage
        assert results[f"{stage} again"] == results[f"{stage} on"], stage


@pytest.mark.e2e
def test_the_optimizers_state_can_live_in_host_memory(tmp_path):
    results = run_ranks(WORKER, "options", 2, tmp_path, stages=["1", "2", "3"], key="offload_optimizer")
    for stage in ("1", "2", "3"):
        there, here = ([float.fromhex(x) for x in results[f"{stage} {value}"]] for value in (True, False))
        assert there == pytest.approx(here, rel=1e-5), stage
        assert results[f"{stage} again"] == results[f"{stage} on"], stage


def test_evaluation_is_the_same_on_all_stages(tmp_path):
    results = run_ranks(WORKER, "evaluation", 1, tmp_path, stages=["torch", *STAGES])
    for stage in STAGES:
        assert results[stage] == pytest.approx(results["torch"], rel=1e-5), stage
    for stage in ("torch", *STAGES):
        assert results[f"{stage} modes"] == [False, True] * 3, f"{stage}: after an evaluation it trains as before"


@pytest.mark.e2e
def test_a_checkpoint_of_one_rank_is_taken_over_by_every_stage_and_plain_torch(tmp_path):
    everyone = ["torch", *STAGES]
    results = run_ranks(WORKER, "reshard", 1, tmp_path, writers=everyone, readers=everyone)
    check_reshard(results, everyone, everyone, same_layout_is_exact=True)


def check_reshard(results, writers, readers, same_layout_is_exact):
    """State is equal to the bit after any reshard; losses go on equal in the same layout and within rounding else."""
    for writer in writers:
        for reader in readers:
            assert results[f"{writer}>{reader} state"] == results[f"{writer} state"], (writer, reader)
            went_on = [float.fromhex(x) for x in results[f"{writer}>{reader} losses"]]
            expected = [float.fromhex(x) for x in results[f"{writer} losses"]]
            assert went_on == pytest.approx(expected, rel=1e-5), (writer, reader)
            if same_layout_is_exact and writer == reader:
                assert went_on == expected, (writer, reader)


@pytest.mark.e2e
def test_muon_trains_matrices_and_resumes_to_the_bit(tmp_path):
    results = run_ranks(WORKER, "muon", 2, tmp_path, stages=["0"])
    plain = run_ranks(WORKER, "muon", 1, tmp_path / "t", stages=["torch"])
    for first, second, again in (*results.values(), *plain.values()):
        assert second == again
        assert float.fromhex(first[-1]) < float.fromhex(first[0])


@pytest.mark.e2e
def test_measures_are_summed_over_everything_and_settle_what_an_update_was_made_with(tmp_path):
    everyone = run_ranks(WORKER, "measures", 2, tmp_path, stages=STAGES)
    everyone |= run_ranks(WORKER, "measures", 1, tmp_path / "t", stages=["torch"])
    for stage, (told, counts, kinds) in everyone.items():
        batches = 2 if stage == "torch" else 4
        assert told == [[batches, batches * step, 8 * 24] for step in (0, 1)], stage
        # the third step was skipped
        assert counts == [(1 << 40) - 2 * batches, (1 << 40) - batches, (1 << 40) - 2 * 8 * 24], stage
        frozen = {name: kept for name, kept in kinds.items() if name.startswith(("blocks.0.", "embed."))}
        assert all(set(kept) == {"param"} for kept in frozen.values()), stage


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_frozen_and_what_is_counted_is_taken_over_by_every_layout(precision, tmp_path):
    taken_over(precision, tmp_path, STAGES)


def taken_over(precision, tmp_path, stages):
    """Whatever wrote a checkpoint, on one rank or two, its bits are read by all."""
    everyone = ["torch", *stages]
    alone = run_ranks(
        WORKER, "reshard", 1, tmp_path / "1", timeout=250, writers=everyone, readers=everyone, precision=precision,
        counting=True, trains="none",
    )  # fmt: skip
    for writer in everyone:
        assert int(alone[f"{writer} state"]["updates"]) == 4
        for reader in everyone:
            assert alone[f"{writer}>{reader} state"] == alone[f"{writer} state"], (writer, reader)
    both = run_ranks(
        WORKER, "reshard", 2, tmp_path / "2", timeout=250, writers=everyone, readers=stages, precision=precision,
        counting=True, source=str(tmp_path / "1"), trains="none",
    )  # fmt: skip
    for writer in everyone:
        for reader in stages:
            assert both[f"{writer}>{reader} state"] == alone[f"{writer} state"], (writer, reader)
    own = run_ranks(
        WORKER, "reshard", 2, tmp_path / "own", timeout=250, writers=stages, readers=stages, precision=precision,
        counting=True, trains="own",
    )  # fmt: skip
    for writer in stages:
        assert own[f"{writer}>{writer} losses"] == own[f"{writer} losses"], writer
        for reader in stages:
            assert own[f"{writer}>{reader} state"] == own[f"{writer} state"], (writer, reader)
