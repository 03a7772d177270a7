"""A run on Kubernetes: the RayJob that KubeRay turns into a Ray cluster, the run's driver on its head, and their end.

The manifest was held against the schema that KubeRay publishes; on a Kubernetes it was not run here.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from configs.errors import ConfigError

OLDEST_RAY = (2, 52)
"""KubeRay gives tokens to no older Ray."""
NAME_LENGTH = 47
"""KubeRay adds to a RayJob's name, and a name in Kubernetes has 63 characters."""
KEPT_S = 600
"""How long the pods of a run that is over stay, to be looked at."""
HEAD_CPUS, HEAD_MEMORY = 2, "8Gi"
"""The driver and Ray's own services; no rank runs there."""
_DIGITS = 8
_PLAIN = re.compile(r"[A-Za-z]{2}")
_CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_MEMORY = re.compile(r"[1-9]\d*(Mi|Gi|Ti)")

Tree = dict[str, Any]


class _Dumper(yaml.SafeDumper):
    """Also quotes what is text here and a number or a truth value to other readers of YAML, such as 1e3 and y."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, None if _PLAIN.match(text) else '"'),
)


@dataclass(frozen=True)
class Worker:
    """What one worker is made of: a pod, which Ray sees as a node.

    memory: as Kubernetes writes it, such as 64Gi; what lies in /dev/shm counts. claim: the PersistentVolumeClaim that
    holds run folder and shards, and where every pod has it.
    """

    image: str
    cpus: int
    gpus: int
    memory: str
    claim: tuple[str, str] | None = None


def manifest(run: str, words: Sequence[str], workers: tuple[int, int], worker: Worker, ray_version: str) -> str:
    """The RayJob of a run, as YAML. Raises ConfigError for what KubeRay would refuse only after minutes.

    words: the command of the driver. workers: the fewest that the run goes on with, and how many there shall be.
    ray_version: of the image.
    """
    _check(workers, worker, ray_version)
    fewest, most = workers
    shares = {"cpu": str(worker.cpus), "memory": worker.memory}
    if worker.gpus:
        shares["nvidia.com/gpu"] = str(worker.gpus)
    cluster = {
        "rayVersion": ray_version,
        "authOptions": {"mode": "token"},  # else whoever reaches the head runs what he likes (CVE-2023-48022)
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},
            "template": _pod("ray-head", worker, {"cpu": str(HEAD_CPUS), "memory": HEAD_MEMORY}),
        },
        "workerGroupSpecs": [{
            "groupName": "workers", "replicas": most, "minReplicas": fewest, "maxReplicas": most,
            "rayStartParams": {}, "template": _pod("ray-worker", worker, shares),
        }],
    }  # fmt: skip
    spec = {
        "entrypoint": shlex.join(words),
        # a submitter's pod would follow the log for weeks, and the run would end with that connection
        "submissionMode": "HTTPMode",
        "backoffLimit": 0,  # the driver knows which ends are final
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEPT_S,
        "rayClusterSpec": cluster,
    }
    job = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name_of(run)}, "spec": spec}
    return yaml.dump(job, Dumper=_Dumper, sort_keys=False)


def name_of(run: str) -> str:
    """A run's name as Kubernetes takes it: itself, or what is left of it and a hash, so that no two become one."""
    plain = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if not plain[:1].isalpha():
        plain = f"run-{plain}".rstrip("-")
    if plain == run and len(run) <= NAME_LENGTH:
        return run
    digits = hashlib.sha256(run.encode()).hexdigest()[:_DIGITS]
    return f"{plain[: NAME_LENGTH - _DIGITS - 1].rstrip('-')}-{digits}"


def _pod(name: str, worker: Worker, shares: Mapping[str, str]) -> Tree:
    volumes: list[Tree] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    if worker.claim is not None:
        claim, place = worker.claim
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "runs", "mountPath": place})
    container = {"name": name, "image": worker.image, "resources": {"requests": dict(shares), "limits": dict(shares)},
                 "volumeMounts": mounts}  # fmt: skip
    # nothing in a pod speaks with Kubernetes itself
    return {"spec": {"automountServiceAccountToken": False, "containers": [container], "volumes": volumes}}


def _check(workers: tuple[int, int], worker: Worker, ray_version: str) -> None:
    """Raises ConfigError."""
    fewest, most = workers
    if not 1 <= fewest <= most:
        raise ConfigError(f"{fewest} to {most} workers are none or run backwards; give the fewest, then the most")
    if worker.cpus < 1 or worker.gpus < 0:
        raise ConfigError(f"a worker of {worker.cpus} cores and {worker.gpus} GPUs cannot be; give it a core or more")
    if not _MEMORY.fullmatch(worker.memory):
        raise ConfigError(f"memory {worker.memory!r} is no size of Kubernetes; write for example 64Gi")
    if not worker.image or worker.image.split() != [worker.image]:
        raise ConfigError(f"{worker.image!r} is no name of an image; give the one that your nodes pull")
    found = re.match(r"(\d+)\.(\d+)(\.\d+)?$", ray_version)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_RAY:
        oldest = ".".join(map(str, OLDEST_RAY))
        raise ConfigError(f"KubeRay has no token for Ray {ray_version!r}; build the image with {oldest} or newer")
    if worker.claim is None:
        return
    claim, place = worker.claim
    if not _CLAIM.fullmatch(claim):
        raise ConfigError(f"{claim!r} is no PersistentVolumeClaim; `kubectl get pvc` lists those there are")
    if not place.startswith("/") or ":" in place or ".." in place.split("/"):
        raise ConfigError(f"{place!r} is no place for a volume; give an absolute path without `:` and `..`")
