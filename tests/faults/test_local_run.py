"""A real run under the supervisor, and what may happen to it. Two gloo ranks, ZeRO-1, unless said otherwise."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import psutil
import pytest

from pretrain.checkpoint_files import newest_readable, verify
from pretrain.run_folder import RunFolder
from tests.conftest import events, leviathan, losses, start_leviathan, wait_until

pytestmark = pytest.mark.timeout(400)

ALONE = ("engine.name=torch", "--ranks", 1)
"""One rank of the reference engine, where neither DeepSpeed nor a second rank is what is tested: it starts faster."""


def run_of(config):
    return RunFolder(config.parent / "runs" / "tiny")


def files_of(run):
    """Hashes of the final state's files."""
    return [note["sha256"] for note in newest_readable(run).facts["files"]]


def assert_same(run, reference):
    assert losses(run) == losses(reference)
    assert len(losses(run)) == 20
    assert files_of(run) == files_of(reference)


def ranks_alive(run):
    words = {"pretrain.run", str(run.path)}
    return [p for p in psutil.process_iter(["cmdline"]) if words <= set(p.info["cmdline"] or [])]


def test_a_killed_rank_costs_nothing_but_time(tiny, undisturbed):
    done = leviathan("train", tiny, "--ranks", 2, timeout=300, env={"LEVIATHAN_FAULT": "step.before_update:1:12"})
    run = run_of(tiny)
    assert done.code == 0, done.err
    assert_same(run, undisturbed)
    (fault,), (restart,) = events(run, "fault"), events(run, "restart")
    assert "rank 1 (pid" in fault and "died in phase 'step' of step 13" in fault and "SIGKILL" in fault
    # on a slow machine the save of step 10 may still be under way when the rank dies
    assert re.fullmatch("restart 1/∞ from step (10, 3|5, 8) steps to redo", restart)
    died, again = (next(e["time"] for e in run.history() if e["event"] == kind) for kind in ("fault", "restart"))
    last = max(row["time"] for row in _rows(run) if row["attempt"] == 0)
    assert died - last < 15
    assert again - died < 1.0
    assert not ranks_alive(run)


