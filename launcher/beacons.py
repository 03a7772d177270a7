"""What ranks on other hosts tell by their beacons (pretrain/beacon.py)."""

from __future__ import annotations

import secrets
import socket
import struct
import time

from launcher.network import family_of
from pretrain.beacon import NONCE_BYTES, RECORD
from pretrain.health import PHASES, Beat

_BUFFER_BYTES = 4 << 20
"""Thousands of ranks tell something every second, and are read twice a second."""


class Beacons:
    """Listens at one address of this host."""

    def __init__(self, host: str, world: int) -> None:
        self._world, self._nonce = world, b""
        self._socket = socket.socket(family_of(host), socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        self._socket.setblocking(False)
        self._socket.bind((host, 0))
        self._host = host
        self._heard: dict[int, tuple[float, Beat]] = {}
        self.strangers = 0
        """Datagrams that were of no rank of this attempt."""

    def next_attempt(self) -> str:
        """Forget all ranks; return where those of the next attempt are to tell."""
        self._nonce, self._heard = secrets.token_bytes(NONCE_BYTES), {}
        return f"{self._host}:{self._socket.getsockname()[1]}:{self._nonce.hex()}"

    def beats(self) -> dict[int, Beat | None]:
        """The last sign of life of every rank, aged by the time since it was heard."""
        self._listen()
        now = time.monotonic()
        beats: dict[int, Beat | None] = dict.fromkeys(range(self._world))
        for rank, (heard, beat) in self._heard.items():
            beats[rank] = Beat(beat.age_s + now - heard, beat.step, beat.phase, beat.step_s)
        return beats

    def silent(self, seconds: float) -> set[int]:
        """Ranks that told something once, and nothing for so long: stopped, or cut off."""
        self._listen()
        now = time.monotonic()
        return {rank for rank, (heard, _) in self._heard.items() if now - heard > seconds}

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()

    def _listen(self) -> None:
        while True:
            try:
                data = self._socket.recv(RECORD.size + 1)
            except BlockingIOError:
                return
            try:
                nonce, rank, age_s, step, phase, step_us = RECORD.unpack(data)
            except struct.error:
                nonce, rank, phase = b"", 0, 0
            if nonce != self._nonce or rank >= self._world or not 0 <= phase < len(PHASES):
                self.strangers += 1
                continue
            self._heard[rank] = (time.monotonic(), Beat(age_s, step, PHASES[phase], step_us / 1e6))
