"""`leviathan doctor`: what it measures, what it calls wrong, what it never shows."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import time
from pathlib import Path

import pytest

from launcher import doctor
from tests.conftest import leviathan

SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory):
    """What the doctor says of this machine, on which a build was killed yesterday."""
    extensions = tmp_path_factory.mktemp("extensions")
    (extensions / "py311_cpu" / "cpu_adam").mkdir(parents=True)
    lock = extensions / "py311_cpu" / "cpu_adam" / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 86400, time.time() - 86400))
    return leviathan("doctor", env={"TORCH_EXTENSIONS_DIR": str(extensions), "WANDB_API_KEY": SECRET}), lock


def test_a_machine_that_trains_is_fit(visit):
    done, _ = visit
    assert (done.code, done.err) == (0, "")
    for name in ("Python", "packages", "processors", "memory", "disk", "/dev/shm", "clock", "GPUs", "host name"):
        assert any(line.split()[0] in ("ok", "warn") and f" {name} " in line for line in done.out.splitlines() if line)
    assert "torch 2." in done.out
    assert "GFLOP/s in fp32 matrix products" in done.out
    assert "fsync" in done.out
    assert "0 failed" in done.out


def test_two_real_ranks_have_summed_tensors(visit):
    line = next(line for line in visit[0].out.splitlines() if "gloo all-reduce" in line)
    assert line.startswith("ok ")
    assert "B/s, latency " in line


def test_a_stale_lock_is_found_with_what_to_do(visit):
    done, lock = visit
    assert "1 locks older than an hour" in done.out
    assert f"torch_extensions: if no build is running, remove it: rm {lock}" in done.out


def test_the_key_of_wandb_is_never_shown(visit):
    done, _ = visit
    assert "in the environment" in done.out
    assert SECRET not in done.out + done.err
    assert SECRET[:8] not in done.out + done.err


@pytest.mark.parametrize(
    ("found", "limits", "fits"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("0.19.8", ">=0.19.8,<0.20", True),
        ("0.20.0", ">=0.19.8,<0.20", False),
        ("3.11.7", ">=3.11", True),
        ("2026.1.0", ">=2026.1", True),
        ("1.0.0rc1", ">= 1.0", True),
        ("9", "", True),
        ("1.2", "==1.3", False),
    ],
)
def test_versions_are_compared_as_numbers(found, limits, fits):
    assert doctor.fits_version(found, limits) is fits


def test_packages_that_are_missing_or_too_old_fail_with_the_command_that_mends_it(monkeypatch):
    def version(name: str) -> str:
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.1" if name == "torch" else "9999.0" if name != "deepspeed" else "0.19.9"

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    failed = {row.name: row for row in doctor.versions() if row.state == "fail"}
    assert set(failed) == {"torch", "wandb"}
    assert failed["torch"].advice == "pip install 'torch>=2.11'"
    assert failed["wandb"].found == "not installed"


def test_a_disk_that_cannot_be_written_fails(monkeypatch, tmp_path):
    def refuse(dir):  # noqa: A002 (the name of the standard library)
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    (row,) = doctor.disk(tmp_path)
    assert row.state == "fail"
    assert "Read-only file system" in row.found


def test_a_host_that_does_not_know_its_own_name_is_warned(monkeypatch):
    monkeypatch.setattr(doctor.socket, "gethostname", lambda: "no-such-host.invalid")

    def unknown(*_):
        raise socket.gaierror

    monkeypatch.setattr(doctor.socket, "getaddrinfo", unknown)
    (row,) = doctor.host_name()
    assert (row.state, row.found) == ("warn", "no-such-host.invalid does not resolve")
    assert "/etc/hosts" in row.advice


def test_ranks_that_do_not_answer_are_given_up_in_time_and_none_stays():
    began = time.monotonic()
    (row,) = doctor.all_reduce(limit_s=0.3)
    assert time.monotonic() - began < 5
    assert row.state == "fail"
    assert "no answer within 0 s" in row.found
    assert not [p for p in doctor.psutil.Process().children() if "launcher.doctor" in " ".join(p.cmdline())]


def test_any_failure_makes_the_exit_code_1(monkeypatch, capsys):
    rows = [doctor.Row("a", "ok", "fine"), doctor.Row("b", "fail", "bad [x]", "mend it")]
    monkeypatch.setattr(doctor, "tests", lambda folder: [("all", lambda: rows)])
    assert doctor.examine(Path("/")) == 1
    out = capsys.readouterr().out
    assert "fail  b     bad [x]" in out
    assert "fail b: mend it" in out
    assert "1 failed, 0 with a warning, 1 fine" in out
