"""The job that a run was submitted as, whichever the queue: how it is, and taking it away."""

from __future__ import annotations

from typing import Protocol

from configs.errors import ConfigError, LeviathanError
from launcher import slurm
from launcher.ray_jobs import PATIENCE_S, UNKNOWN, RayJob, RayJobs
from pretrain.run_folder import RunFolder

_LOOK_S = 5.0
_silent: dict[str, str] = {}
"""Clusters that did not answer this process, and what that looked like: to ask for each run would take minutes."""


class InQueueError(ConfigError):
    """The run is in a queue already, or at work."""


class Job(Protocol):
    """A job as its queue sees it, and for people in one line."""

    @property
    def number(self) -> str:
        """What the queue calls it."""

    @property
    def state(self) -> str:
        """PENDING, RUNNING, ..."""

    @property
    def over(self) -> bool:
        """Whether it has ended for good."""


def job_of(folder: RunFolder, patience_s: float = _LOOK_S) -> Job | None:
    """The last job of a run; None where there is none, or its queue knows it no more.

    patience_s: for the answer of a Ray cluster; one that does not answer leaves a job UNKNOWN.
    """
    facts = folder.facts().get("job", {}) if folder.path.is_dir() else {}
    if "slurm" in facts:
        return slurm.job(facts["slurm"]) if slurm.present() else None
    if "ray" in facts:
        return _ray_job(facts["address"], facts["ray"], patience_s)
    return None


def _ray_job(address: str, number: str, patience_s: float) -> RayJob | None:
    if address not in _silent:
        try:
            return RayJobs(address, patience_s).job(number)
        except LeviathanError as error:
            _silent[address] = str(error)
    return RayJob(number, UNKNOWN, _silent[address])


def queued(folder: RunFolder) -> Job | None:
    """The job of a run that waits or runs; None where there is none that anybody knows of."""
    job = job_of(folder, PATIENCE_S)
    return None if job is None or job.over or job.state == UNKNOWN else job


def check_not_queued(folder: RunFolder) -> None:
    """Raises InQueueError where a run's job still waits or runs."""
    job = queued(folder)
    if job is not None:
        raise InQueueError(
            f"run {folder.name} is {str(job).split(':')[0]} already ({job.state}); follow it with `leviathan status"
            f" {folder.name}`, or end it with `leviathan stop {folder.name}`"
        )


def log_of(folder: RunFolder) -> str:
    """Where the queue has put what a run's last job printed."""
    facts = folder.facts()["job"]
    if "slurm" in facts:
        return str(folder.path / f"slurm-{facts['slurm']}.log")
    return f"`ray job logs --address {facts['address']} {facts['ray']}`"


def take_away(folder: RunFolder) -> None:
    """Take the waiting job of a run from its queue; of several runs that share one, only this run."""
    facts = folder.facts()["job"]
    if "slurm" in facts:
        slurm.cancel(facts["slurm"])
    elif facts.get("shared"):
        folder.stop_request.touch(mode=0o600)
    else:
        RayJobs(facts["address"]).stop(facts["ray"])
