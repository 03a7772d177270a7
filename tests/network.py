"""Nodes on this machine that are as far apart as real ones: own network, host name, processes, /dev/shm and /tmp/ray.

A bridge joins them; the rest of the file system they share, as nodes share a cluster's disk. Names of other nodes do
not resolve, and a node's own name is loopback, as Debian writes it: only what is found by addresses works.
It needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

NEEDED = ("ip", "nsenter", "unshare")
_HERE, _PATIENCE_S = 254, 20.0
_NET_ADMIN, _SYS_ADMIN = 12, 21
_BEGIN = """
hostname "$1" && mount --bind "$2/hosts" /etc/hosts && mount --bind "$2/resolv.conf" /etc/resolv.conf &&
mount -t tmpfs none /dev/shm &&
mkdir -p /tmp/ray && mount --bind "$2/ray" /tmp/ray && shift 2 && "$@"
exit $?
"""
"""A shell stays as the node's first process: what becomes an orphan there needs somebody to reap it."""


def missing() -> str | None:
    """Why there can be no such nodes here; None where there can."""
    if os.geteuid() != 0:
        return "nodes of the tests' own need root"
    without = [name for name in NEEDED if shutil.which(name) is None]
    if without:
        return f"there is no {', '.join(without)}; install iproute2 and util-linux"
    may = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    if any(not int(may.split()[1], 16) >> capability & 1 for capability in (_NET_ADMIN, _SYS_ADMIN)):
        return "nodes of the tests' own need the capabilities NET_ADMIN and SYS_ADMIN"
    return None


class Network:
    """Use it in `with`: node 1, 2, ... can be started then, n1, n2, ... by name; all are gone afterwards."""

    def __init__(self, nodes: int) -> None:
        self._numbers = range(1, nodes + 1)
        self._folder = Path(tempfile.mkdtemp(prefix="network-"))
        self._subnet, self._tag = _take_subnet()
        self._machines: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Network:
        try:
            self._build()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in self._machines:
            self.kill(number)
        for number in self._numbers:
            # a name space lives on while the kernel still tries to reach somebody from it
            _ip("link", "del", self._cable(number), check=False)
            _ip("netns", "del", self._space(number), check=False)
        _ip("link", "del", self._bridge, check=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    def address(self, number: int = _HERE) -> str:
        """Of a node, or of this machine on their network."""
        return f"{self._subnet}.{number}"

    def address6(self, number: int) -> str:
        """The same in IPv6."""
        return f"fd77:{self._tag[2:]}::{number}"

    def start(
        self, number: int, words: Sequence[str], env: Mapping[str, str], out: IO[bytes] | None = None
    ) -> subprocess.Popen[bytes]:
        """Switch a node on, with a command that it lives for; it ends when the command does."""
        self.mend(number)
        # every start is a boot: a node that was up longer than its jobs would seem never to have gone down
        boot = f"--boottime=-{int(time.clock_gettime(time.CLOCK_BOOTTIME)) - 1}"
        alone = ["unshare", "--uts", "--ipc", "--pid", "--time", boot, "--mount", "--mount-proc", "--fork",
                 "--kill-child"]  # fmt: skip
        begin = ["sh", "-c", _BEGIN, "sh", f"n{number}", str(self._folder / f"n{number}"), *words]
        process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self._space(number)}", *alone, *begin], env=dict(env),
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
        self._machines[number] = process
        return process

    def inside(self, number: int, words: Sequence[str]) -> list[str]:
        """A command as one more process of a node that is on."""
        (first,) = psutil.Process(self._machines[number].pid).children()
        return ["nsenter", f"--target={first.pid}", "--net", "--uts", "--ipc", "--pid", "--time", "--mount", *words]

    def processes(self, number: int) -> list[psutil.Process]:
        """All processes of a node."""
        try:
            return psutil.Process(self._machines[number].pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kill(self, number: int) -> None:
        """End a node as a power cut would: nobody is told, not even by a connection that closes."""
        self.cut(number)
        machine, others = self._machines[number], self.processes(number)
        machine.send_signal(signal.SIGKILL)
        machine.wait(_PATIENCE_S)
        _, left = psutil.wait_procs(others, _PATIENCE_S)
        assert not left, f"n{number} is dead, but not {left}"

    def cut(self, number: int) -> None:
        """Pull a node's cable."""
        _ip("link", "set", self._cable(number), "down")

    def mend(self, number: int) -> None:
        """Plug it in again."""
        _ip("link", "set", self._cable(number), "up")

    def part(self, number: int, other: int) -> None:
        """Let one node not reach another, while all else works."""
        _ip("-n", self._space(number), "route", "add", "blackhole", f"{self.address(other)}/32")

    def mute(self, number: int, port: int) -> None:
        """Let nobody get an answer from a port of a node, which itself reaches whom it calls."""
        _ip("-n", self._space(number), "rule", "add", *_from_port(port))

    def unmute(self, number: int, port: int) -> None:
        """Let its answers through again."""
        _ip("-n", self._space(number), "rule", "del", *_from_port(port))

    def _build(self) -> None:
        _ip("addr", "add", f"{self.address()}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for number in self._numbers:
            space, cable, place = self._space(number), self._cable(number), self._folder / f"n{number}"
            (place / "ray").mkdir(parents=True)
            (place / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 n{number}\n")
            # nobody answers there, and says so at once: this machine's own server may be out of reach, which costs 10 s
            (place / "resolv.conf").write_text("nameserver 127.0.0.1\n")
            _ip("netns", "add", space)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", cable, "master", self._bridge, "up")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
            _ip("-n", space, "-6", "addr", "add", f"{self.address6(number)}/64", "dev", "eth0", "nodad")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "route", "add", "default", "via", self.address())

    @property
    def _bridge(self) -> str:
        return f"{self._tag}b"

    def _cable(self, number: int) -> str:
        return f"{self._tag}v{number}"

    def _space(self, number: int) -> str:
        return f"{self._tag}n{number}"


def _from_port(port: int) -> tuple[str, ...]:
    return "ipproto", "tcp", "sport", str(port), "blackhole"


def _take_subnet() -> tuple[str, str]:
    """The beginning of addresses that nobody here has, and a tag for the names of what belongs to them."""
    number = next(number for number in count(1) if _take(number))
    return f"10.77.{number}", f"lv{number}"


def _take(number: int) -> bool:
    """Make a subnet's bridge, unless somebody has it: of two tests that look at the same moment one finds it taken."""
    taken = {entry.address for addresses in psutil.net_if_addrs().values() for entry in addresses}
    if f"10.77.{number}.{_HERE}" in taken:
        return False
    try:
        _ip("link", "add", f"lv{number}b", "type", "bridge")
    except RuntimeError as error:
        if "File exists" in str(error):
            return False
        raise
    return True


def _ip(*words: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True, timeout=_PATIENCE_S)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
