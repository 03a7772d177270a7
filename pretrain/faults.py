"""Named places where tests make real faults happen: a signal to this process, never an exception.

LEVIATHAN_FAULT="point:rank:step[:action],..." - the n-th entry is armed in the n-th attempt of a run, so that a fault
does not strike again when its step is done once more. Actions: kill (default), stop, sleep=SECONDS, nan.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from functools import lru_cache

POINTS = (
    "step.before_forward",
    "step.before_update",
    "save.begin",
    "save.after_file",
    "save.before_manifest",
    "save.before_commit",
    "save.after_commit",
    "restore.begin",
    "restore.middle",
    "prune.middle",
)


@dataclass(frozen=True)
class Fault:
    """What happens where, to whom, when."""

    point: str
    rank: int
    step: int
    action: str


@lru_cache(maxsize=1)
def armed() -> Fault | None:
    """The fault of this attempt, from the environment of this process."""
    text = os.environ.get("LEVIATHAN_FAULT", "")
    attempt = int(os.environ.get("LEVIATHAN_ATTEMPT", "0"))
    entries = text.split(",") if text else []
    if attempt >= len(entries) or not entries[attempt]:
        return None
    point, rank, step, action = (entries[attempt] + ":kill").split(":")[:4]
    if point not in POINTS:
        raise ValueError(f"LEVIATHAN_FAULT names {point!r}; the points are {', '.join(POINTS)}")
    return Fault(point, int(rank), int(step), action)


def fault_point(point: str, step: int) -> None:
    """Let the armed fault happen if this is its place."""
    fault = armed()
    if fault is None or fault.point != point or fault.step != step or fault.rank != int(os.environ.get("RANK", 0)):
        return
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.action.startswith("sleep="):
        time.sleep(float(fault.action[6:]))


def poisoned(step: int) -> bool:
    """Whether this rank's loss of this step is to become NaN (action `nan`)."""
    fault = armed()
    return (
        fault is not None
        and fault.action == "nan"
        and fault.step == step
        and fault.rank == int(os.environ.get("RANK", 0))
    )
