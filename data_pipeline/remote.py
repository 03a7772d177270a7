"""Shards from far away: each is fetched once a host, checked for size and sha256, and kept within a bound on disk.

Ranks of one host share the folder: a lock per shard makes one of them fetch while the others wait. What was fetched is
renamed into place only when it is whole and right. When the folder outgrows its bound the files used longest ago go;
a reader that still has one mapped keeps it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import queue
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from configs.errors import ConfigError, DataError
from data_pipeline.files import CHUNK, human_bytes
from data_pipeline.manifest import ShardInfo
from data_pipeline.places import open_input, public

PATIENCE_S = 120.0
"""The longest that one object may fail before the run does."""


class ShardCache:
    """The shards of one remote folder, on this host's disk."""

    def __init__(self, url: str, folder: Path, limit_bytes: int) -> None:
        self._url, self._folder, self._limit = url.rstrip("/"), folder, limit_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._wanted: queue.Queue[ShardInfo] = queue.Queue()
        self._expected: set[str] = set()
        self._thread: threading.Thread | None = None

    def locate(self, info: ShardInfo) -> Path:
        """Where the shard lies on this host, fetched if need be. Raises DataError when it cannot be had."""
        path = self._folder / info.name
        if not _whole(path, info):
            with self._only_one(path):
                if not _whole(path, info):
                    self._make_room(info.bytes, keep=path)
                    self._fetch(info, path)
        # eviction goes by the time of last use, which file systems do not keep themselves
        with contextlib.suppress(OSError):
            os.utime(path)
        return path

    def expect(self, infos: list[ShardInfo]) -> None:
        """Fetch these in the background, in this order; what goes wrong is told when they are located."""
        for info in infos:
            if info.name not in self._expected:
                self._expected.add(info.name)
                self._wanted.put(info)
        if self._thread is None and not self._wanted.empty():
            self._thread = threading.Thread(target=self._work, daemon=True, name="shard-cache")
            self._thread.start()

    def _work(self) -> None:
        while True:
            info = self._wanted.get()
            with contextlib.suppress(DataError, OSError):
                self.locate(info)
            self._expected.discard(info.name)

    def _fetch(self, info: ShardInfo, path: Path) -> None:
        """Try until the shard is right, waiting longer each time, for PATIENCE_S in all."""
        url, deadline, attempt = f"{self._url}/{info.name}", time.monotonic() + PATIENCE_S, 0
        while True:
            attempt += 1
            try:
                self._fetch_once(url, info, path)
                return
            except ConfigError:
                raise
            except (DataError, OSError) as error:
                pause = min(20.0, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
                if _is_final(error) or time.monotonic() + pause > deadline:
                    tries = f"{attempt} tries" if attempt > 1 else "one try"
                    raise DataError(f"{error} (after {tries})") from None
                time.sleep(pause)

    def _fetch_once(self, url: str, info: ShardInfo, path: Path) -> None:
        draft = path.with_name(f".{path.name}.part")
        digest, size = hashlib.sha256(), 0
        try:
            with open_input(url, None) as source, open(draft, "wb") as target:
                for piece in _pieces(source, url):
                    digest.update(piece)
                    size += len(piece)
                    if size > info.bytes:
                        break
                    target.write(piece)
            if size != info.bytes or digest.hexdigest() != info.sha256:
                raise DataError(
                    f"{public(url)} came as {size:,} bytes with sha256 {digest.hexdigest()[:12]}…, the manifest says"
                    f" {info.bytes:,} bytes with {info.sha256[:12]}…; upload the shard again"
                )
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def _make_room(self, need: int, keep: Path) -> None:
        if need > self._limit:
            raise ConfigError(
                f"one shard takes {human_bytes(need)}, but data.cache_gib allows {human_bytes(self._limit)}; raise it"
            )
        files = []
        for path in self._folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total + need <= self._limit:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size

    @contextlib.contextmanager
    def _only_one(self, path: Path) -> Iterator[None]:
        with open(path.with_name(f".{path.name}.lock"), "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def fetch_small(url: str) -> bytes:
    """A small object whole: a manifest, a tokenizer. Raises DataError when it cannot be had."""
    with open_input(url, None) as source:
        return b"".join(_pieces(source, url))


def _pieces(source: BinaryIO, url: str) -> Iterator[bytes]:
    while True:
        try:
            piece = source.read(CHUNK)
        except Exception as error:  # every store has exceptions of its own, whose texts may hold secrets
            raise DataError(f"{public(url)} broke off ({type(error).__name__}); check the network") from None
        if not piece:
            return
        yield piece


def _whole(path: Path, info: ShardInfo) -> bool:
    try:
        return path.stat().st_size == info.bytes
    except FileNotFoundError:
        return False


def _is_final(error: Exception) -> bool:
    """Whether trying again is no use: the object is not there, or may not be read."""
    text = str(error)
    return any(sign in text for sign in ("not found", "status 401", "status 403", "status 404"))
