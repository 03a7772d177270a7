"""What a run folder says of its run: whether it lives and where, how far it is, how its last attempt ended.

Only files are read, so this works beside a run that goes on, after one that was killed, and from another machine that
sees the folder.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configs.errors import INTERRUPTED, PREEMPTED, ConfigError
from launcher.jobs import Job, job_of
from pretrain.lease import RENEW_S, STALE_S, Lease
from pretrain.run_folder import Record, RunFolder

TAIL_BYTES = 1 << 16
LONG_DEAD_S = 600.0
"""A lease from another host that is older than this is dead: no two clocks of a cluster differ so much."""

What = Literal["running", "waiting", "done", "stopped", "failed", "killed", "never began"]


@dataclass(frozen=True)
class Owner:
    """The process that has a run folder. since: seconds since the epoch."""

    host: str
    pid: int
    since: float

    @property
    def here(self) -> bool:
        """Whether it runs on this host."""
        return self.host == socket.gethostname()


@dataclass(frozen=True)
class State:
    """One run at one moment.

    ending: the event that ended the last attempt, if one did. row: the newest metrics. rate: steps a second of late.
    active: when the run last told anything, in seconds since the epoch. job: the one in a queue that is to begin it, or
    to go on with it.
    """

    folder: RunFolder
    what: What
    owner: Owner | None
    history: list[Record]
    ending: Record | None
    row: Record | None
    rate: float | None
    total: int | None
    active: float
    job: Job | None = None

    @property
    def step(self) -> int:
        """Steps done by now."""
        return self.row["step"] if self.row is not None else 0

    @property
    def saved(self) -> int:
        """The step of the newest checkpoint; 0 where there is none."""
        return max(self.folder.committed_steps(), default=0)

    @property
    def left_s(self) -> float | None:
        """Seconds to the last step at the pace of late."""
        if self.what != "running" or not self.rate or self.total is None:
            return None
        return max(0, self.total - self.step) / self.rate


def read_state(folder: RunFolder, owner: Owner | None) -> State:
    """The state of a run whose folder `owner` has."""
    history, rows, facts = folder.history(), tail(folder.metrics), folder.facts()
    last_launch = max((n for n, event in enumerate(history) if event["event"] == "launch"), default=None)
    now = history[last_launch or 0 :]
    # beyond the newest line lie steps of a dead attempt, so only that line counts
    row = rows[-1] if rows else None
    ending = next((event for event in reversed(now) if event["event"] in ("done", "stop")), None)
    active = max([facts.get("created", 0.0), *(record["time"] for record in (*history[-1:], *rows[-1:]))])
    job = queued_job(folder, history) if owner is None else None
    what = _what(owner, last_launch is not None or ending is not None, ending, job)
    return State(folder, what, owner, history, ending, row, _rate(rows), facts.get("steps"), active, job)


def queued_job(folder: RunFolder, history: Sequence[Record]) -> Job | None:
    """The job that a run was last submitted as, or queued again, where it has not begun yet; as the queue has it."""
    last = next((event for event in reversed(history) if event["event"] in ("submit", "requeue", "launch")), None)
    return None if last is None or last["event"] == "launch" else job_of(folder)


def _what(owner: Owner | None, begun: bool, ending: Record | None, job: Job | None) -> What:
    if owner is not None:
        return "running"
    if job is not None and not job.over:
        return "waiting"
    if not begun:
        return "never began"
    if ending is None:
        return "killed"
    if ending["event"] == "done":
        return "done"
    return "stopped" if ending.get("code") in (PREEMPTED, INTERRUPTED) else "failed"


def owners(folders: Sequence[RunFolder], *, surely: bool = False) -> dict[str, Owner]:
    """Who has each of these folders, by its path; folders that nobody has are left out.

    A process of this host is looked up. Another host's lease was renewed lately, or is watched for as long as a
    renewal takes, all of them together. surely: watch also those that were renewed lately.
    """
    found: dict[str, Owner] = {}
    doubtful: dict[str, tuple[RunFolder, Record]] = {}
    for folder in folders:
        held, age = _lease(folder)
        if not held.get("host"):
            continue
        owner = Owner(held["host"], held["pid"], held["since"])
        if owner.here:
            if Lease(folder.path).owner() is not None:
                found[str(folder.path)] = owner
        elif age < STALE_S and not surely:
            found[str(folder.path)] = owner
        elif age < LONG_DEAD_S:
            doubtful[str(folder.path)] = (folder, held)
    deadline = time.monotonic() + 1.5 * RENEW_S
    while doubtful and time.monotonic() < deadline:
        time.sleep(0.25)
        for path, (folder, before) in list(doubtful.items()):
            held, _ = _lease(folder)
            if held.get("host") and held != before:
                found[path] = Owner(held["host"], held["pid"], held["since"])
                del doubtful[path]
    return found


def check_not_in_use(folder: RunFolder) -> None:
    """Raise ConfigError while a process has the run folder; what somebody left a moment ago is not in use."""
    owner = owners([folder], surely=True).get(str(folder.path))
    if owner is not None:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.since))
        raise ConfigError(
            f"run folder {folder.path} is in use by process {owner.pid} on {owner.host} since {since};"
            f" stop it with `leviathan stop {folder.name}` or choose another run.name"
        )


def state_of(name: str, under: Path = Path("runs")) -> State:
    """The state of the run that `name` names: a folder, or one below `under`."""
    folder = RunFolder.find(name, under)
    return read_state(folder, owners([folder]).get(str(folder.path)))


def newest_row(folder: RunFolder) -> Record | None:
    """The newest line of metrics.jsonl."""
    rows = tail(folder.metrics)
    return rows[-1] if rows else None


def attempts_before(folder: RunFolder) -> int:
    """How many attempts a run has had: they are numbered over all its life, so that readers know which is the last."""
    launches = (record["attempt"] for record in folder.history() if record["event"] == "launch")
    return 1 + max(launches, default=-1)


def exit_notes(state: State) -> list[Record]:
    """What the ranks of the last attempt wrote when they ended in trouble, by rank."""
    attempt = max((event["attempt"] for event in state.history if event["event"] == "launch"), default=0)
    notes = []
    for path in sorted(state.folder.logs.glob("rank_*.exit.json")):
        try:
            note = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if note.get("attempt") == attempt and note.get("code"):
            notes.append(note)
    return notes


def tail(path: Path, size: int = TAIL_BYTES) -> list[Record]:
    """The whole JSON lines among the last `size` bytes of a file; a missing file is empty."""
    records = []
    for line in tail_text(path, size).splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict)]


def tail_text(path: Path, size: int) -> str:
    """The whole lines among the last `size` bytes of a file; a missing file is empty."""
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            file.seek(max(0, length - size))
            text = file.read()
    except FileNotFoundError:
        return ""
    if length > size:
        text = text[text.find(b"\n") + 1 :]
    return text.decode("utf-8", "replace")


def _rate(rows: list[Record]) -> float | None:
    """Steps a second over the last rows of one attempt, checkpoints and evaluations included."""
    recent = [row for row in rows if row["attempt"] == rows[-1]["attempt"]][-100:]
    if len(recent) < 2 or recent[-1]["time"] <= recent[0]["time"]:
        return None
    return (recent[-1]["step"] - recent[0]["step"]) / (recent[-1]["time"] - recent[0]["time"])


def _lease(folder: RunFolder) -> tuple[dict[str, Any], float]:
    """What the lease of a run folder says, and how many seconds ago it was written."""
    path = folder.path / "lease.json"
    try:
        return json.loads(path.read_bytes()), abs(time.time() - path.stat().st_mtime)
    except (OSError, ValueError):
        return {}, 0.0
