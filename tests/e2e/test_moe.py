"""Shared experts in real runs: killed and restarted to the same bits, and taken over by one rank with all of them."""

from __future__ import annotations

import shutil

import pytest

from pretrain.checkpoint_files import newest_readable
from pretrain.run_folder import RunFolder
from tests.conftest import events, leviathan, losses, write_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(500)]
STEPS = 20
CHANNEL = "model.channel={name: moe, options: {experts: 4, balance: BALANCE}}"
# in a step, between forward and update, and in the middle of a save
KILLS = "step.before_forward:1:8,step.before_update:0:13,save.after_file:1:15"


def train(folder, stage, shards, corpus, balance, *words, ranks=2, faults=""):
    """Train there, or go on, to the end; every rank holds half of the experts, if there are two."""
    folder.mkdir(exist_ok=True)
    config = write_tiny(folder, shards, corpus)
    words = [CHANNEL.replace("BALANCE", balance), f"engine.zero={stage}", f"engine.expert_parallel={ranks}", *words]
    words += ["train.micro_rows=2", "optim.schedule=constant"]
    done = leviathan("train", config, *words, "--ranks", ranks, env={"LEVIATHAN_FAULT": faults}, timeout=300)
    assert done.code == 0, done.err + done.out
    return RunFolder(folder / "runs" / "tiny")


@pytest.mark.parametrize(("stage", "balance"), [(1, "bias"), (2, "loss")])
def test_killed_ranks_resume_to_the_bit_and_one_rank_takes_all_experts(stage, balance, shards, corpus, tmp_path):
    run = [stage, shards, corpus, balance, f"train.steps={STEPS}"]
    quiet, killed = train(tmp_path / "quiet", *run), train(tmp_path / "killed", *run, faults=KILLS)
    assert len(events(killed, "fault")) == 3, events(killed, "fault", "restart")
    assert losses(killed) == losses(quiet)
    hashes = [[note["sha256"] for note in newest_readable(run).facts["files"]] for run in (quiet, killed)]
    assert hashes[0] == hashes[1]
    told = quiet.steps()[STEPS]["model"]
    assert sum(told[f"blocks.0.channel/load.{e}"] for e in range(4)) == pytest.approx(1.0)
    assert told["blocks.1.channel/dropped"] == 0.0

    shutil.copytree(tmp_path / "quiet", tmp_path / "one")
    more = [stage, shards, corpus, balance, f"train.steps={STEPS + 5}"]
    two, one = train(tmp_path / "quiet", *more), train(tmp_path / "one", *more, ranks=1)
    assert events(one, "resume") == [f"resumed from step_{STEPS:09d}"]
    first, *later = range(STEPS + 1, STEPS + 6)
    there, here = (RunFolder(run.path).steps() for run in (two, one))
    # the first loss is that of the checkpoint's parameters
    assert here[first]["loss"] == pytest.approx(there[first]["loss"], rel=1e-6)
    for step in later:
        assert here[step]["loss"] == pytest.approx(there[step]["loss"], rel=1e-4)
