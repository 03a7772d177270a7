"""Who of all ranks died first and of what, and who hangs: judged the same wherever ranks are."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Mapping, Set
from dataclasses import dataclass

from launcher.config import LaunchConfig
from pretrain.health import Beat
from pretrain.run_folder import RunFolder

EXPLAINED = (2, 65, 70, 78)
"""Codes of a rank that knew why it ended, and left a note."""


@dataclass(frozen=True)
class Silent:
    """A rank without a sign of life for longer than it may be."""

    rank: int
    age_s: float


def first_cause(dead: Mapping[int, int]) -> int:
    """Which of the ranks that ended badly made the others fail: a killed one, or one that knew why, goes first.

    dead: exit codes by rank, -n for a death by signal n.
    """
    causes = [number for number, code in dead.items() if not collateral(code)]
    killed = [number for number in causes if dead[number] < 0]
    return (killed or causes or list(dead))[0]


def collateral(code: int) -> bool:
    """Whether a rank may have ended so only because another did: with any error, or aborted by what connects ranks."""
    return code == -signal.SIGABRT if code < 0 else code not in EXPLAINED


def signal_name(number: int) -> str:
    """A signal for people; those for real-time programs have no names."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def describe(folder: RunFolder, number: int, who: str, code: int, beat: Beat | None) -> str:
    """How a rank ended, in a sentence. who: the rank for people; code: as in `first_cause`."""
    where = f"in phase {beat.phase!r} of step {beat.step}" if beat else "before its first sign of life"
    if code < 0:
        name = signal_name(-code)
        hint = " (the kernel does that when memory runs out: see `dmesg`)" if name == "SIGKILL" else ""
        return f"{who} died {where}: {name}{hint}"
    with contextlib.suppress(OSError, ValueError):
        note = json.loads(folder.exit_of(number).read_bytes())
        return str(note["message"]) if code in EXPLAINED else f"{who} failed {where}: {note['message']}"
    return f"{who} ended {where} with exit code {code}; see {folder.log_of(number)}"


def longest_silent(
    beats: Mapping[int, Beat | None], frozen: Set[int], since_start_s: float, launch: LaunchConfig
) -> Silent | None:
    """The rank that hangs, if one does. frozen: ranks that somebody has stopped."""
    # a rank within a step may only wait for one that still fetches its data: none is judged before the most patient
    patience = max((_limit(beat, launch) for beat in beats.values()), default=0.0)
    oldest: Silent | None = None
    for number, beat in beats.items():
        age = beat.age_s if beat else since_start_s
        limit = min(patience, launch.hang_s) if number in frozen else patience
        if age > limit and (oldest is None or age > oldest.age_s):
            oldest = Silent(number, age)
    return oldest


def hang(who: str, age_s: float, beat: Beat | None, folder: RunFolder) -> str:
    """That a rank hangs, in a sentence."""
    where = f"(last: {beat.phase} of step {beat.step})" if beat else "(it never began)"
    return f"{who}: no progress for {age_s:.0f} s {where}; stacks of all ranks are in {folder.logs}"


def _limit(beat: Beat | None, launch: LaunchConfig) -> float:
    if beat is None or beat.phase != "step" or beat.step_s == 0.0:
        return launch.start_s
    return max(launch.hang_s, 5 * beat.step_s)
