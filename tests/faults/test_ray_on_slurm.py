"""Runs on a Ray cluster within a job of a Slurm whose nodes are as far apart as real ones."""

from __future__ import annotations

import contextlib
import os
import time

import psutil
import pytest

from tests.conftest import events, wait_until
from tests.mini_slurm import MiniSlurm, missing
from tests.small_job import assert_ended, assert_same, output_of, processes_of, submit

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(missing() is not None and os.environ.get("SLURM_TESTS") != "required", reason=missing() or ""),
]

LONGER_S = 60
"""What a Ray cluster within the job may cost."""


@pytest.fixture(scope="module")
def cluster():
    with MiniSlurm(3, apart=True) as slurm:
        yield slurm


def ray_processes(cluster, nodes=(1, 2, 3)):
    found = []
    for process in [process for node in nodes for process in cluster.network.processes(node)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            called = " ".join([process.name(), *process.cmdline()[:1]])
            found += [process] if any(word in called for word in ("raylet", "gcs_server", "ray::")) else []
    return found


@pytest.mark.alone
def test_ray_within_a_job_costs_less_than_a_minute_and_leaves_nothing(cluster, tiny, undisturbed):
    seconds = []
    for words in ((), ("launch.slurm.ray=true", "run.name=with-ray")):
        began = time.monotonic()
        run, job = submit(cluster, tiny, *words)
        if words:
            run = type(run)(run.path.parent / "with-ray")
            job = run.facts()["job"]["slurm"]
        assert_ended(cluster, run, job)
        seconds.append(time.monotonic() - began)
        assert_same(run, undisturbed)
    assert events(run, "launch")[0].startswith("attempt 0: starting 2 ranks on n1, n2 (Ray job ")
    assert seconds[1] - seconds[0] <= LONGER_S
    wait_until(lambda: not ray_processes(cluster) and not processes_of(run), seconds=15)
    assert not (run.path / "ray.token").exists()
    print(f"plain {seconds[0]:.0f} s, with Ray {seconds[1]:.0f} s")


def test_the_exit_code_of_a_run_is_that_of_the_job(cluster, tiny):
    run, job = submit(cluster, tiny, "launch.slurm.ray=true", "launch.preflight=false", "data.tokenizer=sp:300")
    assert_ended(cluster, run, job, "FAILED")
    assert cluster.exit_code(job) == "65:0", output_of(run, job)
    assert cluster.restarts(job) == 0
    assert not ray_processes(cluster)


def test_before_its_time_is_over_a_job_with_ray_saves_and_is_queued_again(cluster, tiny, undisturbed, tmp_path):
    asked = tmp_path / "asked"
    slow = {"LEVIATHAN_FAULT": f"step.before_forward:0:12:until={asked}"}
    words = ("launch.slurm.ray=true", "launch.preflight=false", "launch.hang_s=60")
    run, job = submit(cluster, tiny, *words, env=slow)
    wait_until(lambda: len(run.steps()) >= 12, seconds=150)
    assert len(ray_processes(cluster)) > 2, "what must be gone afterwards is there now"
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: len(events(run, "signal")) == 1, seconds=50)
    asked.touch()
    wait_until(lambda: len(events(run, "requeue")) == 1, seconds=60)
    assert_ended(cluster, run, job)
    assert cluster.restarts(job) == 1
    assert_same(run, undisturbed)
    assert not events(run, "fault")
    assert not ray_processes(cluster)


@pytest.mark.parametrize("node", [1, 3])
def test_a_job_that_loses_ray_on_a_node_is_queued_again_and_goes_on(cluster, tiny, tmp_path, node):
    """The head, or one of several workers, which are one step: the others stay, and Ray would wait for it."""
    asked = tmp_path / "asked"
    slow = {"LEVIATHAN_FAULT": f"step.before_forward:0:12:until={asked}"}
    words = ("--nodes", 3, "--ranks", 3, "train.batch_rows=12", "launch.slurm.ray=true", "launch.hang_s=60")
    run, job = submit(cluster, tiny, "launch.preflight=false", *words, env=slow)
    wait_until(lambda: len(run.steps()) >= 12, seconds=150)
    (raylet,) = [process for process in ray_processes(cluster, [node]) if process.name() == "raylet"]
    raylet.kill()
    wait_until(lambda: len(events(run, "requeue")) == 1, seconds=60)
    asked.touch()
    assert_ended(cluster, run, job)
    # one start more where a slow machine takes longer than the 30 s that Ray gives a node to start; each is told
    ended = [said for said in events(run, "warning") if said.startswith("Ray has ended on a node (")]
    history = [f"{event['time']:.1f} {event['message']}" for event in run.history()]
    assert 1 <= cluster.restarts(job) == len(ended) == len(events(run, "requeue")) <= 2, history
    assert events(run, "resume") == ["resumed from step_000000010"]
    assert not ray_processes(cluster)
