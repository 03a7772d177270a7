"""Named places where tests make real faults happen: a signal to this process, never an exception.

LEVIATHAN_FAULT="point:rank:step[:action],..." - the n-th entry is armed in the n-th attempt of a run, so that a fault
does not strike again when its step is done once more. Actions: kill (default), stop, nan, sleep=SECONDS, until=PATH.
The last is a rest of at most five minutes, which ends a second after there is such a file. Its path has no `:` and no
`,`, and an attempt whose file an earlier one has waited for does not rest again.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

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
_REST_S, _LOOK_S, _ARRIVES_S = 300.0, 0.05, 1.0


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
    elif fault.action.startswith("until="):
        _rest_until(Path(fault.action[6:]))


def _rest_until(file: Path) -> None:
    """Rest until a file is there, or for too long."""
    end = time.monotonic() + _REST_S
    while not file.exists():
        if time.monotonic() > end:
            return
        time.sleep(_LOOK_S)
    time.sleep(_ARRIVES_S)  # what a run was asked before there was the file may still be on its way to this rank


def poisoned(step: int) -> bool:
    """Whether this rank's loss of this step is to become NaN (action `nan`)."""
    fault = armed()
    return (
        fault is not None
        and fault.action == "nan"
        and fault.step == step
        and fault.rank == int(os.environ.get("RANK", 0))
    )
