"""Signs of life and of trouble: heartbeats, requests to stop, and the judge of skipped steps. No torch here."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from configs.errors import CannotGoOnError
from pretrain.beacon import Beacon, Told

PHASES = ("start", "restore", "data", "step", "save", "evaluate", "end")
_RECORD = struct.Struct("<dqqq")  # monotonic seconds, step, phase, median step in microseconds
_STOP_POLL_S = 1.0


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a rank.

    age_s: seconds since then. step: the step it was at. phase: what it was doing. step_s: a step's usual time.
    """

    age_s: float
    step: int
    phase: str
    step_s: float


class Heartbeat:
    """A few bytes of shared memory that a rank writes at every phase and its supervisor reads.

    Where the supervisor is on another host, a beacon tells it the same.
    """

    def __init__(self, path: Path | None) -> None:
        self._map: mmap.mmap | None = None
        self._step_us = 0
        self._began = 0.0
        self._last: Told = (time.monotonic(), 0, 0, 0)
        if path is not None:
            path.write_bytes(bytes(_RECORD.size))
            with open(path, "r+b") as file:
                self._map = mmap.mmap(file.fileno(), _RECORD.size)

    @classmethod
    def from_environment(cls, rank: int) -> Heartbeat:
        """Where the supervisor watches; nowhere if there is none."""
        folder = os.environ.get("LEVIATHAN_HEARTBEAT")
        heartbeat = cls(heartbeat_file(Path(folder), rank) if folder else None)
        Beacon.from_environment(rank, lambda: heartbeat._last)
        return heartbeat

    def at(self, phase: str, step: int) -> None:
        """Tell that `phase` of `step` begins."""
        now = time.monotonic()
        if phase == "data":
            if self._began:
                took = int((now - self._began) * 1e6)
                # a slow average: one long step (a save, an evaluation) must not blind the watch
                self._step_us = took if not self._step_us else self._step_us + (took - self._step_us) // 16
            self._began = now
        self._last = (now, step, PHASES.index(phase), self._step_us)
        if self._map is not None:
            _RECORD.pack_into(self._map, 0, *self._last)


def heartbeat_file(folder: Path, rank: int) -> Path:
    """Where a rank's heartbeat lies."""
    return folder / f"rank_{rank:05d}"


def read_heartbeat(folder: Path, rank: int) -> Beat | None:
    """A rank's last sign of life; None before the first."""
    try:
        data = heartbeat_file(folder, rank).read_bytes()
    except FileNotFoundError:
        return None
    if len(data) < _RECORD.size:
        return None
    at, step, phase, step_us = _RECORD.unpack(data)
    return Beat(time.monotonic() - at, step, PHASES[phase], step_us / 1e6) if at else None


class StopRequests:
    """What asks this process to leave: SIGTERM and SIGUSR1 (preempted), SIGINT or a file (stopped by somebody)."""

    def __init__(self, file: Path | None = None) -> None:
        self.preempted = self.interrupted = False
        self._file, self._looked = file, 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._preempt)
        signal.signal(signal.SIGINT, self._interrupt)

    def poll(self) -> tuple[bool, bool]:
        """(preempted, interrupted), looking for the file at most once a second."""
        now = time.monotonic()
        if self._file is not None and now - self._looked >= _STOP_POLL_S:
            self._looked = now
            self.interrupted = self.interrupted or self._file.exists()
        return self.preempted, self.interrupted

    def _preempt(self, number: int, frame: FrameType | None) -> None:
        self.preempted = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True


class SkipJudge:
    """Skipped steps in a row, and how many are too many."""

    def __init__(self, most: int) -> None:
        self._most, self.in_a_row = most, 0

    def judge(self, step: int, skipped: bool) -> None:
        """Take note of a step. Raises CannotGoOnError when more than `most` in a row were skipped."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row > self._most:
            raise CannotGoOnError(
                f"the loss or gradient was not finite in {self.in_a_row} steps in a row, up to step {step}; the last"
                " checkpoint is from before, so lower optim.lr or look at the rows named in events.jsonl, and go on"
            )
