"""What the driver of a Ray job makes of errors, and of requests to leave. What Ray itself does with them is a test of
real clusters (tests/faults/test_ray.py)."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import CANNOT_GO_ON, INTERRUPTED, PREEMPTED
from launcher.on_ray import (
    DriverProcess,
    GivenUpError,
    _cause,
    _given_up,
    asked_code,
    code_of_job,
    judge,
)
from pretrain.run_folder import RunFolder, append_line, step_name
from tests.conftest import ROOT, events, wait_until

DEAD = "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\nThe node died.\n"


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A run whose first attempt has begun."""
    folder = RunFolder(tmp_path / "run")
    folder.make()
    folder.event("launch", "attempt 0: starting 2 ranks")
    return folder


def rank_ended(rank, code, message="why", step=7):
    from launcher.ray_rank import RankEndedError

    return RankEndedError(rank, f"host-{rank}", code, f"rank {rank}: {message}", step)


def wrapped(error):
    """As Ray Train hands on what a worker raised."""
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    return UserExceptionWithTraceback(error, "Traceback …")


def lost(rank=0):
    """As Ray Train tells that a worker is gone."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return WorkerHealthCheckFailedError(f"Worker {rank} failed a health check.", RuntimeError(DEAD))


def saved(run, *steps):
    for step in steps:
        (run.checkpoints / step_name(step)).mkdir(exist_ok=True)


# ---- who was first


@pytest.mark.parametrize(
    ("codes", "first"),
    [
        ({0: 1, 1: -9}, 1),  # killed before collateral
        ({0: -6, 1: -9}, 1),  # what connects ranks aborts those that are left
        ({0: 65, 1: -11}, 1),  # killed before explained
        ({0: 1, 1: 78}, 1),  # explained before collateral
        ({0: 1, 1: 75}, 1),  # a node that goes before collateral
        ({0: 75, 1: 70}, 1),  # explained before a node that goes
        ({0: "lost", 1: -9}, 1),
        ({0: "lost", 1: 65}, 1),
        ({0: "lost", 1: 75}, 1),
        ({0: 1, 1: "lost"}, 1),  # a lost worker before collateral
        ({0: -6, 1: "lost"}, 1),
        ({1: "lost", 0: "lost"}, 0),
        ({3: 1, 2: 1}, 2),
    ],
)
def test_the_cause_goes_before_what_it_caused(codes, first):
    errors = {rank: lost(rank) if code == "lost" else wrapped(rank_ended(rank, code)) for rank, code in codes.items()}
    rank, sentence, code, facts = _cause(errors)
    assert rank == first
    assert sentence.startswith(f"rank {first}: ")
    if codes[first] == "lost":
        assert (code, facts) == (-signal.SIGKILL, {})
        assert sentence == f"rank {first}: its worker is lost (The actor died unexpectedly before finishing this task.)"
    else:
        assert (code, facts) == (codes[first], {"host": f"host-{first}", "step": 7})


@settings(max_examples=300, deadline=None)
@given(
    codes=st.dictionaries(
        st.integers(0, 9), st.sampled_from(["lost", 1, 3, 65, 70, 75, 78, -6, -9, -11, 134]), min_size=1
    )
)
def test_no_kill_and_no_reason_is_ever_passed_over(codes):
    errors = {rank: lost(rank) if code == "lost" else wrapped(rank_ended(rank, code)) for rank, code in codes.items()}
    order = [(-9, -11), (65, 70, 78), (75,), ("lost",), (1, 3, 134, -6)]
    best = min(n for n, kind in enumerate(order) if any(code in kind for code in codes.values()))
    assert codes[_cause(errors)[0]] in order[best]


def test_what_workers_raise_that_is_no_rank_is_told_in_one_line():
    _, sentence, _, _ = _cause({0: wrapped(OSError(28, "No space left on device"))})
    assert sentence == "rank 0: its worker is lost ([Errno 28] No space left on device)"
    _, sentence, _, _ = _cause({0: wrapped(ValueError())})
    assert sentence == "rank 0: its worker is lost (ValueError)"


# ---- whether to go on


@pytest.mark.parametrize("code", [2, 65, 70, 78])
def test_what_no_restart_mends_ends_the_run_at_once(run, code):
    with pytest.raises(GivenUpError) as given_up:
        judge(run, [], {1: wrapped(rank_ended(1, code))}, None, 0)
    assert (given_up.value.reason, given_up.value.code) == ("rank 1: why", code)
    assert events(run, "fault") == ["rank 1: why"]
    assert not events(run, "restart")


def test_a_node_that_goes_is_no_failure_and_what_failed_before_is_forgiven(run):
    history = judge(run, [], {0: lost()}, None, 0)
    saved(run, 8)
    assert judge(run, history, {n: wrapped(rank_ended(n, PREEMPTED)) for n in range(2)}, 0, 0) == []
    assert events(run, "restart")[-1] == "a node goes: starting again from step 8"
    assert len(events(run, "fault")) == 1


def test_three_attempts_without_progress_are_enough(run):
    saved(run, 5)
    history = []
    for _ in range(2):
        history = judge(run, history, {0: lost()}, None, 5)
    with pytest.raises(GivenUpError, match="3 attempts in a row ended without a new checkpoint after step 5") as end:
        judge(run, history, {0: lost()}, None, 5)
    assert end.value.code == CANNOT_GO_ON
    assert len(events(run, "fault")) == 3
    assert len(events(run, "restart")) == 2


def test_progress_is_forever(run):
    history, began = [], 0
    for step in range(1, 12):
        saved(run, step)
        history = judge(run, history, {0: wrapped(rank_ended(0, 1))}, None, began)
        began = step
    assert len(history) == 11
    assert events(run, "restart")[-1].startswith("restart 11/∞ from step 11, ")


def test_restarts_are_as_many_as_were_asked_for(run):
    saved(run, 5)
    history = judge(run, [], {0: lost()}, 1, 0)
    assert events(run, "restart") == ["restart 1/1 from step 5, 0 steps to redo"]
    saved(run, 9)
    with pytest.raises(GivenUpError, match="max_restarts is 1, and the run failed once more: rank 0: its worker"):
        judge(run, history, {0: lost()}, 1, 5)


def test_what_happened_is_told_with_its_attempt_rank_and_steps_to_redo(run):
    run.event("launch", "attempt 3: starting 2 ranks", attempt=3)
    saved(run, 5)
    append_line(run.metrics, {"step": 9, "attempt": 3})
    judge(run, [], {1: wrapped(rank_ended(1, -9))}, None, 0)
    fault, restart = run.history()[-2:]
    assert (fault["event"], fault["attempt"], fault["rank"], fault["host"], fault["step"]) == (
        "fault", 3, 1, "host-1", 7,
    )  # fmt: skip
    assert (restart["event"], restart["step"], restart["redo"], restart["attempt"]) == ("restart", 5, 4, 3)
    assert restart["message"] == "restart 1/∞ from step 5, 4 steps to redo"


def test_a_run_that_saved_nothing_begins_again(run):
    judge(run, [], {0: lost()}, None, 0)
    assert events(run, "restart") == ["restart 1/∞ from the beginning: nothing was saved yet"]


def test_failures_before_the_first_launch_are_judged_too(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.make()
    with pytest.raises(GivenUpError):
        judge(folder, [], {0: wrapped(rank_ended(0, 78))}, None, 0)


# ---- errors on their way


@pytest.mark.parametrize("make", [lambda: GivenUpError("it's over", 70), lambda: rank_ended(3, -9, "a\nb")])
def test_errors_survive_the_way_between_processes(make):
    from ray import cloudpickle

    error = make()
    for dumps, loads in ((pickle.dumps, pickle.loads), (cloudpickle.dumps, cloudpickle.loads)):
        again = loads(dumps(loads(dumps(error))))
        assert type(again) is type(error)
        assert vars(again) == vars(error)
        assert str(again) == str(error)
        inner = loads(dumps(wrapped(error)))._base_exc
        assert vars(inner) == vars(error)


def test_an_error_of_the_main_module_survives_both_ways():
    """The driver is `__main__`, and Ray Train's controller is another process."""
    script = """
import subprocess, sys
from ray import cloudpickle
import runpy
main = sys.modules["__main__"]
main.__dict__.update({k: v for k, v in runpy.run_module("launcher.on_ray", run_name="not_main").items() if k[0] != "_"})
GivenUpError.__module__ = "__main__"
there = cloudpickle.dumps(GivenUpError("all is lost", 70))
echo = "import sys, pickle\\nfrom ray import cloudpickle\\ne = cloudpickle.loads(sys.stdin.buffer.read())\\n" \
       "sys.stdout.buffer.write(cloudpickle.dumps(type(e)(e.reason, e.code)))"
back = cloudpickle.loads(subprocess.run([sys.executable, "-c", echo], input=there, stdout=subprocess.PIPE).stdout)
print(isinstance(back, GivenUpError), back.reason, back.code)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "True all is lost 70\n", done.stderr


@pytest.mark.parametrize("way", ["bare", "cause", "ray"])
def test_why_a_run_was_given_up_is_found_in_what_ray_train_raises(way):
    from ray.exceptions import RayTaskError
    from ray.train import ControllerError

    inner = GivenUpError("all is lost", 65)
    if way == "cause":
        inner, cause = RuntimeError("a callback failed"), inner
        inner.__cause__ = cause
    elif way == "ray":
        inner = RayTaskError("run", "Traceback …", inner).as_instanceof_cause()
    found = _given_up(ControllerError(inner))
    assert (found.reason, found.code) == ("all is lost", 65)


def test_another_end_of_ray_train_is_told_in_one_line():
    from ray.train import ControllerError, WorkerGroupError

    found = _given_up(ControllerError(RuntimeError("the storage is gone")))
    assert found.code == CANNOT_GO_ON
    assert "\n" not in found.reason
    circle = RuntimeError("round")
    circle.__cause__ = RuntimeError("and round")
    circle.__cause__.__cause__ = circle
    assert _given_up(ControllerError(circle)).code == CANNOT_GO_ON
    odd = RuntimeError("odd")
    odd.error = "a word"
    assert _given_up(ControllerError(odd)).code == CANNOT_GO_ON
    assert _given_up(WorkerGroupError("two failed", {})).code == CANNOT_GO_ON


# ---- the driver as a process


def script_of(run, lines):
    """The run's own script, whose driver does what the lines say."""
    (run.path / "job.sh").write_text(f"trap '' USR1\n{lines}\n")
    return run


