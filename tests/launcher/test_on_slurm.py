"""When a job may be queued again, and how long it tries; jobs themselves are in tests/faults."""

from __future__ import annotations

import os
import signal
import time

import pytest

from configs.errors import CANNOT_GO_ON, PREEMPTED
from launcher import on_slurm
from launcher.config import LaunchConfig, SlurmConfig
from launcher.on_slurm import may_requeue, patience, queue_again
from pretrain.run_folder import RunFolder
from tests.conftest import events


def requeues(*steps, job="7"):
    return [{"event": "launch"}, *({"event": "requeue", "step": step, "job": job} for step in steps)]


def test_a_run_is_queued_again_while_it_gets_on():
    assert may_requeue(requeues(), "7", 0, 100) is None
    assert may_requeue(requeues(5, 5, 9, 9), "7", 9, 100) is None
    assert may_requeue(requeues(*range(99)), "7", 99, 100) is None


def test_a_run_is_not_queued_again_beyond_its_budget_or_where_it_stands_still():
    assert "launch.slurm.requeues is 4" in may_requeue(requeues(1, 2, 3, 4), "7", 5, 4)
    assert "launch.slurm.requeues is 0" in may_requeue(requeues(), "7", 0, 0)
    assert "3 times in a row at step 9" in may_requeue(requeues(1, 9, 9, 9), "7", 9, 100)


def test_a_run_that_stood_still_once_and_got_on_is_queued_again():
    assert may_requeue(requeues(1, 9, 9, 9), "7", 20, 100) is None


def test_what_an_earlier_job_of_the_run_did_is_not_counted():
    assert may_requeue(requeues(9, 9, 9), "8", 9, 100) is None
    assert may_requeue(requeues(1, 2, 3, 4), "8", 5, 4) is None
    assert "launch.slurm.requeues is 1" in may_requeue(requeues(1) + requeues(2, job="8"), "8", 3, 1)


def test_before_a_time_limit_there_is_as_long_to_save_as_the_limit_leaves():
    launch = LaunchConfig(grace_s=25.0, slurm=SlurmConfig(before_limit_s=180))
    assert patience(launch, signal.SIGUSR1) == 150.0
    assert patience(launch, signal.SIGTERM) == 25.0, "Slurm kills what is left after its KillWait"
    assert patience(LaunchConfig(slurm=SlurmConfig(before_limit_s=20)), signal.SIGUSR1) == 25.0


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.make()
    (run.checkpoints / "step_000000040").mkdir(parents=True)
    return run


@pytest.fixture
def controller(tmp_path, monkeypatch):
    """A stand-in for scontrol that is away for so many calls; how often it was called is what it returns."""
    calls = tmp_path / "calls"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(on_slurm, "_ASK_AGAIN_S", 0.1)
    monkeypatch.setattr(on_slurm, "_QUEUE_S", 0.0)
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)

    def away(times):
        lines = f"echo $* >> {calls}; test $(wc -l < {calls}) -gt {times} || "
        lines += "{ echo Unable to contact slurm controller >&2; exit 1; }"
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / "scontrol").chmod(0o755)
        return lambda: calls.read_text().splitlines()

    return away


def test_a_controller_that_is_away_for_a_while_is_asked_again(folder, controller):
    calls = controller(3)
    assert queue_again(folder, LaunchConfig(), "7") == PREEMPTED
    assert calls() == ["requeue 7"] * 4
    (told,) = events(folder, "requeue")
    assert told.endswith("it goes on from step 40")
    assert not events(folder, "stop")


@pytest.mark.parametrize("limit", ["patience", "end of the job"])
def test_a_controller_that_stays_away_is_told_with_what_is_saved(folder, controller, monkeypatch, limit):
    calls = controller(1000)
    if limit == "patience":
        monkeypatch.setattr(on_slurm, "_ASK_S", 0.5)
    else:
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + on_slurm._LEAVE_S + 1)))
    assert queue_again(folder, LaunchConfig(), "7") == PREEMPTED
    assert len(calls()) > 1
    (told,) = events(folder, "stop")
    assert "Unable to contact slurm controller" in told
    assert told.endswith("the run goes on from step 40 when it is submitted again")


def test_a_job_that_stands_still_asks_for_nothing(folder, controller):
    calls = controller(0)
    for _ in range(3):
        assert queue_again(folder, LaunchConfig(), "7") == PREEMPTED
    assert queue_again(folder, LaunchConfig(), "7") == CANNOT_GO_ON
    assert len(calls()) == 3
    (folder.checkpoints / "step_000000050").mkdir()
    assert queue_again(folder, LaunchConfig(), "7") == PREEMPTED
