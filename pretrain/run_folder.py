"""The folder of one run: what lies where, its history, and its metrics.

config.yaml launch.yaml    resolved and frozen before anything starts
run.json                   run id, W&B id, code version, data fingerprint, tokenizer hash
checkpoints/step_000001200/
metrics.jsonl              one line a step           events.jsonl    starts, stops, faults, skips, checkpoints
logs/rank_00000.log        what each rank printed    logs/rank_00000.exit.json    why a rank ended
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import UsageError
from data_pipeline.files import write_whole

Record = dict[str, Any]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.attempt = int(os.environ.get("LEVIATHAN_ATTEMPT", "0"))
        """Which life of the run writes here."""
        self.config, self.launch = path / "config.yaml", path / "launch.yaml"
        self.checkpoints, self.logs = path / "checkpoints", path / "logs"
        self.metrics, self.events = path / "metrics.jsonl", path / "events.jsonl"
        self.evals = path / "evals.jsonl"
        self.wandb, self.stop_request = path / "wandb", path / "stop.request"
        self._waiting: deque[tuple[Path, Record]] = deque()
        # of events, so that a signal handler may tell one while another is being written
        self._lock = threading.RLock()

    @classmethod
    def find(cls, name: str, runs: Path = Path("runs")) -> RunFolder:
        """A run by its name under `runs`, or by the path of its folder."""
        for path in (Path(name), runs / name):
            if (path / "run.json").is_file():
                return cls(path)
        known = sorted(p.parent.name for p in runs.glob("*/run.json"))
        there = f"there is {', '.join(known[-8:])}" if known else "there is none yet; start one with `leviathan train`"
        raise UsageError(f"no run called {name!r} in {runs}/; {there}")

    def make(self) -> None:
        """Create the folder, for its owner alone."""
        old = os.umask(0o077)
        try:
            for folder in (self.path, self.checkpoints, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        finally:
            os.umask(old)

    def facts(self) -> Record:
        """What run.json says; empty for a run that has not begun."""
        try:
            return json.loads((self.path / "run.json").read_bytes())
        except FileNotFoundError:
            return {}

    def set_facts(self, **facts: Any) -> None:
        """Add to run.json."""
        known = self.facts()
        if known | facts != known:
            write_whole(self.path / "run.json", json.dumps(known | facts, indent=1).encode())

    def committed_steps(self) -> list[int]:
        """Steps of all committed checkpoints, newest first; they need not be valid."""
        names = (p.name[5:] for p in self.checkpoints.glob("step_*") if p.is_dir())
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def log_of(self, rank: int) -> Path:
        """Where a rank's output goes."""
        return self.logs / f"rank_{rank:05d}.log"

    def exit_of(self, rank: int) -> Path:
        """Where a rank says why it ended."""
        return self.logs / f"rank_{rank:05d}.exit.json"

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """Add a line to the history: what happened, one sentence for people, and facts for programs."""
        record = {"time": time.time(), "attempt": self.attempt, "event": kind, "message": message, **fields}
        self.append(self.events, record)

    def append(self, path: Path, record: Record) -> None:
        """Add a line to a file of the folder. What a full disk refuses waits in memory and goes before the next one."""
        with self._lock:
            self._waiting.append((path, record))
            while self._waiting:
                oldest = self._waiting.popleft()
                try:
                    append_line(*oldest)
                except OSError as error:
                    if error.errno not in NO_ROOM:
                        raise
                    self._waiting.appendleft(oldest)
                    return

    def history(self) -> list[Record]:
        """All events so far, also those that wait for a disk with room."""
        return [*read_lines(self.events), *(record for path, record in self._waiting if path == self.events)]

    def steps(self) -> dict[int, Record]:
        """The metrics of every step, the last attempt's where it was done more than once; in order of steps."""
        rows = {row["step"]: row for row in read_lines(self.metrics)}
        return dict(sorted(rows.items()))


def counted(number: int, word: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step_{step:09d}"


def append_line(path: Path, record: Record) -> None:
    """Append one JSON line in a single write, which survives the death of this process. Raises OSError where the disk
    takes none or only a part of it; such a part does not swallow the next line."""
    line = (json.dumps(record) + "\n").encode()
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(handle, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(handle)


def read_lines(path: Path) -> Iterator[Record]:
    """Every whole JSON line of a file; a line torn by a crash is passed over, a missing file is empty."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
