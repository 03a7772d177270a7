"""Runs in jobs of a real Ray cluster of several nodes, and what may happen to them there."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request

import pytest

from launcher.ray_jobs import RayJobs
from pretrain.run_folder import RunFolder
from tests.conftest import events, leviathan, losses, start_leviathan, wait_until, write_tiny
from tests.mini_ray import MiniRay
from tests.small_ensemble import STEPS, write_ensemble
from tests.small_job import assert_same, processes_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(500)]

JOB_S = 240
"""The longest a job of these tests may take on two busy cores."""
QUIET = ("launch.preflight=false", "launch.ray.placement=spread")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with a core each beside a head that has none."""
    with MiniRay(0, 1, 1) as ray:
        yield ray


@pytest.fixture(scope="module")
def undisturbed(shards, corpus, tmp_path_factory):
    """By ZeRO stage, the same twenty steps on this machine with nothing happening; each is trained once."""
    runs = {}

    def run(zero):
        if zero not in runs:
            folder = tmp_path_factory.mktemp(f"undisturbed{zero}")
            done = leviathan("train", write_tiny(folder, shards, corpus), "--ranks", 2, f"engine.zero={zero}")
            assert done.code == 0, done.err
            runs[zero] = RunFolder(folder / "runs" / "tiny")
        return runs[zero]

    return run


def submit(cluster, config, *words, env=None):
    """The run's folder, its job submitted."""
    done = leviathan("submit", "ray", config, "--ranks", 2, "--address", cluster.dashboard, *words,
                     env=cluster.env | (env or {}))  # fmt: skip
    assert done.code == 0, done.err
    return RunFolder(config.parent / "runs" / "tiny")


def until_over(cluster, monkeypatch, run):
    """How a job ended, and what the cluster says of it."""
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    jobs, number, end = RayJobs(cluster.dashboard), run.facts()["job"]["ray"], time.monotonic() + JOB_S
    while not (job := jobs.job(number)).over:
        assert time.monotonic() < end, f"{job}: {[event['message'] for event in run.history()]}"
        time.sleep(0.5)
    return job


def test_a_killed_rank_is_started_again_and_a_second_submission_attaches(cluster, tiny, undisturbed, monkeypatch):
    words = ("engine.zero=3", "launch.ray.placement=spread")
    # where rank 1 begins to save step 15, rank 0 has waited until that of step 10 is committed
    run = submit(cluster, tiny, *words, env={"LEVIATHAN_FAULT": "save.begin:1:15"})
    again = start_leviathan(
        "submit", "ray", tiny, "--ranks", 2, "--address", cluster.dashboard, *words, env=cluster.env
    )
    job = until_over(cluster, monkeypatch, run)
    out, err = again.communicate(timeout=60)
    assert job.state == "SUCCEEDED", job.message
    assert_same(run, undisturbed(3))
    assert len(events(run, "preflight")) == 1
    (fault,) = events(run, "fault")
    assert fault.startswith("rank 1 (host ") and "SIGKILL" in fault and job.number in fault
    assert events(run, "restart") == ["restart 1/∞ from step 10, 5 steps to redo"]
    assert f"run tiny is Ray job {job.number}" in out
    assert again.returncode == 0, err
    assert "trained to step 20" in out
    assert len(events(run, "submit")) == 1
    assert not processes_of(run)


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(cluster, tiny, undisturbed, monkeypatch):
    slow = {"LEVIATHAN_FAULT": "step.before_forward:0:12:sleep=9"}
    run = submit(cluster, tiny, *QUIET, "engine.zero=2", env=slow)
    wait_until(lambda: 10 in run.committed_steps() and len(run.steps()) >= 12, seconds=JOB_S)
    cluster.kill(1)
    wait_until(lambda: events(run, "fault"), seconds=60)
    cluster.add(1)
    job = until_over(cluster, monkeypatch, run)
    assert job.state == "SUCCEEDED", job.message
    (fault,) = events(run, "fault")
    assert "its worker is lost" in fault
    assert events(run, "restart") == ["restart 1/∞ from step 10, 2 steps to redo"]
    assert_same(run, undisturbed(2))


