"""What ranks on other hosts tell by their beacons (pretrain/beacon.py)."""

from __future__ import annotations

import secrets
import socket
import struct
import threading
import time

from launcher.network import family_of
from pretrain.beacon import NONCE_BYTES, RECORD
from pretrain.health import PHASES, Beat

_BUFFER_BYTES = 4 << 20
"""What Linux grants of it may hold no more than five hundred datagrams, so a thread takes them as they come."""
_LOOK_S = 0.2


class Beacons:
    """Listens at one address of this host, in a thread of its own until it is closed."""

    def __init__(self, host: str, world: int) -> None:
        self._world, self._nonce = world, b""
        self._socket = socket.socket(family_of(host), socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        self._socket.settimeout(_LOOK_S)
        self._socket.bind((host, 0))
        self._host = host
        self._heard: dict[int, tuple[float, Beat]] = {}
        self.strangers = 0
        """Datagrams that were of no rank of this attempt."""
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="beacons")
        self._thread.start()

    def next_attempt(self) -> str:
        """Forget all ranks; return where those of the next attempt are to tell."""
        with self._lock:
            self._nonce, self._heard = secrets.token_bytes(NONCE_BYTES), {}
        return f"{self._host}:{self._socket.getsockname()[1]}:{self._nonce.hex()}"

    def beats(self) -> dict[int, Beat | None]:
        """The last sign of life of every rank, aged by the time since it was heard."""
        now, beats = time.monotonic(), dict[int, Beat | None].fromkeys(range(self._world))
        for rank, (heard, beat) in self._so_far().items():
            beats[rank] = Beat(beat.age_s + now - heard, beat.step, beat.phase, beat.step_s)
        return beats

    def silent(self, seconds: float) -> set[int]:
        """Ranks that told something once, and nothing for so long: stopped, or cut off."""
        now = time.monotonic()
        return {rank for rank, (heard, _) in self._so_far().items() if now - heard > seconds}

    def close(self) -> None:
        """Listen no more."""
        self._over.set()
        self._thread.join()
        self._socket.close()

    def _so_far(self) -> dict[int, tuple[float, Beat]]:
        with self._lock:
            return dict(self._heard)

    def _listen(self) -> None:
        while not self._over.is_set():
            try:
                data = self._socket.recv(RECORD.size + 1)
            except TimeoutError:
                continue
            with self._lock:
                self._take(data)

    def _take(self, data: bytes) -> None:
        try:
            nonce, rank, age_s, step, phase, step_us = RECORD.unpack(data)
        except struct.error:
            nonce, rank, phase = b"", 0, 0
        if nonce != self._nonce or rank >= self._world or not 0 <= phase < len(PHASES):
            self.strangers += 1
            return
        self._heard[rank] = (time.monotonic(), Beat(age_s, step, PHASES[phase], step_us / 1e6))
