"""A run's ranks on this machine: processes, watched through shared memory. None is left behind.

Ranks die with the process that starts them (the kernel sees to that), and whatever they leave behind is adopted by it
and ended. No torch here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.config import LaunchConfig
from launcher.network import free_port
from launcher.team import Team, common_environment, forget_exits, threads_of
from pretrain.health import Beat, heartbeat_file, read_heartbeat
from pretrain.run_folder import RunFolder

_LEFTOVER_S = 3.0


@dataclass
class _Rank:
    """One process."""

    number: int
    process: subprocess.Popen[bytes]


class LocalTeam(Team):
    """One process a rank."""

    def __init__(self, folder: RunFolder, launch: LaunchConfig) -> None:
        super().__init__(folder, launch)
        self._ranks: list[_Rank] = []
        self._heartbeats = Path()

    @property
    def place(self) -> str:
        return socket.gethostname()

    def start(self, attempt: int, fence: int) -> None:
        """Each rank in a session of its own, its output in its log."""
        if not self._ranks:
            self._heartbeats = Path(tempfile.mkdtemp(prefix="leviathan-"))
            _adopt_orphans()
        common = common_environment(self.world, attempt, fence) | {
            "LOCAL_SIZE": str(self.world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port("127.0.0.1")),
            "LEVIATHAN_HEARTBEAT": str(self._heartbeats),
            "LEVIATHAN_PARENT": str(os.getpid()),
            # all ranks are here: a host name that resolves to nothing useful must not matter
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        }
        forget_exits(self.folder, self.world)
        self._ranks = []
        for number in range(self.world):
            heartbeat_file(self._heartbeats, number).unlink(missing_ok=True)
            environment = threads_of(self.world) | os.environ | common
            environment |= {"RANK": str(number), "LOCAL_RANK": str(number)}
            with open(self.folder.log_of(number), "ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "pretrain.run", str(self.folder.path)],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._ranks.append(_Rank(number, process))

    def ended(self) -> dict[int, int]:
        codes = {rank.number: rank.process.poll() for rank in self._ranks}
        return {number: code for number, code in codes.items() if code is not None}

    def beats(self) -> dict[int, Beat | None]:
        return {rank.number: read_heartbeat(self._heartbeats, rank.number) for rank in self._ranks}

    def frozen(self) -> set[int]:
        return {rank.number for rank in self._ranks if _is_stopped(rank.process.pid)}

    def host(self, number: int) -> str:
        return socket.gethostname()

    def who(self, number: int) -> str:
        return f"rank {number} (pid {self._ranks[number].process.pid}, host {socket.gethostname()})"

    def send(self, number: int) -> None:
        for rank in self._ranks:
            if rank.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.process.pid, number)

    def end(self) -> None:
        """What ranks left behind has a moment to finish by itself."""
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

    def close(self) -> None:
        if self._ranks:
            shutil.rmtree(self._heartbeats, ignore_errors=True)


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def _adopt_orphans() -> None:
    """Have processes whose parent dies become children of this one, so that none escapes."""
    if sys.platform.startswith("linux"):
        pr_set_child_subreaper = 36
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)
