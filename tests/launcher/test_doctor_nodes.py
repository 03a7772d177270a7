"""`leviathan doctor --nodes` where there are no nodes, and its rows; nodes themselves are in tests/faults."""

from __future__ import annotations

import pytest

from launcher.doctor_nodes import cells_of, state_of, versions_of
from launcher.preflight import Finding
from tests.conftest import leviathan

REPORT = {
    "node": "n1", "code": "code-1", "python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "gpus": 8,
    "cores": 64, "flops": 1.5e12, "memory_free": 64e9, "disk_free": 2e12, "shm_free": 32e9, "fsync_s": 0.0021,
    "clock_s": -0.0004,
}  # fmt: skip


def test_outside_of_a_job_it_says_how_to_get_nodes(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    done = leviathan("doctor", "--nodes")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "error: nodes are measured from within a Slurm job, and this is none; ask for nodes, for example with"
        " `salloc --nodes=2 leviathan doctor --nodes`\n"
    )


def test_a_job_without_slurm_is_one_sentence():
    done = leviathan("doctor", "--nodes", env={"SLURM_JOB_ID": "1", "PATH": "/nonexistent"})
    assert (done.code, done.out) == (78, "")
    assert done.err == "error: there is no squeue on this machine; is Slurm installed here?\n"


@pytest.mark.parametrize(
    ("stops", "state"), [([], "ok"), ([False], "warn"), ([True], "fail"), ([False, True, False], "fail")]
)
def test_the_worst_finding_is_the_state_of_a_node(stops, state):
    findings = [Finding("n1", "is odd", each) for each in stops]
    assert state_of("n1", True, [*findings, Finding("n2", "is odder", True)]) == state


def test_of_a_node_that_was_not_measured_nothing_is_said_but_what_is_wrong():
    assert state_of("n1", False, [Finding("n2", "is odd", True)]) == ""
    assert state_of("n2", False, [Finding("n2", "is odd", True)]) == "fail"


def test_a_row_has_everything_in_units_for_people():
    assert cells_of(REPORT) == [
        "64", "8", "1,500", "64.0 GB", "32.0 GB", "2.0 TB", "2.1 ms", "-0.000 s", "code-1",
    ]  # fmt: skip
    alone = {key: value for key, value in REPORT.items() if key != "clock_s"}
    assert cells_of(alone)[-2] == ""


def test_a_report_cannot_steer_the_terminal():
    assert "\x1b" not in "".join(cells_of(REPORT | {"code": "\x1b[2J"}))
    assert "\x1b" not in versions_of([REPORT | {"torch": "\x1b[2J"}])


def test_versions_that_differ_are_all_told():
    assert versions_of([REPORT, REPORT]) == "Python 3.11.7, torch 2.13.0, deepspeed 0.19.8"
    assert "torch 2.11.0 and 2.13.0" in versions_of([REPORT, REPORT | {"torch": "2.11.0"}])
    assert versions_of([]) == ""