def test_a_run_shrinks_with_its_cluster_and_grows_again_on_the_same_rows(
    cluster, tiny, undisturbed, monkeypatch, tmp_path
):
    noticed, never = tmp_path / "noticed", tmp_path / "never"
    # the second rest ends with its rank: to begin again with one more, Ray Train kills those that there are
    rests = f"step.before_forward:0:7:until={noticed},step.before_forward:0:13:until={never}"
    elastic = ("launch.ray.min_ranks=1", "launch.ray.resize_s=4", "launch.hang_s=300")
    run = submit(cluster, tiny, *QUIET, *elastic, env={"LEVIATHAN_FAULT": rests})
    wait_until(lambda: len(run.steps()) >= 7, seconds=JOB_S)
    cluster.drain(2)
    wait_until(lambda: events(run, "signal"), seconds=60)
    noticed.touch()
    wait_until(lambda: len(events(run, "launch")) >= 2, seconds=JOB_S)
    cluster.kill(2)
    wait_until(lambda: len(run.steps()) >= 13, seconds=JOB_S)
    cluster.add(1)
    job = until_over(cluster, monkeypatch, run)
    assert job.state == "SUCCEEDED", job.message
    assert [event["world"] for event in run.history() if event["event"] == "launch"] == [2, 1, 2]
    (signal,) = events(run, "signal")
    assert signal.startswith("a node is to be taken away (ranks ")
    # between two checkpoints of the schedule: what was saved is what the notice asked for
    assert events(run, "restart") == ["a node goes: starting again from step 8"]
    assert not events(run, "fault")
    rows = run.steps()
    assert [rows[step]["attempt"] for step in (8, 9, 10, 11)] == [0, 1, 1, 2]
    for step, row in undisturbed(1).steps().items():
        assert rows[step]["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert rows[step]["tokens"] == row["tokens"]


def test_a_wrong_configuration_ends_the_job_at_once(cluster, tiny, monkeypatch):
    run = submit(cluster, tiny, *QUIET, "data.tokenizer=sp:300")
    job = until_over(cluster, monkeypatch, run)
    assert job.state == "FAILED"
    assert len(events(run, "launch")) == 1
    (stop,) = [event for event in run.history() if event["event"] == "stop"]
    assert stop["code"] == 65
    assert "data.tokenizer is 'sp:300'" in stop["message"]


def test_a_run_that_is_asked_to_stop_saves_and_its_next_job_goes_on(cluster, tiny, undisturbed, monkeypatch):
    # until it is asked to; such a rest is no hang, however long that takes
    rest = f"step.before_forward:0:12:until={RunFolder(tiny.parent / 'runs' / 'tiny').stop_request}"
    run = submit(cluster, tiny, *QUIET, "launch.hang_s=60", env={"LEVIATHAN_FAULT": rest})
    wait_until(lambda: len(run.steps()) >= 12, seconds=JOB_S)
    stopped = leviathan("stop", run.path, env=cluster.env)
    assert stopped.code == 0, stopped.err
    assert max(run.committed_steps()) in (13, 14)
    until_over(cluster, monkeypatch, run)
    again = submit(cluster, tiny, *QUIET)
    job = until_over(cluster, monkeypatch, again)
    assert job.state == "SUCCEEDED", job.message
    assert_same(run, undisturbed(1))


def test_nobody_without_the_token_can_submit(cluster, tiny, tmp_path):
    request = urllib.request.Request(
        f"{cluster.dashboard}/api/jobs/", data=json.dumps({"entrypoint": f"touch {tmp_path}/was-here"}).encode(),
        headers={"Content-Type": "application/json"}, method="POST",
    )  # fmt: skip
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.code == 401
    for token, what in (("", "asks for a token"), ("0" * 64, "refused the token")):
        env = {"RAY_AUTH_TOKEN": token, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none"), "HOME": str(tmp_path)}
        done = leviathan("submit", "ray", tiny, "--address", cluster.dashboard, env=env)
        assert done.code == 78
        assert done.err.startswith(f"error: the cluster at {cluster.dashboard} {what} (40")
        assert done.err.count("\n") == 1
    assert not (tiny.parent / "runs").exists()
    assert not (tmp_path / "was-here").exists()


def test_an_ensemble_is_one_job_of_many_runs_and_kills_change_nothing(cluster, shards, corpus, tmp_path, monkeypatch):
    configs = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        # there is no shard yet where the job is to run: the graph begins with a build
        there = shards if place == "here" else tmp_path / "built"
        configs.append(write_ensemble(tmp_path / place, there, corpus, engine="deepspeed"))
    here = leviathan("ensemble", configs[0], timeout=200)
    assert here.code == 0, here.err
    kill = {"LEVIATHAN_FAULT": "step.before_update:1:4"}
    done = leviathan("submit", "ray", configs[1], "--address", cluster.dashboard, "launch.preflight=false",
                     "launch.ray.cpus_per_rank=0.5", env=cluster.env | kill)  # fmt: skip
    assert done.code == 0, done.err
    runs = {name: RunFolder(tmp_path / "there" / "runs" / name) for name in ("duo-letters", "duo-lists", "duo")}
    wait_until(lambda: events(runs["duo-lists"], "launch"), seconds=JOB_S)
    (driver,) = [p for p in processes_of(runs["duo-lists"]) if "launcher.on_ray" in p.cmdline()]
    driver.kill()
    job = until_over(cluster, monkeypatch, runs["duo"])
    assert job.state == "SUCCEEDED", job.message
    assert any("the driver of duo-lists died: SIGKILL" in fault for fault in events(runs["duo-lists"], "fault"))
    for name, run in runs.items():
        assert run.facts()["job"]["ray"] == job.number
        assert losses(run) == losses(RunFolder(tmp_path / "here" / "runs" / name))
        assert_same(run, RunFolder(tmp_path / "here" / "runs" / name))
    evaluations = [json.loads(line) for line in runs["duo"].evals.read_text().splitlines()]
    assert [record["step"] for record in evaluations[-2:]] == [STEPS, STEPS], "by the run, and by the job after it"
    over = leviathan("submit", "ray", configs[1], "--address", cluster.dashboard, env=cluster.env)
    assert over.out.count("done before") == 1