def ended(driver, asked=None, seconds=20):
    found = []

    def over():
        found.append(driver.ended(asked))
        return found[-1] is not None

    try:
        wait_until(over, seconds)
    finally:
        driver.kill()
    return found[-1]


def test_a_driver_gets_its_module_its_folder_and_its_environment(run):
    script_of(run, f'printf "%s\\n" "$@" "$EXTRA" "$LEVIATHAN_PARENT" > {run.path}/told; exit 7')
    assert ended(DriverProcess(run, {"EXTRA": "a b"})) == 7
    told = (run.path / "told").read_text().splitlines()
    assert told == ["launcher.on_ray", str(run.path), "a b", str(os.getpid())]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_request_reaches_a_driver_that_listens_late(run, number):
    """A request that comes while it only begins would kill it or be lost."""
    listens = f"import signal, sys, time; signal.signal({int(number)}, lambda *_: sys.exit(9)); time.sleep(20)"
    script_of(run, f"exec {sys.executable} -c '{listens}'")
    assert ended(DriverProcess(run, {}), number) == 9


def test_a_driver_that_took_no_heed_is_told_again(run):
    counts = (
        "import signal, time, sys; n = []; "
        "signal.signal(signal.SIGUSR1, lambda *_: (n.append(1), len(n) > 1 and sys.exit(5))); time.sleep(20)"
    )
    script_of(run, f"exec {sys.executable} -c '{counts}'")
    assert ended(DriverProcess(run, {}), signal.SIGUSR1) == 5


