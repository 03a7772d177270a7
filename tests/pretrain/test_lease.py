"""One writer per run folder."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from configs.errors import CannotGoOnError, ConfigError
from data_pipeline.files import write_whole
from pretrain import lease as leases
from pretrain.lease import Lease
from tests.conftest import wait_until

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from pretrain.lease import Lease
print(Lease(Path(sys.argv[1])).take(), flush=True)
time.sleep(60)
"""


def holder(folder):
    """Another process that has the lease."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_a_second_process_is_refused_with_who_has_it(tmp_path):
    process, _ = holder(tmp_path)
    try:
        with pytest.raises(ConfigError, match=rf"in use by process {process.pid} on .* since 20.*leviathan stop"):
            Lease(tmp_path).take()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_owner_on_this_host_is_replaced_at_once_with_a_higher_number(tmp_path, number):
    process, fence = holder(tmp_path)
    process.send_signal(number)
    process.wait()
    began = time.monotonic()
    mine = Lease(tmp_path)
    assert mine.take() == fence + 1
    assert time.monotonic() - began < 2
    mine.release()


def test_an_owner_that_nobody_has_taken_note_of_is_dead_all_the_same(tmp_path):
    process, fence = holder(tmp_path)
    process.kill()
    try:
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, 10)
        mine = Lease(tmp_path)
        assert mine.owner() is None
        assert mine.take() == fence + 1
        mine.release()
    finally:
        process.wait()


def test_an_owner_that_sleeps_is_still_the_owner_on_its_host(tmp_path):
    process, _ = holder(tmp_path)
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(ConfigError, match="in use"):
            Lease(tmp_path).take()
    finally:
        process.kill()
        process.wait()


def test_another_hosts_lease_is_watched_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "STALE_S", 0.6)
    facts = {"fence": 4, "renewals": 3, "host": "elsewhere", "pid": 1, "started": 0.0, "since": time.time()}
    (tmp_path / "lease.json").write_text(json.dumps(facts))
    mine = Lease(tmp_path)
    assert mine.take() == 5
    mine.release()
    (tmp_path / "lease.json").write_text(json.dumps(facts))
    monkeypatch.setattr(leases, "STALE_S", 10)
    renewed = json.dumps(facts | {"renewals": 4}).encode()
    renewal = threading.Timer(0.2, write_whole, (tmp_path / "lease.json", renewed))
    renewal.start()
    with pytest.raises(ConfigError, match="on elsewhere since"):
        Lease(tmp_path).take()
    renewal.join()


def test_numbers_only_grow(tmp_path):
    numbers = []
    for _ in range(3):
        lease = Lease(tmp_path)
        numbers.append(lease.take())
        lease.release()
        assert lease.owner() is None
    assert numbers == [1, 2, 3]


def test_only_the_owner_may_act(tmp_path):
    old = Lease(tmp_path)
    fence = old.take()
    with old.held(fence):
        pass
    old.release()
    new = Lease(tmp_path)
    new.take()
    with pytest.raises(CannotGoOnError, match="number 1, now 2"), old.held(fence):
        pytest.fail("an old owner acted")
    new.release()


def test_it_is_renewed_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    lease = Lease(tmp_path)
    lease.take()
    wait_until(lambda: json.loads((tmp_path / "lease.json").read_text())["renewals"] >= 3, 20)
    lease.release()


def test_many_at_once_get_it_one_after_the_other(tmp_path):
    """Twelve processes race; exactly one wins each round, and no number is given twice."""
    script = HOLDER.replace("time.sleep(60)", "") + "\nimport os; os._exit(0)"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=ROOT, env=os.environ,
        )
        for _ in range(12)
    ]  # fmt: skip
    numbers = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        if out.strip():
            numbers.append(int(out))
        else:
            assert "in use by process" in err
    assert len(numbers) == len(set(numbers)) >= 1


def test_a_later_start_of_the_same_job_takes_over_at_once_and_the_earlier_one_can_do_nothing_more(tmp_path):
    facts = {"fence": 4, "renewals": 3, "host": "elsewhere", "pid": 1, "started": 0.0, "since": time.time()}
    (tmp_path / "lease.json").write_text(json.dumps(facts | {"job": "slurm 7", "start": 1}))
    began = time.monotonic()
    second = Lease(tmp_path, ("slurm 7", 2))
    assert second.take() == 5
    assert time.monotonic() - began < 2
    third = Lease(tmp_path, ("slurm 7", 3))
    assert third.take() == 6, "though the second one, on this very host, lives"
    assert second.lost() and not third.lost()
    with pytest.raises(CannotGoOnError, match="number 5, now 6"), second.held(5):
        pytest.fail("an earlier start acted")
    for lease in (second, third):
        lease.release()
    assert third.owner() is None


@pytest.mark.parametrize("start", [("slurm 7", 2), ("slurm 7", 1), ("slurm 8", 9), None])
def test_no_other_job_and_no_earlier_start_takes_over_from_one_that_lives(tmp_path, start):
    holds = Lease(tmp_path, ("slurm 7", 2))
    holds.take()
    with pytest.raises(ConfigError, match="in use by process"):
        Lease(tmp_path, start).take()
    holds.release()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOTSUP, "is on a file system without locks (Operation not supported); mount it with `flock`"),
        (errno.ENOLCK, "could not be locked for 0 s (No locks available); see why its file system gives no locks"),
    ],
)
def test_a_disk_that_gives_no_locks_is_told_for_what_it_is(tmp_path, monkeypatch, number, message):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(leases.fcntl, "flock", flock)
    monkeypatch.setattr(leases, "LOCK_S", 0.2)
    with pytest.raises(ConfigError, match=re.escape(message)):
        Lease(tmp_path).take()
