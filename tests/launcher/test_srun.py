"""What srun tells of its tasks, and of what it waits for; with a stand-in for srun that says what a real one says.

Real ones start ranks in tests/faults.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import launcher.srun
from launcher.srun import NodesTakenError, Step, codes_told, waits_for_its_own

BUSY = "srun: Job 7 step creation temporarily disabled, retrying (Requested nodes are busy)"
BEGINS = "srun: Step created for StepId=7.0"


@pytest.mark.parametrize(
    ("line", "codes"),
    [
        ("srun: error: n2: task 1: Killed", {1: -9}),
        ("srun: error: n1: tasks 0-2,5: Exited with exit code 75", {0: 75, 1: 75, 2: 75, 5: 75}),
        ("srun: error: n1: task 3: Segmentation fault (core dumped)", {3: -11}),
        ("srun: error: n1: task 0: Terminated\n", {0: -15}),
        ("srun: error: n1: task 0: Aborted", {0: -6}),
        ("srun: error: n1: task 0: Out Of Memory", {0: -9}),
        ("srun: error: n2: tasks 1-3: Out Of Memory", {1: -9, 2: -9, 3: -9}),
        ("srun: Job step aborted: Waiting up to 32 seconds for job step to finish.", {}),
        ("srun: error: Node failure on n3", {}),
        ("error: something of a library's own", {}),
    ],
)
def test_codes_are_read_from_what_srun_tells(line, codes):
    assert codes_told(line) == codes


@pytest.mark.parametrize(
    ("line", "waits"),
    [
        (BUSY, True),
        (BUSY.replace("temporarily", "still") + "\n", True),
        (BUSY.replace("Requested nodes are busy", "Unable to contact slurm controller (connect failure)"), False),
        (BEGINS, False),
        ("srun: Step created for job 7", False),
        ("srun: error: Node failure on n3", None),
        ("somebody wrote: retrying (Requested nodes are busy)", None),
    ],
)
def test_srun_is_known_to_wait_for_nodes_that_its_job_has(line, waits):
    assert waits_for_its_own(line) is waits


@pytest.fixture
def step(tmp_path, monkeypatch):
    """Starts a step whose srun is a shell with these lines; what Slurm says of steps is that there are none."""
    for name, lines in (("squeue", ""), ("srun", 'eval "$LINES_OF_SRUN"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(launcher.srun, "BUSY_S", 1.0)
    begun = []

    def begin(lines, tell=None):
        begun.append(Step("7", [], os.environ | {"LINES_OF_SRUN": lines}, tell))
        return begun[-1]

    yield begin
    for each in begun:
        each.end()


def test_a_step_that_waits_for_its_own_nodes_for_long_is_given_up(step):
    waiting = step(f"echo '{BUSY}' >&2; sleep 60")
    assert waiting.poll() is None, "for a moment it may"
    with pytest.raises(
        NodesTakenError, match=r"^Slurm lets job 7 start nothing on its own nodes.*; give the nodes back"
    ):
        waiting.wait(20)
    began = time.monotonic()
    waiting.end()
    assert time.monotonic() - began < 10, "srun would wait for nodes, and not for a signal's sake end"


@pytest.mark.parametrize("after", [BEGINS, BUSY.replace("Requested nodes are busy", "Prolog is running")])
def test_a_step_that_waited_and_then_did_not_is_left_alone(step, after):
    assert step(f"echo '{BUSY}' >&2; sleep 0.3; echo '{after}' >&2; sleep 2; exit 3").wait(20) == 3


def test_a_step_tells_errors_that_are_not_of_tasks_and_keeps_codes_of_those_that_are(step):
    told = []
    lines = ("srun: error: n2: task 1: Killed", "srun: error: Node failure on n3", "srun: warning: nothing")
    ended = step("".join(f"echo '{line}' >&2; " for line in lines) + "exit 137", told.append)
    assert ended.wait(20) == 137
    assert (ended.codes, told, list(ended.said)) == ({1: -9}, [lines[1]], list(lines))


def test_a_step_that_outlives_the_wait_goes_on_and_ends_with_what_it_started(step, tmp_path: Path):
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 7.0 7.batch\n")
    (tmp_path / "scancel").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/cancelled; kill $(cat {tmp_path}/pid)\n')
    (tmp_path / "scancel").chmod(0o755)
    going = step(f"echo $$ > {tmp_path}/pid; exec sleep 60")
    assert going.wait(0.5) is None
    going.end()
    assert (tmp_path / "cancelled").read_text() == "--signal=KILL 7.0\n"
    assert going.poll() == -15
