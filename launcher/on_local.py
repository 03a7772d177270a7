"""A run on this machine: start its ranks, watch over them, start them again when one dies, leave none behind.

The supervisor imports no torch. It learns of a death from the kernel, of a hang from heartbeats in shared memory, and
of everything else from the run folder. Ranks die with it (the kernel sees to that), and whatever they leave behind is
adopted by it and ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from configs.errors import DONE, INTERRUPTED, PREEMPTED
from launcher.config import LaunchConfig
from launcher.restart import Attempt, decide
from pretrain.health import Beat, heartbeat_file, read_heartbeat
from pretrain.lease import Lease
from pretrain.run_folder import RunFolder

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that ask a run to save and leave."""

_POLL_S = 0.05
_SETTLE_S = 0.5
_LEFTOVER_S = 3.0


@dataclass
class _Rank:
    """One process."""

    number: int
    process: subprocess.Popen[bytes]
    code: int | None = None


@dataclass
class _End:
    """How an attempt ended: the code that decides, and one sentence."""

    code: int
    cause: str
    facts: dict[str, object] = field(default_factory=dict)


class LocalRun:
    """All attempts of one run on this machine."""

    def __init__(self, folder: RunFolder, launch: LaunchConfig, poll_console: Callable[[], None]) -> None:
        self._folder, self._launch, self._poll_console = folder, launch, poll_console
        self._asked: int | None = None
        self._asked_at = 0.0
        self._at_once = False
        self._ranks: list[_Rank] = []

    def run(self) -> int:
        """Run to the end; return the exit code. Raises ConfigError while another process has the run folder."""
        lease = Lease(self._folder.path)
        fence = lease.take()
        _adopt_orphans()
        self._listen()
        heartbeats = Path(tempfile.mkdtemp(prefix="leviathan-"))
        try:
            return self._attempts(fence, heartbeats)
        finally:
            self._end_all()
            shutil.rmtree(heartbeats, ignore_errors=True)
            lease.release()

    def _attempts(self, fence: int, heartbeats: Path) -> int:
        history: list[Attempt] = []
        number = self._attempts_before()
        while True:
            began = self._newest_step()
            self._start(number, fence, heartbeats)
            end = self._watch(heartbeats)
            self._end_all()
            if end.code == DONE:
                return DONE
            history.append(Attempt(began, self._newest_step(), end.code, end.cause))
            if end.code not in (PREEMPTED, INTERRUPTED):
                self._folder.event("fault", end.cause, **end.facts)
            decision = decide(history, self._launch.max_restarts)
            if self._asked is not None or decision.action == "give_up":
                code = self._asked_code() if self._asked is not None else decision.code
                self._folder.event("stop", f"stopped: {decision.reason}", code=code, step=self._newest_step())
                return code
            self._tell_restart(len(history), end)
            if not self._pause(decision.wait_s):
                return self._asked_code()
            number += 1

    def _start(self, attempt: int, fence: int, heartbeats: Path) -> None:
        """Start every rank, each in a session of its own, its output in its log."""
        world, port = self._launch.ranks, _free_port()
        self._folder.attempt = attempt
        self._folder.event("launch", f"attempt {attempt}: starting {world} ranks on {socket.gethostname()}")
        common = {
            "WORLD_SIZE": str(world),
            "LOCAL_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "LEVIATHAN_ATTEMPT": str(attempt),
            "LEVIATHAN_FENCE": str(fence),
            "LEVIATHAN_HEARTBEAT": str(heartbeats),
            "LEVIATHAN_PARENT": str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
            # all ranks are here: a host name that resolves to nothing useful must not matter
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        }
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world))}
        self._ranks = []
        for number in range(world):
            # what the last attempt left says nothing of this one
            self._folder.exit_of(number).unlink(missing_ok=True)
            heartbeat_file(heartbeats, number).unlink(missing_ok=True)
            environment = threads | os.environ | common | {"RANK": str(number), "LOCAL_RANK": str(number)}
            with open(self._folder.log_of(number), "ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "pretrain.run", str(self._folder.path)],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._ranks.append(_Rank(number, process))

    def _watch(self, heartbeats: Path) -> _End:
        """Until all ranks have ended, one has died, one hangs, or patience after a request to stop is over."""
        looked = told = 0.0
        started = time.monotonic()
        while True:
            ended = self._reap()
            if any(rank.code not in (None, DONE) for rank in self._ranks):
                return self._cause_of_death(heartbeats)
            if len(ended) == len(self._ranks):
                return _End(DONE, "done")
            now = time.monotonic()
            if self._at_once or (self._asked is not None and now - self._asked_at > self._launch.grace_s):
                waited = f"after {self._launch.grace_s:.0f} s" if not self._at_once else "at once"
                return _End(self._asked_code(), f"stopped {waited} without saving; the last checkpoint is valid")
            if now - looked > 0.5:
                looked = now
                hung = self._find_hang(heartbeats, started)
                if hung is not None:
                    return hung
            if now - told > 0.25:
                told = now
                self._poll_console()
            time.sleep(_POLL_S)

    def _reap(self) -> list[_Rank]:
        for rank in self._ranks:
            if rank.code is None:
                rank.code = rank.process.poll()
        return [rank for rank in self._ranks if rank.code is not None]

    def _cause_of_death(self, heartbeats: Path) -> _End:
        """Who died first of what: a killed rank makes its peers fail too, so deaths by signal go before exit codes."""
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline and len(self._reap()) < len(self._ranks):
            time.sleep(_POLL_S)
        dead = [rank for rank in self._ranks if rank.code not in (None, DONE)]
        killed = [rank for rank in dead if rank.code is not None and rank.code < 0 and rank.code != -signal.SIGABRT]
        explained = [rank for rank in dead if rank.code in (2, 65, 70, 78)]
        first = (killed or explained or dead)[0]
        assert first.code is not None
        code = first.code if first.code > 0 else 128 - first.code
        beat = read_heartbeat(heartbeats, first.number)
        # by a signal to this process, or by a request in the run folder that rank 0 saw
        if code in (PREEMPTED, INTERRUPTED):
            return _End(code, "stopped as asked")
        facts: dict[str, object] = {
            "rank": first.number,
            "host": socket.gethostname(),
            "step": beat.step if beat else 0,
        }
        return _End(code, self._describe(first, beat), facts)

    def _describe(self, rank: _Rank, beat: Beat | None) -> str:
        assert rank.code is not None
        where = f"in phase {beat.phase!r} of step {beat.step}" if beat else "before its first sign of life"
        who = f"rank {rank.number} (pid {rank.process.pid}, host {socket.gethostname()})"
        if rank.code < 0:
            name = signal.Signals(-rank.code).name
            hint = " (the kernel does that when memory runs out: see `dmesg`)" if name == "SIGKILL" else ""
            return f"{who} died {where}: {name}{hint}"
        with contextlib.suppress(OSError, ValueError):
            note = json.loads(self._folder.exit_of(rank.number).read_bytes())
            return note["message"] if rank.code in (2, 65, 70, 78) else f"{who} failed {where}: {note['message']}"
        return f"{who} ended {where} with exit code {rank.code}; see {self._folder.log_of(rank.number)}"

    def _find_hang(self, heartbeats: Path, started: float) -> _End | None:
        """The rank without a sign of life for longer than it may be; stacks of all are stored first."""
        beats = {rank.number: read_heartbeat(heartbeats, rank.number) for rank in self._ranks if rank.code is None}
        # a rank within a step may only wait for one that still fetches its data: none is judged before the most patient
        patience = max((self._limit(beat) for beat in beats.values()), default=0.0)
        stopped = {number for number in beats if self._is_stopped(number)}
        oldest: tuple[float, int] | None = None
        for number, beat in beats.items():
            age = beat.age_s if beat else time.monotonic() - started
            limit = min(patience, self._launch.hang_s) if number in stopped else patience
            if age > limit and (oldest is None or age > oldest[0]):
                oldest = (age, number)
        if oldest is None:
            return None
        # a stopped process hangs by itself; the others only wait for it
        number = min(stopped, default=oldest[1])
        beat, rank = beats[number], self._ranks[number]
        for other in self._ranks:
            if other.code is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other.process.pid, signal.SIGUSR2)
        time.sleep(_SETTLE_S)
        where = f"(last: {beat.phase} of step {beat.step})" if beat else "(it never began)"
        cause = (
            f"rank {number} (pid {rank.process.pid}, host {socket.gethostname()}): no progress for {oldest[0]:.0f} s"
            f" {where}; stacks of all ranks are in {self._folder.logs}"
        )
        facts: dict[str, object] = {"rank": number, "host": socket.gethostname(), "step": beat.step if beat else 0}
        return _End(128 + signal.SIGKILL, cause, facts)

    def _limit(self, beat: Beat | None) -> float:
        if beat is None or beat.phase != "step" or beat.step_s == 0.0:
            return self._launch.start_s
        return max(self._launch.hang_s, 5 * beat.step_s)

    def _is_stopped(self, number: int) -> bool:
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self._ranks[number].process.pid).status() == psutil.STATUS_STOPPED
        return False

    def _listen(self) -> None:
        for number in REQUESTS:
            signal.signal(number, self._on_signal)
        # whoever started this process may have held them back until somebody listens
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass the request on; a second Ctrl-C ends everything at once."""
        if number == signal.SIGINT and self._asked == signal.SIGINT:
            self._at_once = True
        if self._asked is None:
            self._asked, self._asked_at = number, time.monotonic()
            budget = (
                f"{signal.Signals(number).name}: finishing the step and saving (at most {self._launch.grace_s:.0f} s)"
            )
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            self._folder.event("signal", budget + again, signal=signal.Signals(number).name)
        for rank in self._ranks:
            if rank.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.process.pid, number)

    def _asked_code(self) -> int:
        return INTERRUPTED if self._asked == signal.SIGINT else PREEMPTED

    def _pause(self, seconds: float) -> bool:
        """Wait before a restart; False when asked to stop meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._asked is None:
            self._poll_console()
            time.sleep(_POLL_S)
        return self._asked is None

    def _tell_restart(self, number: int, end: _End) -> None:
        step, most = self._newest_step(), self._launch.max_restarts
        redo = max(0, int(str(end.facts.get("step", step))) - step)
        origin = f"from step {step}, {redo} steps to redo" if step else "from the beginning: nothing was saved yet"
        self._folder.event(
            "restart", f"restart {number}/{most if most is not None else '∞'} {origin}", step=step, redo=redo
        )

    def _attempts_before(self) -> int:
        """Attempts are numbered over the whole life of the run, so that readers know which line is the last."""
        launches = (record["attempt"] for record in self._folder.history() if record["event"] == "launch")
        return 1 + max(launches, default=-1)

    def _newest_step(self) -> int:
        """The step of the newest committed checkpoint; 0 where there is none."""
        return max(self._folder.committed_steps(), default=0)

    def _end_all(self) -> None:
        """Kill what is left of the ranks, then what they left behind, which had a moment to finish by itself."""
        for rank in self._ranks:
            if rank.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.process.pid, signal.SIGKILL)
        for rank in self._ranks:
            rank.process.wait()
        me = psutil.Process()
        _, alive = psutil.wait_procs(me.children(recursive=True), timeout=_LEFTOVER_S)
        for child in alive:
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(alive, timeout=_LEFTOVER_S)
        self._poll_console()


def _adopt_orphans() -> None:
    """Have processes whose parent dies become children of this one, so that none escapes."""
    if sys.platform.startswith("linux"):
        pr_set_child_subreaper = 36
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
