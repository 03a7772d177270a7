"""The job of a run as `status`, `why` and `stop` see it, where the queue is a Ray cluster."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import ConfigError, LeviathanError
from launcher import jobs
from launcher.jobs import InQueueError, check_not_queued, job_of, log_of, queued, take_away
from launcher.ray_jobs import UNKNOWN, RayJobs
from launcher.runs import owners, read_state
from launcher.status import show_all, show_one, stop
from launcher.submit_ray import queue
from launcher.why import why
from pretrain.run_folder import RunFolder
from tests.conftest import events
from tests.jobs_api import TOKEN, JobsApi

LOOK_S = 0.5


@pytest.fixture(autouse=True)
def of_nobody(monkeypatch):
    """Nothing is remembered of other tests, and a look does not last."""
    monkeypatch.setattr(jobs, "_silent", {})
    monkeypatch.setattr(job_of, "__defaults__", (LOOK_S,))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


@pytest.fixture
def api() -> Iterator[JobsApi]:
    with JobsApi() as server:
        yield server


@contextlib.contextmanager
def silence() -> Iterator[tuple[str, list[socket.socket]]]:
    """The address of a dashboard that takes calls and never answers, and who called."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        calls: list[socket.socket] = []
        yield f"http://127.0.0.1:{server.getsockname()[1]}", calls
        with contextlib.suppress(BlockingIOError):
            while True:
                calls.append(server.accept()[0])
        for call in calls:
            call.close()


def submitted(folder: Path, api: JobsApi, *others: RunFolder) -> RunFolder:
    """A run that a Ray cluster has."""
    run = ready(folder)
    queue(run, RayJobs(api.address), "launcher.on_ray", [run, *others])
    return run


def ready(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.make()
    run.set_facts(run_id="0123456789abcdef", name=run.name, created=time.time(), steps=20, ranks=2)
    return run


def becomes(api: JobsApi, state: str, message: str = "") -> None:
    for number in api.jobs:
        api.jobs[number] = (state, message)


def state(run):
    return read_state(run, owners([run]).get(str(run.path)))


def test_a_waiting_run_waits(tmp_path, api, capsys):
    run = submitted(tmp_path / "runs" / "it", api)
    (number,) = api.jobs
    assert state(run).what == "waiting"
    assert why(state(run)) == (
        f"it waits in the queue (Ray job {number}: PENDING); nothing to do but wait, or `leviathan stop it`"
    )
    show_one("it", tmp_path / "runs")
    assert f"waiting (Ray job {number}: PENDING)" in capsys.readouterr().out


def test_a_job_that_was_over_before_its_run_began_says_where_to_look(tmp_path, api):
    run = submitted(tmp_path / "it", api)
    (number,) = api.jobs
    becomes(api, "FAILED", "the node died")
    assert state(run).what == "never began"
    assert why(state(run)) == (
        f"it never began: its job ended before it could (Ray job {number}: FAILED); see `ray job logs --address"
        f" {api.address} {number}`, then submit it again"
    )
    assert log_of(run) == f"`ray job logs --address {api.address} {number}`"


def test_a_run_that_has_begun_speaks_for_itself(tmp_path, api):
    run = submitted(tmp_path / "it", api)
    run.event("launch", "attempt 0: starting 2 ranks")
    run.event("stop", "stopped: stopped as asked", code=130, step=5)
    asked = len(api.asked)
    assert state(run).what == "stopped"
    assert state(run).job is None
    assert len(api.asked) == asked


def test_a_job_that_the_cluster_has_forgotten_is_none(tmp_path, api):
    run = submitted(tmp_path / "it", api)
    api.jobs.clear()
    assert job_of(run) is None
    assert queued(run) is None
    assert state(run).what == "never began"


def test_a_run_without_a_job_asks_nobody(tmp_path):
    assert job_of(RunFolder(tmp_path / "none")) is None
    assert job_of(ready(tmp_path / "it")) is None


@pytest.mark.parametrize(("now", "held"), [("PENDING", True), ("RUNNING", True), ("STOPPED", False), ("FAILED", False)])
def test_a_run_in_a_queue_is_not_submitted_elsewhere(tmp_path, api, now, held):
    run = submitted(tmp_path / "it", api)
    (number,) = api.jobs
    becomes(api, now)
    if not held:
        check_not_queued(run)
        return
    with pytest.raises(InQueueError, match=f"run it is Ray job {number} already \\({now}\\); follow it with"):
        check_not_queued(run)


# ---- clusters that do not answer


def test_a_silent_dashboard_costs_status_one_look_however_many_runs_it_has(tmp_path, capsys):
    with silence() as (address, calls):
        for name in "abcdef":
            run = ready(tmp_path / name)
            run.set_facts(job={"ray": f"{name}-1", "address": address, "shared": True})
            run.event("submit", f"submitted as Ray job {name}-1", job=f"{name}-1")
        began = time.monotonic()
        show_all(tmp_path)
        assert LOOK_S <= time.monotonic() - began < 5
    assert capsys.readouterr().out.count("waiting") == 6
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["gone", "refuses", "odd"])
def test_a_cluster_that_says_nothing_of_a_run_is_told_and_keeps_out_no_other(tmp_path, api, monkeypatch, kind):
    run = submitted(tmp_path / "it", api)
    (number,) = api.jobs
    if kind == "gone":
        run.set_facts(job=run.facts()["job"] | {"address": "http://127.0.0.1:1"})
    elif kind == "refuses":
        monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    else:
        api.answers[f"/api/jobs/{number}"] = (200, b"<html>")
    told = {"gone": "no Ray dashboard answers", "refuses": "refused the token", "odd": "no Ray dashboard answers"}[kind]
    assert state(run).job.state == UNKNOWN
    sentence = why(state(run))
    assert sentence.startswith(f"nobody knows whether it still waits in a queue: Ray job {number}: UNKNOWN, ")
    assert told in sentence
    assert queued(run) is None
    check_not_queued(run)


