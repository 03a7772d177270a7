"""The driver within a Slurm job: requests reach it, it does not outlive its cluster, its code is the job's.

What Slurm and Ray do in such a job is a test of both (tests/faults/test_ray_on_slurm.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher.config import LaunchConfig, SlurmConfig
from pretrain.run_folder import RunFolder
from tests.conftest import ROOT, events, wait_until

SECONDS = 30
LAUNCH = LaunchConfig()
LISTENS = f"""exec {sys.executable} -c '
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(75))
open(sys.argv[1] + "/ready", "w").close()
time.sleep(60)
' "$2"
"""


DRIVE = """
import os, sys
from pathlib import Path
from configs.errors import LeviathanError
from launcher.config import LaunchConfig
from launcher.ray_on_slurm import _Driver
from pretrain.run_folder import RunFolder

run, launch, asked = RunFolder(Path(sys.argv[1])), LaunchConfig.model_validate_json(sys.argv[2]), int(sys.argv[3])

class Cluster:
    # stands where Ray's nodes are: one has ended once a file says so
    def lost(self):
        return "Ray has ended on a node (exit code 1); see a log" if (run.path / "gone").exists() else None

driver = _Driver(launch)
if asked:
    os.kill(os.getpid(), asked)
try:
    sys.exit(driver.drive(run, Cluster(), {"RAY_ADDRESS": "10.0.0.1:6379"}))
except LeviathanError as error:
    (run.path / "error").write_text(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)
"""


class Driven:
    """A batch step that drives a run whose script holds these lines. asked: a signal that it gets at once."""

    def __init__(self, folder: Path, lines: str, asked: int = 0, launch: LaunchConfig = LAUNCH) -> None:
        self.run = RunFolder(folder / "run")
        self.run.make()
        (self.run.path / "job.sh").write_text(f"trap '' USR1\ntouch {self.run.path}/began\n{lines}\n")
        words = [str(self.run.path), launch.model_dump_json(), str(int(asked))]
        self.process = subprocess.Popen([sys.executable, "-c", DRIVE, *words])

    def end(self) -> int:
        """The exit code; nothing is left."""
        try:
            code = self.process.wait(SECONDS)
        finally:
            self.process.kill()
        path = str(self.run.path)
        assert not [p for p in psutil.process_iter(["cmdline"]) if path in " ".join(p.info["cmdline"] or [])]
        return code

    def there(self, name: str) -> bool:
        return (self.run.path / name).exists()


@pytest.mark.parametrize(("lines", "code"), [("exit 0", 0), ("exit 70", 70), ("exit 75", 75), ("kill -9 $$", 137)])
def test_the_code_of_the_driver_is_that_of_the_job(tmp_path, lines, code):
    assert Driven(tmp_path, lines).end() == code


def test_the_driver_is_told_where_the_cluster_is(tmp_path):
    driven = Driven(tmp_path, f'[ "$1 $RAY_ADDRESS $2" = "launcher.on_ray 10.0.0.1:6379 {tmp_path}/run" ]')
    assert driven.end() == 0


def test_a_request_that_came_before_the_driver_is_not_lost(tmp_path):
    """While the cluster comes up; there is nothing to save yet."""
    driven = Driven(tmp_path, "exit 3", asked=signal.SIGUSR1)
    assert driven.end() == 75
    assert not driven.there("began")


@pytest.mark.parametrize("pause", ["", "sleep 1"])
def test_a_request_reaches_the_driver_when_it_listens(tmp_path, pause):
    """A shell that has only begun would die of it; one that has set its trap would never tell of it."""
    driven = Driven(tmp_path, f"{pause}\n{LISTENS}")
    wait_until(lambda: driven.there("began" if pause else "ready"), SECONDS)
    os.kill(driven.process.pid, signal.SIGUSR1)
    assert driven.end() == 75


def test_a_driver_that_dies_of_a_request_was_preempted(tmp_path):
    driven = Driven(tmp_path, f"exec -a {tmp_path}/run sleep 60")
    wait_until(lambda: driven.there("began"), SECONDS)
    os.kill(driven.process.pid, signal.SIGTERM)
    assert driven.end() == 75


@pytest.mark.parametrize(("asked", "most"), [(signal.SIGUSR1, 3), (signal.SIGTERM, 1)])
def test_a_driver_that_saves_for_too_long_leaves_time_to_be_queued_again(tmp_path, asked, most):
    """Its job would be over at the time limit, and with it the run."""
    launch = LaunchConfig(grace_s=1.0, slurm=SlurmConfig(before_limit_s=33))
    driven = Driven(tmp_path, f"trap '' TERM\nexec -a {tmp_path}/run sleep 60", launch=launch)
    driven.run.stop_request.touch()  # as a driver does that was asked
    wait_until(lambda: driven.there("began"), SECONDS)
    os.kill(driven.process.pid, asked)
    began = time.monotonic()
    assert driven.end() == 75
    assert most <= time.monotonic() - began < most + 5
    assert not driven.run.stop_request.exists(), "the job's next start would obey it"
    assert events(driven.run, "warning") == [
        f"stopped after {most} s without saving; the last checkpoint, of step 0, is valid"
    ]


def test_a_driver_does_not_outlive_its_cluster(tmp_path):
    driven = Driven(tmp_path, f"exec -a {tmp_path}/run sleep 60")
    wait_until(lambda: driven.there("began"), SECONDS)
    began = time.monotonic()
    (driven.run.path / "gone").touch()
    assert driven.end() == 1
    assert time.monotonic() - began < 8
    assert (driven.run.path / "error").read_text().startswith("AllocationLostError: Ray has ended on a node")


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1])
def test_a_job_that_is_cancelled_and_loses_its_cluster_first_is_no_job_to_queue_again(tmp_path, asked):
    driven = Driven(tmp_path, f"exec -a {tmp_path}/run sleep 60")
    wait_until(lambda: driven.there("began"), SECONDS)
    (driven.run.path / "gone").touch()
    time.sleep(0.5)
    os.kill(driven.process.pid, asked)
    assert driven.end() == 75
    assert not driven.there("error")


def test_outside_of_a_job_it_is_told_in_one_sentence(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.make()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        [sys.executable, "-m", "launcher.ray_on_slurm", str(run.path)], cwd=ROOT, env=clean, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 78
    assert done.stderr == "error: this is no Slurm job; use `leviathan submit slurm`\n"
    (stop,) = run.history()
    assert (stop["event"], stop["code"]) == ("stop", 78)
