"""A small run as a job of the tests' own Slurm: submitted, followed to its end, compared with one on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from pretrain.checkpoint_files import newest_readable
from pretrain.run_folder import RunFolder
from tests.conftest import leviathan, losses
from tests.mini_slurm import MiniSlurm

TWO = ("--nodes", 2, "--ranks", 2)
QUICK = "launch.preflight=false"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
JOB_S = 300
"""The longest a job of these tests may take on two busy cores."""


def submit(
    cluster: MiniSlurm, config: Path, *words: object, env: Mapping[str, str] | None = None
) -> tuple[RunFolder, str]:
    """The run's folder, and the number of its job on two nodes."""
    done = leviathan("submit", "slurm", config, *TWO, *words, env=cluster.env | dict(env or {}))
    assert done.code == 0, done.err
    run = RunFolder(config.parent / "runs" / "tiny")
    return run, run.facts()["job"]["slurm"]


def until_over(cluster: MiniSlurm, job: str) -> str:
    """How a job ended; one that is queued again does not wait for Slurm's pause."""
    end = time.monotonic() + JOB_S
    while (state := cluster.state(job)) not in OVER:
        if time.monotonic() > end:
            nodes = cluster.run("scontrol", "show", "node", check=False)
            raise AssertionError(
                f"job {job} is still {state}:\n{cluster.facts(job)}{nodes}{cluster.log_of('slurmctld')}"
            )
        if state == "PENDING" and cluster.restarts(job):
            cluster.start_at_once(job)
        time.sleep(0.3)
    return state


def assert_ended(cluster: MiniSlurm, run: RunFolder, job: str, state: str = "COMPLETED") -> None:
    """A job ends so; where it does not, all that anybody has said of it is told."""
    found = until_over(cluster, job)
    if found != state:
        said = [f"{event['time']:.1f} {event['message']}" for event in run.history()]
        told = "\n".join([cluster.facts(job), *said, output_of(run, job), cluster.log_of("slurmctld")])
        raise AssertionError(f"job {job} is {found}, not {state}:\n{told}")


def output_of(run: RunFolder, job: str) -> str:
    """What a job's supervisor printed."""
    return (run.path / f"slurm-{job}.log").read_text()


def processes_of(run: RunFolder) -> list[psutil.Process]:
    """Every process on this machine, in whatever node, that works on a run."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(run.path) in (p.info["cmdline"] or [])]


def assert_same(run: RunFolder, reference: RunFolder) -> None:
    """The same losses, and the same last checkpoint to the byte."""
    assert losses(run) == losses(reference)
    files = [[note["sha256"] for note in newest_readable(each).facts["files"]] for each in (run, reference)]
    assert files[0] == files[1]