def test_a_run_on_a_cluster_that_is_gone_is_not_said_to_be_taken_away(tmp_path, api):
    run = submitted(tmp_path / "it", api)
    run.set_facts(job=run.facts()["job"] | {"address": "http://127.0.0.1:1"})
    with pytest.raises(ConfigError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:1"):
        stop(str(run.path), 5)
    assert not events(run, "stop")


# ---- taking a run away


def test_a_waiting_run_is_taken_from_the_cluster(tmp_path, api, capsys):
    run = submitted(tmp_path / "it", api)
    (number,) = api.jobs
    stop(str(run.path), 5)
    assert api.jobs[number][0] == "STOPPED"
    assert f"took it from the queue (Ray job {number}: PENDING)" in capsys.readouterr().out
    (event,) = [event for event in run.history() if event["event"] == "stop"]
    assert event["code"] == 130
    assert state(run).what == "stopped"


def test_of_runs_that_share_a_job_only_one_is_taken_away(tmp_path, api):
    others = [ready(tmp_path / name) for name in "ab"]
    run = submitted(tmp_path / "it", api, *others)
    (number,) = api.jobs
    stop(str(others[0].path), 5)
    assert api.jobs[number][0] == "PENDING"
    assert others[0].stop_request.exists()
    assert not others[1].stop_request.exists() and not run.stop_request.exists()
    assert state(others[1]).what == "waiting"


def test_a_job_that_ended_meanwhile_is_no_error_of_the_cluster(tmp_path, api):
    run = submitted(tmp_path / "it", api)
    api.jobs.clear()
    with pytest.raises(LeviathanError, match="knows no such job"):
        take_away(run)
    with pytest.raises(LeviathanError, match=r"it is not running \(it never began\)"):
        stop(str(run.path), 5)
