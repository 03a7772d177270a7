"""What Slurm says, as plain values; with stand-ins for its commands. A real one is asked in tests/faults."""

from __future__ import annotations

import os

import pytest

from launcher import slurm


@pytest.mark.parametrize(
    ("state", "over"),
    [
        ("PENDING", False), ("RUNNING", False), ("SUSPENDED", False), ("COMPLETING", False), ("REQUEUED", False),
        ("COMPLETED", True), ("FAILED", True), ("CANCELLED", True), ("TIMEOUT", True), ("NODE_FAIL", True),
        ("OUT_OF_MEMORY", True), ("BOOT_FAIL", True), ("DEADLINE", True), ("PREEMPTED", True), ("REVOKED", True),
    ],
)  # fmt: skip
def test_a_job_in_a_final_state_is_over(tmp_path, monkeypatch, state, over):
    answer = f"JobId=7 JobName=it JobState={state} Reason=None Restarts=2 NodeList=n[1-2]"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho '{answer}'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = slurm.job("7")
    assert (job.state, job.restarts, job.nodes) == (state, 2, "n[1-2]")
    assert job.over is over
