"""Signs of life over the network: where the supervisor is on another host, a rank tells it once a second where it is.

Datagrams: none is waited for, and a lost one is followed by the next. Each carries the attempt's nonce, so that a rank
of an earlier attempt, or a stranger, is never taken for one of this. Ages are measured by the sender, so no two clocks
are ever compared.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable

NONCE_BYTES = 16
RECORD = struct.Struct(f"<{NONCE_BYTES}sIdqqq")
"""nonce, rank, seconds since the last sign of life, step, phase, a step's usual time in microseconds"""
EVERY_S = 1.0

Told = tuple[float, int, int, int]
"""monotonic seconds, step, phase, microseconds"""


class Beacon:
    """Sends until it is closed. where: host:port:nonce, the nonce in hexadecimal; last: what there is to tell."""

    def __init__(self, where: str, rank: int, last: Callable[[], Told]) -> None:
        host, port, nonce = where.rsplit(":", 2)
        self._to, self._nonce, self._rank, self._last = (host, int(port)), bytes.fromhex(nonce), rank, last
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        threading.Thread(target=self._run, daemon=True, name="beacon").start()

    @classmethod
    def from_environment(cls, rank: int, last: Callable[[], Told]) -> Beacon | None:
        """A beacon, where a supervisor listens."""
        where = os.environ.get("LEVIATHAN_BEACON")
        return cls(where, rank, last) if where else None

    def _run(self) -> None:
        while True:
            at, *rest = self._last()
            with contextlib.suppress(OSError):
                self._socket.sendto(RECORD.pack(self._nonce, self._rank, time.monotonic() - at, *rest), self._to)
            time.sleep(EVERY_S)
