"""A run on a Ray cluster of its own within a Slurm job: one node is its head, the others join, this step drives.

`python -m launcher.ray_on_slurm FOLDER` is what the batch script becomes where launch.slurm.ray is set. Who mends what:
Ray Train starts ranks again within the allocation (launcher/on_ray.py); Slurm queues the job again when a node dies,
this step where Ray ends on one; before a time limit the run saves and the job is queued again, as without Ray. The
cluster takes work from whoever has the job's own token, has no dashboard, and ends with the job.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from configs.errors import ConfigError, LeviathanError
from launcher import slurm
from launcher.config import LaunchConfig
from launcher.network import address_of_first, free_port
from launcher.on_ray import DriverProcess, asked_code, code_of_job
from launcher.on_slurm import as_job, patience
from launcher.srun import Step
from launcher.supervise import REQUESTS
from pretrain.run_folder import RunFolder

_UP_S, _POLL_S = 120.0, 0.25
_WORD_S = 3.0
"""A job that is cancelled, or whose node has died, loses its Ray too, and hears why up to so much later."""
_OBJECTS_BYTES = 100 << 20
"""Ray's own store of objects: what it carries here are a few sentences."""


class _Cluster:
    """The nodes of this job as a Ray cluster."""

    def __init__(self, folder: RunFolder, launch: LaunchConfig, job: str) -> None:
        self._folder, self._launch, self._job = folder, launch, job
        self._nodes = slurm.nodes(os.environ["SLURM_JOB_NODELIST"])
        self._token, self._ray = folder.path / "ray.token", Path(sys.executable).parent / "ray"
        if not self._ray.exists():
            raise ConfigError(f"there is no {self._ray}; pip install -c constraints.txt 'ray[default]'")
        self._steps: list[Step] = []
        address = address_of_first([node.address for node in self._nodes])
        self.address = f"{address}:{free_port(address)}"

    def up(self) -> dict[str, str]:
        """Start head and workers; return what the environment of a driver needs. Raises LeviathanError."""
        self._token.unlink(missing_ok=True)
        self._token.touch(mode=0o600)
        self._token.write_text(secrets.token_hex(32))
        environment = {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self._token), "RAY_ADDRESS": self.address,
            "RAY_enable_metrics_collection": "0",
        }  # fmt: skip
        head, others = self._nodes[0], self._nodes[1:]
        host, _, port = self.address.rpartition(":")
        self._srun(environment, [head], "head", f"--node-ip-address={host}", f"--port={port}", "--head",
                   "--include-dashboard=false")  # fmt: skip
        self._wait(environment)
        if others:
            self._srun(environment, others, "workers", f"--address={self.address}")
        return environment

    def down(self) -> None:
        """End every process of the cluster."""
        # not politely: a node of Ray would wait for work that is no more
        for step in self._steps:
            step.end()
        self._token.unlink(missing_ok=True)

    def lost(self) -> str | None:
        """What is wrong where a part of the cluster has ended; None while it is whole, or as whole as it has to be.

        Workers are one step, which lives on while one of them does. Without `min_ranks` Ray would wait for the others.
        """
        whole = self._launch.ray.min_ranks is None
        for step in self._steps:
            if (code := step.poll()) is not None or (whole and step.codes):
                said = step.said[-1] if step.said else f"exit code {code}"
                return f"Ray has ended on a node ({said}); see {self._folder.logs}/ray_*.log"
        return None

    def _srun(self, environment: dict[str, str], nodes: list[slurm.Node], log: str, *words: str) -> None:
        """`ray start` on nodes, as one step that lives as long as they do."""
        asks, launch = self._launch.slurm, self._launch
        cores = launch.ranks // launch.nodes * launch.ray.cpus_per_rank
        count, names = str(len(nodes)), ",".join(node.name for node in nodes)
        logs = str(self._folder.logs.resolve()).replace("%", "%%")
        step = [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--nodelist={names}", "--wait=0",
                "--cpu-bind=none", f"--cpus-per-task={os.environ.get('SLURM_CPUS_ON_NODE', '1')}",
                f"--output={logs}/ray_{log}_%t.log"]  # fmt: skip
        start = [str(self._ray), "start", *words, f"--num-cpus={max(1, math.ceil(cores))}", "--block",
                 "--disable-usage-stats", f"--object-store-memory={_OBJECTS_BYTES}"]  # fmt: skip
        if asks.gpus_per_node is not None:
            start.append(f"--num-gpus={asks.gpus_per_node}")
        self._steps.append(Step(self._job, [*step, *asks.wrapper, *start], os.environ | environment))

    def _wait(self, environment: dict[str, str]) -> None:
        """Until the head answers."""
        words = [str(self._ray), "health-check", "--address", self.address]
        end = time.monotonic() + _UP_S
        while True:
            if (lost := self.lost()) is not None:
                raise LeviathanError(lost)
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = subprocess.run(words, env=os.environ | environment, stdin=subprocess.DEVNULL,
                                      capture_output=True, timeout=20, check=False)  # fmt: skip
                if done.returncode == 0:
                    return
            if time.monotonic() > end:
                raise LeviathanError(
                    f"the head of the Ray cluster did not come up on {self._nodes[0].name} within {_UP_S:.0f} s; see"
                    f" {self._folder.logs}/ray_head_0.log"
                )
            time.sleep(_POLL_S)


class _Driver:
    """The driver of the run, as a child: requests to stop reach it."""

    def __init__(self, launch: LaunchConfig) -> None:
        self.asked: int | None = None
        self._launch, self._until = launch, math.inf
        for number in REQUESTS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)

    def drive(self, folder: RunFolder, cluster: _Cluster, environment: dict[str, str]) -> int:
        """The exit code of a run that is driven to its end. Raises AllocationLostError where Ray ends before."""
        if self.asked is not None:
            return asked_code(self.asked)
        driver = DriverProcess(folder, environment)
        try:
            while (code := driver.ended(self.asked)) is None:
                if (lost := cluster.lost()) is not None:
                    return self._leave(lost)
                if time.monotonic() > self._until:
                    driver.kill()  # or it might ask the ranks once more, below
                    return self._give_up(folder)
                time.sleep(_POLL_S)
        finally:
            driver.kill()
        return code_of_job(code, self.asked)

    def _leave(self, lost: str) -> int:
        """The exit code where somebody has asked for the end, and Ray's with it; raises AllocationLostError else."""
        end = time.monotonic() + _WORD_S
        while self.asked is None and time.monotonic() < end:
            time.sleep(_POLL_S)
        if self.asked is None:
            raise slurm.AllocationLostError(lost)
        return asked_code(self.asked)

    def _give_up(self, folder: RunFolder) -> int:
        """The exit code where a driver that was asked to leave has not in time."""
        assert self.asked is not None
        most, step = patience(self._launch, self.asked), max(folder.committed_steps(), default=0)
        folder.stop_request.unlink(missing_ok=True)  # or the job's next start would obey it
        folder.event(
            "warning",
            f"stopped after {most:.0f} s without saving; the last checkpoint, of step {step}, is valid",
            step=step,
        )
        return asked_code(self.asked)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self._until = number, time.monotonic() + patience(self._launch, number)


def main(arguments: list[str]) -> int:
    """Bring a cluster up, drive the run of a folder on it, end both; return the exit code of the job."""
    return as_job(arguments, _drive)


def _drive(folder: RunFolder, launch: LaunchConfig, job: str) -> tuple[int, int | None]:
    driver, cluster = _Driver(launch), _Cluster(folder, launch, job)
    try:
        return driver.drive(folder, cluster, cluster.up()), driver.asked
    finally:
        cluster.down()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
