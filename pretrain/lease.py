"""One writer per run folder: a lease that its owner renews, with a number that only grows.

The owner's process takes the lease and renews it every few seconds. A dead owner on this host is replaced at once;
another host's after `STALE_S` without renewal, judged by watching, not by clocks. Each new owner has a higher fence
number. Only a later start of the same job does not wait: the cluster has ended the earlier one, or lost sight of it. A
checkpoint is committed only under the lock and only while the lease still carries the committer's number,
so an old owner that wakes up can finish nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from configs.errors import CannotGoOnError, ConfigError
from data_pipeline.files import write_whole

RENEW_S = 5.0
STALE_S = 15.0
LOCK_S = 20.0


class Lease:
    """The right to write into a run folder. start_of_job: the job of a cluster, and which of its starts this is."""

    def __init__(self, folder: Path, start_of_job: tuple[str, int] | None = None) -> None:
        self._start_of_job = start_of_job
        self._file, self._lock = folder / "lease.json", folder / "lease.lock"
        self.fence = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> int:
        """Become the owner and keep renewing; return the fence number. Raises ConfigError while another owner lives."""
        self._wait_for_other_host()
        with self._locked():
            held = self._read()
            if held and _alive(held) and not self._follows(held):
                raise self._in_use(held)
            self.fence = int(held.get("fence", 0)) + 1
            self._write(renewals=0)
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()
        return self.fence

    def release(self) -> None:
        """Give the right back; the number stays, so that it goes on growing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._locked():
            if self._read().get("fence") == self.fence:
                # where the disk is full it stays the lease of a process that has ended, which anybody may replace
                with contextlib.suppress(OSError):
                    write_whole(self._file, json.dumps({"fence": self.fence}).encode())

    @contextlib.contextmanager
    def held(self, fence: int) -> Iterator[None]:
        """Do something that only the owner `fence` may do. Raises CannotGoOnError where it no longer is."""
        with self._locked():
            now = int(self._read().get("fence", 0))
            if now != fence:
                raise CannotGoOnError(
                    f"lost the lease on {self._file.parent} (number {fence}, now {now}): another job has taken the run"
                    " over, so this one stops and writes nothing more"
                )
            yield

    def lost(self) -> bool:
        """Whether somebody else has taken it since."""
        return bool(self._read().get("fence", self.fence) != self.fence)

    def owner(self) -> dict[str, Any] | None:
        """Who holds it now, if anybody does."""
        held = self._read()
        return held if held and _alive(held) else None

    def _wait_for_other_host(self) -> None:
        """Watch a lease from another host: renewed means in use, untouched for STALE_S means dead."""
        first = self._read()
        if not first.get("host") or first["host"] == socket.gethostname() or self._follows(first):
            return
        deadline = time.monotonic() + STALE_S
        while time.monotonic() < deadline:
            time.sleep(0.25)
            now = self._read()
            if now.get("renewals") != first.get("renewals") or now.get("fence") != first.get("fence"):
                if now.get("host"):
                    raise self._in_use(now)
                return

    def _follows(self, held: dict[str, Any]) -> bool:
        """Whether the owner is an earlier start of the same job."""
        if self._start_of_job is None:
            return False
        job, start = self._start_of_job
        return held.get("job") == job and int(held.get("start", start)) < start

    def _in_use(self, held: dict[str, Any]) -> ConfigError:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held["since"]))
        return ConfigError(
            f"run folder {self._file.parent} is in use by process {held['pid']} on {held['host']} since {since};"
            f" stop it with `leviathan stop {self._file.parent.name}` or choose another run.name"
        )

    def _renew(self) -> None:
        renewals = 0
        while not self._stop.wait(RENEW_S):
            renewals += 1
            with contextlib.suppress(OSError, ConfigError), self._locked():
                if self._read().get("fence") != self.fence:
                    return
                self._write(renewals)

    def _write(self, renewals: int) -> None:
        me = psutil.Process()
        self._since = getattr(self, "_since", time.time())
        facts = {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time(), "since": self._since}
        if self._start_of_job is not None:
            facts |= dict(zip(("job", "start"), self._start_of_job))
        write_whole(self._file, json.dumps({"fence": self.fence, "renewals": renewals, **facts}).encode())

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self._file.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        deadline = time.monotonic() + LOCK_S
        with open(self._lock, "a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno in (errno.ENOSYS, errno.ENOTSUP):
                        raise ConfigError(
                            f"{self._lock} is on a file system without locks ({error.strerror}); mount it with `flock`,"
                            " or set run.dir to another disk"
                        ) from None
                    if time.monotonic() > deadline:
                        raise ConfigError(f"{self._lock} {_not_had(error)}, and start again") from None
                    time.sleep(0.02)
            yield


def _not_had(error: OSError) -> str:
    """Why a lock could not be had, and what to do."""
    if isinstance(error, BlockingIOError):
        return f"has been locked for {LOCK_S:.0f} s by another process; see who holds it with `fuser`, end it"
    return f"could not be locked for {LOCK_S:.0f} s ({error.strerror}); see why its file system gives no locks"


def _alive(held: dict[str, Any]) -> bool:
    """Whether a lease's owner on this host lives; one on another host was watched before."""
    if held.get("host") != socket.gethostname():
        return False
    try:
        owner = psutil.Process(held["pid"])
        # one that has ended may stay in the list for a while, until its parent takes note
        return abs(owner.create_time() - held["started"]) < 0.01 and owner.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
