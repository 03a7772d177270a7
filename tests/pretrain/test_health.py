"""Signs of life that outlive their process, real signals, and the judge of skipped steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import CannotGoOnError
from pretrain import health
from pretrain.health import PHASES, Heartbeat, SkipJudge, StopRequests, heartbeat_file, read_heartbeat
from tests.conftest import ROOT


class Clock:
    """Stands where the time comes from."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


# ---- heartbeats


@pytest.mark.parametrize("phase", PHASES)
def test_what_a_rank_tells_is_read_with_its_age(phase, clock, tmp_path):
    heart = Heartbeat(heartbeat_file(tmp_path, 3))
    assert read_heartbeat(tmp_path, 3) is None
    heart.at(phase, 10**12)
    clock.now += 7.5
    beat = read_heartbeat(tmp_path, 3)
    assert (beat.phase, beat.step, beat.age_s, beat.step_s) == (phase, 10**12, 7.5, 0.0)
    heart.at("save", 5)
    assert (read_heartbeat(tmp_path, 3).phase, read_heartbeat(tmp_path, 3).age_s) == ("save", 0.0)
    assert read_heartbeat(tmp_path, 2) is None


def test_a_file_that_is_not_whole_is_no_sign_of_life(tmp_path):
    Heartbeat(heartbeat_file(tmp_path, 0)).at("step", 1)
    data = heartbeat_file(tmp_path, 0).read_bytes()
    for size in range(len(data)):
        heartbeat_file(tmp_path, 0).write_bytes(data[:size])
        assert read_heartbeat(tmp_path, 0) is None


def test_a_new_life_of_a_rank_begins_without_the_old_ones_beat(clock, tmp_path):
    Heartbeat(heartbeat_file(tmp_path, 0)).at("step", 50)
    Heartbeat(heartbeat_file(tmp_path, 0))
    assert read_heartbeat(tmp_path, 0) is None


def test_a_steps_usual_time_begins_with_the_first_and_one_long_step_moves_it_by_a_sixteenth(clock, tmp_path):
    heart = Heartbeat(heartbeat_file(tmp_path, 0))
    usual = []
    for took in (0.5, 0.5, 0.5, 16.5, 0.5, 0.5):
        heart.at("data", 1)
        heart.at("step", 1)
        heart.at("evaluate", 1)
        clock.now += took
        usual.append(read_heartbeat(tmp_path, 0).step_s)
    assert usual == pytest.approx([0.0, 0.5, 0.5, 0.5, 1.5, 1.4375], abs=1e-5)


def test_the_usual_time_follows_steps_that_have_become_faster_for_good(clock, tmp_path):
    heart = Heartbeat(heartbeat_file(tmp_path, 0))
    for step in range(200):
        heart.at("data", step)
        clock.now += 100.0 if step == 0 else 0.25
    assert read_heartbeat(tmp_path, 0).step_s == pytest.approx(0.25, rel=0.01)


def test_the_last_sign_of_life_outlives_a_killed_process(tmp_path):
    script = (
        "import os, signal\n"
        "from pretrain.health import Heartbeat\n"
        "Heartbeat.from_environment(4).at('evaluate', 12)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"LEVIATHAN_HEARTBEAT": str(tmp_path)},
                          cwd=ROOT, timeout=30, check=False)  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    beat = read_heartbeat(tmp_path, 4)
    assert (beat.phase, beat.step) == ("evaluate", 12)
    assert 0 < beat.age_s < 30


def test_where_nobody_watches_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEVIATHAN_HEARTBEAT", raising=False)
    Heartbeat.from_environment(0).at("step", 1)
    Heartbeat(None).at("step", 1)
    assert list(tmp_path.iterdir()) == []


# ---- requests to stop


@pytest.fixture
def handlers():
    """The handlers of this process, as they were, once the test is over."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("sent", "heard"),
    [
        ([], (False, False)),
        ([signal.SIGTERM], (True, False)),
        ([signal.SIGUSR1], (True, False)),
        ([signal.SIGINT], (False, True)),
        ([signal.SIGINT, signal.SIGUSR1], (True, True)),
        ([signal.SIGTERM] * 3, (True, False)),
    ],
)
def test_signals_are_heard_remembered_and_end_nothing_by_themselves(sent, heard):
    requests = StopRequests()
    assert requests.poll() == (False, False)
    for number in sent:
        os.kill(os.getpid(), number)
    assert requests.poll() == heard
    assert requests.poll() == heard


def test_a_signal_in_the_middle_of_work_lets_the_work_be_finished():
    script = (
        "import time\n"
        "from pretrain.health import StopRequests\n"
        "requests = StopRequests()\n"
        "print('listening', flush=True)\n"
        "time.sleep(0.5)\n"
        "while requests.poll() == (False, False): time.sleep(0.01)\n"
        "print('finished', requests.poll(), flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "listening\n"
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (0, "finished (True, False)\n")


@pytest.mark.usefixtures("handlers")
def test_the_file_that_asks_to_stop_is_looked_at_once_a_second(clock, tmp_path):
    file = tmp_path / "stop.request"
    requests = StopRequests(file)
    assert requests.poll() == (False, False)
    file.touch()
    for after in (0.3, 0.3, 0.3):
        clock.now += after
        assert requests.poll() == (False, False), "looked again within a second"
    clock.now += 0.11
    assert requests.poll() == (False, True)
    file.unlink()
    clock.now += 5
    assert requests.poll() == (False, True)


@pytest.mark.usefixtures("handlers")
def test_a_request_that_is_there_already_is_seen_at_the_first_look(clock, tmp_path):
    (tmp_path / "stop.request").touch()
    assert StopRequests(tmp_path / "stop.request").poll() == (False, True)


# ---- skipped steps


@given(most=st.integers(0, 4), skipped=st.lists(st.booleans(), max_size=40))
def test_as_many_skips_in_a_row_are_forgiven_as_allowed_and_not_one_more(most, skipped):
    judge, row = SkipJudge(most), 0
    for step, skip in enumerate(skipped, 1):
        row = row + 1 if skip else 0
        if row > most:
            with pytest.raises(CannotGoOnError, match=rf"in {row} steps in a row, up to step {step};"):
                judge.judge(step, skip)
            return
        judge.judge(step, skip)
        assert judge.in_a_row == row