def test_a_killed_driver_leaves_nothing(run):
    script_of(run, "exec sleep 60")
    driver = DriverProcess(run, {})
    began = time.monotonic()
    driver.kill()
    assert driver.ended(None) == -signal.SIGKILL
    driver.kill()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("code", "asked", "job"),
    [
        (0, None, 0), (78, None, 78), (75, signal.SIGUSR1, 75), (-9, None, 137), (-9, signal.SIGTERM, 137),
        (-15, None, 143), (-15, signal.SIGTERM, PREEMPTED), (-2, signal.SIGINT, INTERRUPTED),
        (-10, signal.SIGUSR1, PREEMPTED),
    ],
)  # fmt: skip
def test_the_code_of_a_job_says_who_ended_it(code, asked, job):
    assert code_of_job(code, asked) == job


def test_who_is_asked_by_a_signal_was_preempted_and_by_somebody_interrupted():
    codes = {asked: asked_code(asked) for asked in (None, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    assert list(codes.values()) == [INTERRUPTED, INTERRUPTED, PREEMPTED, PREEMPTED]


# ---- where there is nothing to drive, or nothing to drive it with


def drive(folder, **environment):
    return subprocess.run(
        [sys.executable, "-m", "launcher.on_ray", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=os.environ | environment, check=False,
    )  # fmt: skip


def test_a_folder_that_holds_no_run_is_told_in_one_sentence(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.make()
    done = drive(folder.path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    (stop,) = folder.history()
    assert (stop["event"], stop["code"]) == ("stop", 2)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1 (Connection refused); check the address"),
        ("not an address", "'not an address' is no address of a Ray cluster; write HOST:PORT"),
    ],
)
def test_a_cluster_that_is_not_there_is_told_in_one_sentence(run, address, told):
    run.launch.write_text(json.dumps({"ranks": 1}))
    done = drive(run.path, RAY_ADDRESS=address, RAY_AUTH_MODE="disabled")
    assert done.returncode == 78
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {told}")
    assert events(run, "stop")
    assert json.loads((run.path / "lease.json").read_bytes()).keys() == {"fence"}