def _rows(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


@pytest.mark.e2e
def test_preempted_it_saves_the_step_it_is_at_and_goes_on_from_there(tiny, undisturbed):
    slow = {"LEVIATHAN_FAULT": "step.before_forward:0:7:sleep=4"}
    process = start_leviathan("train", tiny, "--ranks", 2, env=slow)
    run = run_of(tiny)
    wait_until(lambda: len(losses(run)) >= 7)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    saved = run.committed_steps()[0]
    assert saved == max(losses(run)) == 8, "the step under way when the signal came"
    assert events(run, "signal") == ["SIGTERM: finishing the step and saving (at most 25 s)"]
    done = leviathan("train", tiny, "--ranks", 2)
    assert done.code == 0, done.err
    assert events(run, "resume") == ["resumed from step_000000008"]
    assert_same(run, undisturbed)


def test_interrupted_once_it_finishes_the_step_saves_and_leaves_with_130(tiny):
    slow = {"LEVIATHAN_FAULT": "step.before_forward:0:4:sleep=3"}
    process = start_leviathan("train", tiny, *ALONE, env=slow)
    run = run_of(tiny)
    wait_until(lambda: len(losses(run)) >= 4)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert run.committed_steps()[0] == max(losses(run)) == 5
    assert "Ctrl-C again stops at once" in events(run, "signal")[0]
    assert not ranks_alive(run)


@pytest.mark.e2e
def test_interrupted_twice_it_stops_at_once_and_what_was_saved_is_valid(tiny):
    slow = {"LEVIATHAN_FAULT": "step.before_forward:0:7:sleep=60"}
    process = start_leviathan("train", tiny, *ALONE, env=slow)
    run = run_of(tiny)
    wait_until(lambda: len(losses(run)) >= 7)
    # it is saved beside the training, and what is under way when everything stops at once is lost
    wait_until(lambda: run.committed_steps() == [5])
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
    assert process.wait(timeout=10) == 130
    assert newest_readable(run).step == 5
    assert not ranks_alive(run)


@pytest.mark.e2e
def test_a_hung_rank_is_found_named_and_replaced(tiny, undisturbed):
    env = {"LEVIATHAN_FAULT": "step.before_update:1:12:stop"}
    done = leviathan("train", tiny, "--ranks", 2, "launch.hang_s=3", timeout=300, env=env)
    run = run_of(tiny)
    assert done.code == 0, done.err
    (fault,) = events(run, "fault")
    assert "rank 1 (pid" in fault and "no progress for" in fault and "(last: step of step 13)" in fault
    at = next(e["time"] for e in run.history() if e["event"] == "fault")
    assert at - max(row["time"] for row in _rows(run) if row["attempt"] == 0) < 10
    assert "Current thread" in run.log_of(0).read_text()
    assert_same(run, undisturbed)


@pytest.mark.e2e
def test_without_progress_three_times_it_stops_with_the_reason(tiny):
    env = {"LEVIATHAN_FAULT": ",".join(["step.before_update:0:2"] * 5)}
    done = leviathan("train", tiny, *ALONE, timeout=300, env=env)
    run = run_of(tiny)
    assert done.code == 70
    assert len(events(run, "fault")) == 3
    assert "3 attempts in a row ended without a new checkpoint after step 0" in events(run, "stop")[0]
    assert "SIGKILL" in events(run, "stop")[0]


def test_a_step_that_is_not_finite_is_skipped_and_told_with_its_rows(tiny):
    env = {"LEVIATHAN_FAULT": "step.before_update:0:6:nan"}
    done = leviathan("train", tiny, *ALONE, env=env)
    run = run_of(tiny)
    assert done.code == 0, done.err
    assert [step for step, row in run.steps().items() if row["skipped"]] == [7]
    (message,) = events(run, "skip")
    assert "at step 7" in message and "rows 48 to 55" in message
    assert newest_readable(run).facts["updates"] == 19
    assert newest_readable(run).facts["data"]["rows"] == 160


@pytest.mark.e2e
def test_a_second_job_in_the_same_folder_is_refused_at_once(tiny):
    # longer than the second one may take, and no hang meanwhile
    slow = {"LEVIATHAN_FAULT": "step.before_forward:0:3:sleep=90"}
    first = start_leviathan("train", tiny, *ALONE, "launch.hang_s=90", env=slow)
    run = run_of(tiny)
    wait_until(lambda: len(losses(run)) >= 3)
    second = leviathan("train", tiny, *ALONE)
    assert second.code == 78
    assert second.err.count("\n") == 1
    assert f"in use by process {first.pid} on" in second.err
    assert second.seconds < 40
    os.kill(first.pid, signal.SIGINT)
    # two signals at the same moment are one
    time.sleep(0.3)
    os.kill(first.pid, signal.SIGINT)
    first.wait(timeout=20)


@pytest.mark.e2e
def test_no_rank_outlives_its_supervisor(tiny):
    slow = {"LEVIATHAN_FAULT": "step.before_forward:0:7:sleep=60"}
    process = start_leviathan("train", tiny, "--ranks", 2, "log.wandb=offline", env=slow)
    run = run_of(tiny)
    wait_until(lambda: len(losses(run)) >= 7)
    ranks = [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
    assert len(ranks) >= 2
    process.kill()
    process.wait()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in ranks), seconds=30)


@pytest.mark.e2e
def test_killed_in_the_middle_of_a_save_the_older_checkpoint_is_used(tiny, undisturbed):
    faults = "save.before_manifest:0:10,save.after_file:1:15,save.after_commit:0:20"
    done = leviathan("train", tiny, "--ranks", 2, timeout=300, env={"LEVIATHAN_FAULT": faults})
    run = run_of(tiny)
    assert done.code == 0, done.err
    assert len(events(run, "fault")) == 3
    assert_same(run, undisturbed)
    assert all(verify(run.checkpoints / f"step_{step:09d}") is None for step in run.committed_steps())
    assert not [p for p in run.checkpoints.iterdir() if "." in p.name]


@pytest.mark.e2e
def test_a_damaged_checkpoint_is_passed_over_by_all_ranks_alike(tiny):
    assert leviathan("train", tiny, "--ranks", 2, "train.steps=15").code == 0
    run = run_of(tiny)
    before = files_of(run)
    victim = run.checkpoints / "step_000000015" / "rank_00001.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    victim.write_bytes(data)
    done = leviathan("train", tiny, "--ranks", 2, "train.steps=15")
    assert done.code == 0, done.err
    told = "\n".join(events(run, "invalid_checkpoint"))
    assert "rank_00001.safetensors sha256" in told and "manifest says" in told
    assert events(run, "fallback") == ["using step_000000010 instead (lost 5 steps)"]
    assert verify(run.checkpoints / "step_000000015") is None
    # compared with its own first life: in a run of 20 steps the learning rate falls otherwise
    first, again = ({row["step"]: row["loss"].hex() for row in _rows(run) if row["attempt"] == n} for n in (0, 1))
    assert list(again) == [11, 12, 13, 14, 15]
    assert again == {step: first[step] for step in again}
    assert files_of(run) == before
