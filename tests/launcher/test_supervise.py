"""The supervisor's judgement of who hangs, over real processes and real heartbeats."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from configs.errors import CannotGoOnError
from launcher.config import LaunchConfig
from launcher.on_local import LocalTeam, _Rank
from launcher.supervise import Supervisor
from pretrain.health import PHASES, heartbeat_file
from pretrain.run_folder import RunFolder
from tests.conftest import events, wait_until

HANG_S, START_S = 2.0, 60.0


WATCHERS = ("supervise", "on_slurm", "ray_on_slurm", "on_ray", "ensemble", "ensemble_on_ray")


def test_who_only_watches_runs_does_without_torch():
    """They start in half a second, and take no memory from a node that they stay on for weeks."""
    program = f"import sys; from launcher import {', '.join(WATCHERS)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"


@pytest.fixture
def run(tmp_path) -> Iterator[Supervisor]:
    """Two ranks that do nothing, watched."""
    folder = RunFolder(tmp_path / "run")
    folder.make()
    local = LocalTeam(folder, LaunchConfig(ranks=2, hang_s=HANG_S, start_s=START_S))
    local._heartbeats = tmp_path
    script = "import signal, time; signal.signal(signal.SIGUSR2, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    for number in range(2):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        local._ranks.append(_Rank(number, process))
    yield Supervisor(local)
    for rank in local._ranks:
        rank.process.kill()
        rank.process.wait()
        rank.process.stdout.close()


def beat(folder, rank, phase, age_s, step_s=0.1):
    """A heartbeat as a rank would have left it `age_s` ago."""
    record = struct.pack("<dqqq", time.monotonic() - age_s, 7, PHASES.index(phase), int(step_s * 1e6))
    heartbeat_file(folder, rank).write_bytes(record)


def judged(run, tmp_path, first, second):
    for rank, (phase, age_s) in enumerate((first, second)):
        beat(tmp_path, rank, phase, age_s)
    return run._find_hang(time.monotonic() - 100)


def test_steps_that_last_too_long_are_a_hang(run, tmp_path):
    end = judged(run, tmp_path, ("step", 4.0), ("step", 3.0))
    assert "rank 0 (pid" in end.cause
    assert "no progress for 4 s (last: step of step 7)" in end.cause
    assert judged(run, tmp_path, ("step", 1.0), ("step", 1.5)) is None


def test_five_usual_steps_are_no_hang(run, tmp_path):
    for rank in range(2):
        beat(tmp_path, rank, "step", 4.0, step_s=1.0)
    assert run._find_hang(time.monotonic()) is None


@pytest.mark.parametrize("phase", ["data", "save", "evaluate", "restore"])
def test_a_rank_that_waits_for_one_that_fetches_or_saves_does_not_hang(run, tmp_path, phase):
    assert judged(run, tmp_path, ("step", 30.0), (phase, 30.0)) is None
    end = judged(run, tmp_path, ("step", 70.0), (phase, 71.0))
    assert f"rank 1 (pid {run._team._ranks[1].process.pid}" in end.cause
    assert f"(last: {phase} of step 7)" in end.cause


def test_a_stopped_process_is_found_soon_whatever_it_was_doing(run, tmp_path):
    pid = run._team._ranks[1].process.pid
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: 1 in run._team.frozen(), 5)
    assert judged(run, tmp_path, ("step", 1.0), ("data", 1.0)) is None
    assert f"rank 1 (pid {pid}" in judged(run, tmp_path, ("step", 3.0), ("data", 3.0)).cause


def test_a_rank_that_never_gives_a_sign_of_life_is_found(run, tmp_path):
    assert run._find_hang(time.monotonic() - START_S + 5) is None
    assert "it never began" in run._find_hang(time.monotonic() - START_S - 1).cause


class Apart(LocalTeam):
    """A team one of whose nodes may be away."""

    away = True

    def missing(self):
        return "node n2 does not answer" if self.away else None


@pytest.fixture
def apart(tmp_path) -> Supervisor:
    folder = RunFolder(tmp_path / "run")
    folder.make()
    return Supervisor(Apart(folder, LaunchConfig(start_s=1.5)))


class Patient(LocalTeam):
    """A team that has longer to save in after USR1 than after other signals."""

    def patience(self, number):
        return 3.0 if number == signal.SIGUSR1 else super().patience(number)


SAVES = """
import signal, sys, time
signal.signal({asked}, lambda *_: (time.sleep(1.2), sys.exit(75)))
print("listens", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("asked", "saved"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_ranks_have_as_long_to_save_as_their_team_says(tmp_path, asked, saved):
    folder = RunFolder(tmp_path / "run")
    folder.make()
    team = Patient(folder, LaunchConfig(grace_s=0.5))
    process = subprocess.Popen([sys.executable, "-c", SAVES.format(asked=int(asked))], stdout=subprocess.PIPE)
    process.stdout.readline()
    team._ranks.append(_Rank(0, process))
    team._heartbeats = tmp_path
    supervisor = Supervisor(team)
    supervisor._on_signal(asked, None)
    try:
        end = supervisor._watch()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert end.code == 75
    assert end.cause == (
        "stopped as asked" if saved else "stopped after 0 s without saving; the last checkpoint is valid"
    )
    assert f"at most {3 if saved else 0} s" in events(folder, "signal")[0]


def test_a_node_that_stays_away_ends_a_run_in_time(apart):
    began = time.monotonic()
    with pytest.raises(CannotGoOnError, match=r"^node n2 does not answer, and has not for 2 s; mend it, or start"):
        apart._assemble()
    assert 1.5 < time.monotonic() - began < 5
    assert events(apart._folder, "warning") == [
        "node n2 does not answer; the run waits until it does, or is started elsewhere"
    ]


def test_a_node_that_comes_back_is_waited_for(apart):
    threading.Timer(0.5, lambda: setattr(apart._team, "away", False)).start()
    assert apart._assemble()


def test_who_is_asked_to_leave_waits_for_no_node(apart):
    apart.asked = signal.SIGTERM
    began = time.monotonic()
    assert not apart._assemble()
    assert time.monotonic() - began < 1
