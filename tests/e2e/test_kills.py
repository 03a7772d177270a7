"""Every ZeRO stage with two ranks: killed again and again, nothing lost, nothing changed."""

from __future__ import annotations

import math
import random

import pytest

from pretrain.checkpoint_files import newest_readable, verify
from pretrain.run_folder import RunFolder
from tests.conftest import events, leviathan, losses, write_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
STEPS, EVERY = 30, 5
STEP_POINTS = ["step.before_forward", "step.before_update"]
SAVE_POINTS = ["save.begin", "save.after_file", "save.before_manifest", "save.before_commit", "save.after_commit"]
ONLY_RANK_0 = {"save.before_manifest", "save.before_commit", "save.after_commit"}


def five_kills(stage):
    """Five moments in the order they come to pass, two of them inside a save; drawn anew for each stage, but fixed."""
    rng = random.Random(stage)
    while True:
        moments = [(step, rng.choice(STEP_POINTS), rng.randrange(2)) for step in rng.sample(range(1, STEPS), 3)]
        for step in rng.sample(range(EVERY, STEPS, EVERY), 2):
            point = rng.choice(SAVE_POINTS)
            moments.append((step - 0.5, point, 0 if point in ONLY_RANK_0 else rng.randrange(2)))
        moments.sort()
        if survivable([math.ceil(at) for at, _, _ in moments]):
            return ",".join(f"{point}:{rank}:{math.ceil(at)}" for at, point, rank in moments)


def survivable(steps):
    """Whether of any three lives in a row one is sure to leave a new checkpoint: after three without, a run gives up.

    A save under way at a kill may or may not be committed; the one before it is, as the next save waits for it.
    """
    may_be = [0, 0, 0] + [step // EVERY * EVERY for step in steps]
    return all((step // EVERY - 1) * EVERY > may_be[number] for number, step in enumerate(steps) if number >= 2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_five_kills_change_no_loss_and_no_bit_of_the_result(stage, shards, corpus, tmp_path):
    runs = {}
    for name, faults in (("quiet", ""), ("killed", five_kills(stage))):
        (tmp_path / name).mkdir()
        config = write_tiny(tmp_path / name, shards, corpus)
        words = [f"engine.zero={stage}", f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "train.micro_rows=2"]
        done = leviathan("train", config, *words, "--ranks", 2, env={"LEVIATHAN_FAULT": faults}, timeout=300)
        assert done.code == 0, done.err + done.out
        runs[name] = RunFolder(tmp_path / name / "runs" / "tiny")
    quiet, killed = runs["quiet"], runs["killed"]
    assert len(events(killed, "fault")) == 5, (five_kills(stage), events(killed, "fault", "restart"))
    assert losses(killed) == losses(quiet)
    assert len(losses(quiet)) == STEPS
    hashes = [[note["sha256"] for note in newest_readable(run).facts["files"]] for run in (quiet, killed)]
    assert hashes[0] == hashes[1]
    for step in killed.committed_steps():
        assert verify(killed.checkpoints / f"step_{step:09d}") is None
    assert not [p.name for p in killed.checkpoints.iterdir() if "." in p.name]
