"""Runs in jobs of a real Slurm with two nodes, and what may happen to them there."""

from __future__ import annotations

import json
import os

import pytest

from pretrain.run_folder import RunFolder
from tests.conftest import events, leviathan, losses, wait_until
from tests.mini_slurm import MiniSlurm, missing
from tests.small_ensemble import STEPS, write_ensemble
from tests.small_job import JOB_S, QUICK, TWO, assert_ended, assert_same, output_of, processes_of, submit, until_over

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(missing() is not None and os.environ.get("SLURM_TESTS") != "required", reason=missing() or ""),
]


@pytest.fixture(scope="module")
def cluster():
    with MiniSlurm(2) as slurm:
        yield slurm


def test_a_job_trains_on_two_nodes_and_says_so(cluster, tiny, undisturbed):
    run, job = submit(cluster, tiny)
    assert_ended(cluster, run, job)
    assert_same(run, undisturbed)
    assert events(run, "launch") == [f"attempt 0: starting 2 ranks on n1, n2 (Slurm job {job})"]
    assert run.log_of(0).exists()
    assert run.log_of(1).exists()
    assert not processes_of(run)
    again = leviathan("submit", "slurm", tiny, *TWO, env=cluster.env)
    assert again.code == 0, again.err


def test_a_killed_rank_is_started_again_within_the_job(cluster, tiny, undisturbed):
    # where rank 1 begins to save step 15, rank 0 has waited until that of step 10 is committed
    run, job = submit(cluster, tiny, QUICK, env={"LEVIATHAN_FAULT": "save.begin:1:15"})
    assert_ended(cluster, run, job)
    assert_same(run, undisturbed)
    (fault,) = events(run, "fault")
    assert fault.startswith(f"rank 1 (host n2, Slurm job {job}) died")
    assert "SIGKILL" in fault
    assert events(run, "restart") == ["restart 1/∞ from step 10, 5 steps to redo"]
    assert cluster.restarts(job) == 0


def test_before_its_time_is_over_a_job_saves_and_is_queued_again_five_times(cluster, tiny, undisturbed, tmp_path):
    rests = [2, 5, 9, 12, 16]
    asked = [tmp_path / f"asked{number}" for number in range(len(rests))]
    slow = ",".join(f"step.before_forward:0:{step}:until={file}" for step, file in zip(rests, asked))
    # a rest is no hang, however long the request takes
    run, job = submit(cluster, tiny, QUICK, "launch.hang_s=60", env={"LEVIATHAN_FAULT": slow})
    for number, (step, file) in enumerate(zip(rests, asked)):
        wait_until(lambda wanted=step: len(run.steps()) >= wanted, seconds=JOB_S)
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        wait_until(lambda wanted=number + 1: len(events(run, "signal")) == wanted, seconds=50)
        file.touch()
        wait_until(lambda wanted=number + 1: len(events(run, "requeue")) == wanted, seconds=60)
        wait_until(lambda: cluster.state(job) == "PENDING", seconds=60)
        cluster.start_at_once(job)
    assert_ended(cluster, run, job)
    assert cluster.restarts(job) == 5
    assert_same(run, undisturbed)
    assert not events(run, "fault")
    attempts = [row["attempt"] for row in run.steps().values()]
    assert attempts == sorted(attempts)
    assert len(set(attempts)) == 6, "every job went on where the last one had saved, and no step was done twice"


def test_a_wrong_configuration_fails_at_once_and_is_never_queued_again(cluster, tiny):
    run, job = submit(cluster, tiny, QUICK, "data.tokenizer=sp:300")
    assert_ended(cluster, run, job, "FAILED")
    assert cluster.exit_code(job).split(":")[0] in ("65", "78")
    assert cluster.restarts(job) == 0
    assert len(events(run, "launch")) == 1
    assert not events(run, "requeue")


def test_a_cancelled_job_leaves_no_process(cluster, tiny):
    run, job = submit(cluster, tiny, QUICK, "train.steps=100000", "checkpoint.every=1000")
    wait_until(lambda: len(run.steps()) >= 3, seconds=JOB_S)
    cluster.run("scancel", job)
    wait_until(lambda: cluster.state(job) == "CANCELLED", seconds=60)
    wait_until(lambda: not processes_of(run), seconds=40)
    assert not events(run, "requeue")


def test_a_killed_supervisor_leaves_no_process_and_the_same_command_goes_on(cluster, tiny, undisturbed):
    run, job = submit(cluster, tiny, QUICK, env={"LEVIATHAN_FAULT": "step.before_forward:0:12:sleep=60"})
    wait_until(lambda: len(run.steps()) == 12, seconds=JOB_S)
    (supervisor,) = [process for process in processes_of(run) if "launcher.on_slurm" in process.cmdline()]
    supervisor.kill()
    assert_ended(cluster, run, job, "FAILED")
    wait_until(lambda: not processes_of(run), seconds=30)
    assert cluster.restarts(job) == 0
    _, again = submit(cluster, tiny, QUICK)
    assert_ended(cluster, run, again)
    assert_same(run, undisturbed)


