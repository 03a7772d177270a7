"""Where a run happens: kept apart from what is trained, so that a run moves between machines unchanged."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator, model_validator

from configs.schema import Config, key, section

_WORD = re.compile(r"[A-Za-z0-9._:@=,+/%-]+")
"""What a value in a batch script may consist of: nothing there that a shell, or sbatch, would read as its own."""
_TIME = re.compile(r"(\d+-)?\d+(:\d{2}){0,2}")
OWN_OPTIONS = (
    "job-name", "nodes", "ntasks", "ntasks-per-node", "signal", "requeue", "no-requeue", "open-mode", "output", "error",
    "export", "chdir", "parsable", "wrap", "array", "wait", "partition", "account", "qos", "reservation", "constraint",
    "time", "gpus-per-node", "cpus-per-task", "mem", "dependency", "test-only", "uid", "gid", "get-user-env",
    "bb", "bbf",
)  # fmt: skip
"""Options of sbatch that are never taken from `extra`: they have keys of their own, or would break the job."""


def one_word(value: str, what: str) -> str:
    """The value, if it can stand in a batch script. Raises ValueError."""
    if not _WORD.fullmatch(value):
        raise ValueError(
            f"{what} {value!r} holds what a batch script cannot carry; use letters, digits and . _ : @ = , + / % -"
        )
    return value


class SlurmConfig(Config):
    """What a job asks Slurm for. What is empty is left to the cluster's own defaults."""

    partition: str | None = key(None, "free", "partition")
    account: str | None = key(None, "free", "account that is charged")
    qos: str | None = key(None, "free", "quality of service")
    reservation: str | None = key(None, "free", "reservation")
    constraint: str | None = key(None, "free", "features that nodes must have")
    time: str | None = key(None, "free", "time limit, as of sbatch: minutes, H:MM:SS or D-HH:MM:SS")
    gpus_per_node: int | None = key(None, "free", "GPUs of each node; empty: none is asked for", gt=0)
    cpus_per_rank: int | None = key(None, "free", "cores for each rank", gt=0)
    mem: str | None = key(None, "free", "memory of each node, such as 64G; 0 is all of it")
    extra: tuple[str, ...] = key((), "free", "more options of sbatch, each as --name or --name=value")
    before_limit_s: int = key(
        180, "free", "seconds before the time limit at which a run saves and is queued again", gt=0
    )
    ray: bool = key(False, "free", "place ranks by a Ray cluster within the job, with what launch.ray says")
    requeues: int = key(100, "free", "how often a job may be queued again", ge=0)
    env_file: str | None = key(None, "free", "a file of shell commands that a job begins with: modules, variables")
    wrapper: tuple[str, ...] = key((), "free", "words before Python on every node, such as of a container")
    python: str | None = key(None, "free", "Python on the nodes; empty: the one that submits")

    @field_validator("partition", "account", "qos", "reservation", "constraint", "mem")
    @classmethod
    def _is_one_word(cls, value: str | None) -> str | None:
        return None if value is None else one_word(value, "the value")

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, value: str | None) -> str | None:
        if value is not None and not _TIME.fullmatch(value):
            raise ValueError(f"{value!r} is no time; write minutes, H:MM:SS or D-HH:MM:SS")
        return value

    @field_validator("extra")
    @classmethod
    def _are_other_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            name = one_word(option, "the option").removeprefix("--").split("=")[0]
            if not option.startswith("--") or not name:
                raise ValueError(f"{option!r} is no option; write --name or --name=value")
            if any(own.startswith(name) for own in OWN_OPTIONS):
                raise ValueError(f"{option!r} has a key of its own, or is the launcher's; remove it")
        return value


class RayConfig(Config):
    """What a job asks a Ray cluster for, for each of launch.ranks."""

    min_ranks: int | None = key(
        None, "free", "fewest ranks that a run goes on with while nodes are lost; empty: all of launch.ranks", gt=0
    )
    gpus: bool = key(False, "free", "a GPU for every rank")
    cpus_per_rank: float = key(1.0, "free", "cores for each rank", gt=0)
    placement: Literal["pack", "spread"] = key("pack", "free", "ranks on few nodes, or on many")
    resize_s: float = key(60.0, "free", "how often a run that lost ranks looks for room to grow again", gt=0)
    env_file: str | None = key(None, "free", "a file of shell commands that every process begins with")
    python: str | None = key(None, "free", "Python on the nodes; empty: the one that submits")
    image: str | None = key(None, "free", "container image of the nodes, for KubeRay")
    memory: str = key("16Gi", "free", "memory of each worker's pod, for KubeRay")
    claim: str | None = key(None, "free", "NAME:/PATH of the PersistentVolumeClaim with runs and data, for KubeRay")


class LaunchConfig(Config):
    """How many processes, and what is done when one of them dies."""

    ranks: int = key(1, "record", "processes that train, one a device", gt=0)
    nodes: int = key(1, "free", "machines of a Slurm job that share the ranks", gt=0)
    max_restarts: int | None = key(None, "free", "restarts of a run; empty: as long as it makes progress", ge=0)
    hang_s: float = key(10.0, "free", "longest step, unless five usual steps take longer; then it hangs", gt=0)
    start_s: float = key(
        600.0, "free", "longest time until the first step, and of a save, an evaluation or a wait for data", gt=0
    )
    grace_s: float = key(25.0, "free", "time to save in when asked to leave, before what is left is killed", gt=0)
    preflight: bool = key(True, "free", "on a cluster, let every node measure itself before a job starts")
    slurm: SlurmConfig = section(SlurmConfig)
    ray: RayConfig = section(RayConfig)

    @model_validator(mode="after")
    def _deals_evenly(self) -> LaunchConfig:
        if self.ranks % self.nodes:
            raise ValueError(f"{self.ranks} ranks cannot be shared evenly by {self.nodes} nodes; use a multiple")
        if self.ray.min_ranks is not None and self.ray.min_ranks > self.ranks:
            raise ValueError(f"ray.min_ranks is {self.ray.min_ranks}, and there are {self.ranks} ranks; use fewer")
        return self
