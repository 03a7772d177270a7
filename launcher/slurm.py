"""The door to Slurm: its commands, each with a deadline, and what they say as plain values."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from configs.errors import ConfigError, LeviathanError

_PATIENCE_S = 60.0
"""A controller that does not answer for so long is down."""
_CALL_S = 3.0
_SLURMD_PORT = 6818


OVER = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED",
    "REVOKED",
)  # fmt: skip
"""States of a job that nothing follows."""


class SlurmError(LeviathanError):
    """Slurm refused, or did not answer."""


class AllocationLostError(SlurmError):
    """With these nodes, as this start of the job has them, nothing can be done any more: another start may."""


@dataclass(frozen=True)
class Job:
    """One job as the controller sees it. state: PENDING, RUNNING, ... reason: why it waits, or why it ended."""

    number: str
    state: str
    reason: str
    restarts: int
    nodes: str

    @property
    def over(self) -> bool:
        """Whether it has ended for good."""
        return self.state in OVER

    def __str__(self) -> str:
        reason = f", {self.reason}" if self.reason not in ("", "None") else ""
        return f"Slurm job {self.number}: {self.state}{reason}"


@dataclass(frozen=True)
class Node:
    """A node as the controller knows it: its name need not resolve anywhere. port: of its own daemon."""

    name: str
    address: str
    port: int


def present() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def check_present() -> None:
    """Raises ConfigError where this machine has no Slurm."""
    if not present():
        raise ConfigError("there is no sbatch on this machine; submit from a login node of the cluster")


def submit(script: str, options: Sequence[str] = ()) -> str:
    """Submit a script; return the job's number. Raises ConfigError where Slurm refuses it."""
    check_present()
    done = _call(["sbatch", "--parsable", *options, script])
    if done.returncode:
        raise ConfigError(f"sbatch refused {script}: {_said(done)}; change what it names and submit again")
    return done.stdout.strip().split(";")[0]


def job(number: str) -> Job | None:
    """A job, or None where the controller has forgotten it (some minutes after its end)."""
    done = _call(["scontrol", "show", "job", number, "-o"])
    if done.returncode:
        return None
    facts = dict(re.findall(r"(\w+)=(\S*)", done.stdout.splitlines()[0]))
    return Job(number, facts.get("JobState", "?"), facts.get("Reason", ""), int(facts.get("Restarts", 0)),
               facts.get("NodeList", ""))  # fmt: skip


def cancel(number: str) -> None:
    """Cancel a job, waiting or running."""
    _check(_call(["scancel", number]), f"cancel job {number}")


def requeue(number: str) -> None:
    """Put a running job back into the queue; it ends where it runs."""
    _check(_call(["scontrol", "requeue", number]), f"requeue job {number}")


def steps(number: str) -> list[str]:
    """What `srun` started within a job and has not ended, such as `12.0`."""
    listed = _call(["squeue", "--steps", "--noheader", "--format=%i", f"--jobs={number}"])
    return [step for step in listed.stdout.split() if step.split(".")[-1].isdigit()]


def kill_steps(number: str) -> None:
    """Kill what `srun` started within a job; the batch script goes on."""
    for step in steps(number):
        _call(["scancel", "--signal=KILL", step])


def hosts(nodes: str) -> list[str]:
    """The names in a list such as `n[1-3,7]`."""
    done = _check(_call(["scontrol", "show", "hostnames", nodes]), f"expand {nodes}")
    return done.stdout.split()


def nodes(named: str) -> list[Node]:
    """The nodes in a list such as `n[1-3,7]`, in that order."""
    names = hosts(named)
    done = _check(_call(["scontrol", "show", "node", named, "-o"]), f"look up {named}")
    found = (dict(re.findall(r"(\w+)=(\S*)", line)) for line in done.stdout.splitlines() if line.strip())
    facts = {node["NodeName"]: node for node in found}
    known = [facts.get(name, {}) for name in names]
    # a node tells its port where it is not that of all
    usual = 0 if all("Port" in node for node in known) else _usual_port()
    return [Node(name, node.get("NodeAddr", name), int(node.get("Port", usual))) for name, node in zip(names, known)]


def answers(node: Node) -> bool:
    """Whether a node's own daemon, which starts what `srun` asks for, takes a call."""
    try:
        socket.create_connection((node.address, node.port), timeout=_CALL_S).close()
    except OSError:
        return False
    return True


def _usual_port() -> int:
    done = _check(_call(["scontrol", "show", "config"]), "tell its configuration")
    found = re.search(r"SlurmdPort\s*=\s*(\d+)", done.stdout)
    return int(found.group(1)) if found else _SLURMD_PORT


def _call(words: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except FileNotFoundError:
        raise ConfigError(f"there is no {words[0]} on this machine; is Slurm installed here?") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"`{words[0]}` has not answered for {_PATIENCE_S:.0f} s; is the controller up?") from None


def _check(done: subprocess.CompletedProcess[str], what: str) -> subprocess.CompletedProcess[str]:
    if done.returncode:
        raise SlurmError(f"Slurm could not {what}: {_said(done)}")
    return done


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return "; ".join(lines) or f"exit code {done.returncode}"


def inside() -> str | None:
    """The number of the job that this process is part of."""
    return os.environ.get("SLURM_JOB_ID")