def test_a_run_that_waits_or_runs_is_not_submitted_twice(cluster, tiny):
    _, job = submit(cluster, tiny, "train.steps=100000", "launch.slurm.extra=[--hold]")
    waits = leviathan("why", tiny.parent / "runs" / "tiny", env=cluster.env)
    assert waits.out.startswith(f"tiny waits in the queue (Slurm job {job}: PENDING")
    again = leviathan("submit", "slurm", tiny, *TWO, env=cluster.env)
    taken = leviathan("stop", tiny.parent / "runs" / "tiny", env=cluster.env)
    assert again.code == 78
    assert again.err.startswith(f"error: run tiny is Slurm job {job} already (PENDING)")
    assert taken.code == 0, taken.err
    assert cluster.state(job) == "CANCELLED"


def test_a_sweep_is_a_run_for_each_value_and_asked_again_passes_over_those_that_wait(cluster, tiny):
    words = ("submit", "slurm", tiny, *TWO, QUICK, "launch.slurm.extra=[--hold]", "sweep.optim.lr=1e-3,5e-3")
    done = leviathan(*words, env=cluster.env)
    assert done.code == 0, done.err
    runs = [RunFolder(tiny.parent / "runs" / f"tiny-lr-{value}") for value in ("1e-3", "5e-3")]
    jobs = [run.facts()["job"]["slurm"] for run in runs]
    again = leviathan(*words, env=cluster.env)
    assert again.code == 0, again.err
    assert again.out.count("already (PENDING)") == 2
    assert [run.facts()["job"]["slurm"] for run in runs] == jobs
    cluster.run("scontrol", "release", ",".join(jobs))
    assert [until_over(cluster, job) for job in jobs] == ["COMPLETED"] * 2
    first, second = (losses(run) for run in runs)
    assert first[1] == second[1], "the same model on the same rows"
    assert first[20] != second[20], "at another rate"


def test_code_that_was_changed_after_submission_does_not_run(cluster, tiny):
    run, job = submit(cluster, tiny, "launch.slurm.extra=[--hold]")
    (copy,) = run.path.glob("code-*")
    with open(copy / "pretrain" / "trainer.py", "a") as file:
        file.write("# changed\n")
    cluster.run("scontrol", "release", job)
    assert_ended(cluster, run, job, "FAILED")
    assert cluster.exit_code(job) == "78:0"
    assert "was changed since it was submitted" in output_of(run, job)
    assert not run.steps()


def test_a_rank_that_is_stopped_is_found_and_the_run_goes_on(cluster, tiny, undisturbed):
    stop = {"LEVIATHAN_FAULT": "step.before_forward:1:12:stop"}
    run, job = submit(cluster, tiny, QUICK, "launch.hang_s=5", env=stop)
    assert_ended(cluster, run, job)
    (fault,) = events(run, "fault")
    assert "no progress for" in fault
    assert_same(run, undisturbed)


def test_an_ensemble_is_a_graph_of_jobs_and_kills_change_nothing(cluster, shards, corpus, tmp_path):
    configs = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        # there is no shard yet where the jobs are to run: the graph begins with a build
        there = shards if place == "here" else tmp_path / "built"
        configs.append(write_ensemble(tmp_path / place, there, corpus, engine="deepspeed"))
    here = leviathan("ensemble", configs[0], timeout=200)
    assert here.code == 0, here.err
    kill = {"LEVIATHAN_FAULT": "step.before_update:1:4"}
    done = leviathan("submit", "slurm", configs[1], QUICK, env=cluster.env | kill)
    assert done.code == 0, done.err
    runs = {name: RunFolder(tmp_path / "there" / "runs" / name) for name in ("duo-letters", "duo-lists", "duo")}
    jobs = {name: run.facts()["job"]["slurm"] for name, run in runs.items()}
    assert (
        f"all joined: run duo is Slurm job {jobs['duo']}, after {jobs['duo-letters']}, {jobs['duo-lists']}" in done.out
    )
    again = leviathan("submit", "slurm", configs[1], QUICK, env=cluster.env)
    assert again.code == 0, again.err
    assert [run.facts()["job"]["slurm"] for run in runs.values()] == list(jobs.values()), "what waits is not doubled"
    before, after = ((runs["duo"].path / f"{verb}.job").read_text() for verb in ("data", "eval"))
    assert sorted([before, *jobs.values(), after]) == [before, *jobs.values(), after], "one job for each part"
    for name, job in jobs.items():
        assert_ended(cluster, runs[name], job)
        assert len(events(runs[name], "fault")) == 1
        assert_same(runs[name], RunFolder(tmp_path / "here" / "runs" / name))
    assert until_over(cluster, after) == "COMPLETED", (runs["duo"].path / f"eval-{after}.log").read_text()
    evaluations = [json.loads(line) for line in runs["duo"].evals.read_text().splitlines()]
    assert [record["step"] for record in evaluations[-2:]] == [STEPS, STEPS], "by the run, and by the job after it"
    over = leviathan("submit", "slurm", configs[1], QUICK, env=cluster.env)
    assert over.out.count("done before") == 1, "the joint run is all there is to ask of"
