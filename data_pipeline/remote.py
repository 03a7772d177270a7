"""Shards from far away: each is fetched once a host, checked for size and sha256, and kept within a bound on disk.

Ranks of one host share the folder: a lock per shard makes one of them fetch while the others wait. What was fetched is
renamed into place only when it is whole and right, and what an earlier process left is hashed before its first use.
Room is taken before a fetch begins: while the folder would outgrow its bound the files used longest ago go, and a
reader that still has one mapped keeps it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import queue
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from configs.errors import ConfigError, DataError, LeviathanError
from data_pipeline.files import CHUNK, human_bytes, sha256_file
from data_pipeline.manifest import ShardInfo
from data_pipeline.places import open_input, public

T = TypeVar("T")

PATIENCE_S = 120.0
"""The longest that one object may fail before the run does, if it was tried MIN_TRIES times by then."""
SMALL_PATIENCE_S = 30.0
"""The same for a manifest and a tokenizer, for which somebody may be waiting at the keyboard."""
MIN_TRIES = 4
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 20.0
SAME_WRONG = 3
"""So often the same wrong content: it is what lies there, and no accident on the way."""
ROOM_S = 30.0
"""The longest wait for room that shards in use take."""
GRACE_S = 2.0
"""How long a shard is safe after it was located: its reader is about to open it."""

_FINAL = re.compile(
    r"cannot be (read|written) \((not found|permission denied|no credentials|status 4(?!08|25|29)\d\d)\)"
)


class _FinalError(DataError):
    """Trying again is no use."""


class ShardCache:
    """The shards of one remote folder, on this host's disk."""

    def __init__(self, url: str, folder: Path, limit_bytes: int) -> None:
        self._url, self._folder, self._limit = url, folder, limit_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir: {folder} cannot be made ({error.strerror}); choose another data.cache_dir"
            ) from None
        self._verified: dict[str, int] = {}
        """Shards whose sha256 this process has seen to be right, each with the inode of the file."""
        self._wanted: queue.Queue[ShardInfo] = queue.Queue()
        self._expected: set[str] = set()
        self._thread: threading.Thread | None = None

    def locate(self, info: ShardInfo) -> Path:
        """Where the shard lies on this host, fetched if need be, and safe there for GRACE_S.

        Raises DataError when it cannot be had.
        """
        path, since = self._folder / info.name, time.monotonic()
        try:
            while not (self._is_right(path, info) and self._touch(path)):
                with _locked(_lock_of(path)):
                    if not self._is_right(path, info):
                        path.unlink(missing_ok=True)
                        self._fetch(info, path, since)
        except OSError as error:
            raise DataError(
                f"shard {info.name} cannot be kept in {self._folder} ({error.strerror or error}); make room there, or"
                " choose another data.cache_dir"
            ) from None
        return path

    def expect(self, infos: list[ShardInfo]) -> None:
        """Fetch these in the background, in the order of need, as far as they fit together.

        What goes wrong is told when they are located.
        """
        room = self._limit
        for info in dict.fromkeys(infos):
            if info.bytes > room:
                continue  # it would push out what is needed before it
            room -= info.bytes
            if info.name not in self._expected:
                self._expected.add(info.name)
                self._wanted.put(info)
        if self._thread is None and not self._wanted.empty():
            self._thread = threading.Thread(target=self._work, daemon=True, name="shard-cache")
            self._thread.start()

    def _work(self) -> None:
        while True:
            info = self._wanted.get()
            with contextlib.suppress(LeviathanError):
                self.locate(info)
            self._expected.discard(info.name)

    def _is_right(self, path: Path, info: ShardInfo) -> bool:
        """Whether the shard lies there whole; its sha256 is computed once for each file and process."""
        try:
            stat = path.stat()
            if stat.st_size != info.bytes:
                return False
            if self._verified.get(info.name) != stat.st_ino:
                if sha256_file(path) != info.sha256:
                    return False
                self._verified[info.name] = stat.st_ino
        except FileNotFoundError:
            return False
        return True

    def _touch(self, path: Path) -> bool:
        """Note that the shard is used now, which file systems do not do themselves; False: it went in this moment."""
        with self._room_lock(), contextlib.suppress(FileNotFoundError):
            os.utime(path)
            return True
        return False

    def _fetch(self, info: ShardInfo, path: Path, since: float) -> None:
        """Try until the shard is right."""
        wrong: Counter[str] = Counter()
        patiently(lambda: self._fetch_once(info, path, wrong), since + PATIENCE_S)

    def _fetch_once(self, info: ShardInfo, path: Path, wrong: Counter[str]) -> None:
        url, draft = join(self._url, info.name), path.with_name(f".{path.name}.part")
        draft.unlink(missing_ok=True)
        self._reserve(info, draft)
        try:
            with open_input(url, None) as source, open(draft, "r+b") as target:
                digest, size = hashlib.sha256(), 0
                # one byte too many is enough to know that it is another file
                for piece in _pieces(source, url, info.bytes + 1):
                    digest.update(piece)
                    size += len(piece)
                    target.write(piece)
            found = digest.hexdigest()
            if found != info.sha256:
                wrong[found] += 1
                more = "more than " if size > info.bytes else ""
                kind = _FinalError if wrong[found] == SAME_WRONG else DataError
                raise kind(
                    f"{public(url)} came as {more}{min(size, info.bytes):,} bytes with sha256 {found[:12]}…, the"
                    f" manifest says {info.bytes:,} bytes with {info.sha256[:12]}…; upload the shard again"
                )
            inode = draft.stat().st_ino
            with self._room_lock():  # or whoever counts meanwhile sees neither name
                os.replace(draft, path)
            self._verified[info.name] = inode
        finally:
            draft.unlink(missing_ok=True)

    def _reserve(self, info: ShardInfo, draft: Path) -> None:
        """Take the shard's bytes on disk, as soon as there is room for them within the bound."""
        if info.bytes > self._limit:
            raise ConfigError(
                f"shard {info.name} takes {human_bytes(info.bytes)}, but data.cache_gib allows"
                f" {human_bytes(self._limit)}; raise it"
            )
        deadline = time.monotonic() + ROOM_S
        while time.monotonic() < deadline:
            with self._room_lock():
                if self._make_room(info.bytes):
                    with open(draft, "wb") as file:
                        file.truncate(info.bytes)
                    return
            time.sleep(0.05)
        raise DataError(
            f"shard {info.name} found no room in {self._folder} within {ROOM_S:.0f} s, as all that data.cache_gib"
            f" allows ({human_bytes(self._limit)}) is in use; raise it"
        )

    def _make_room(self, need: int) -> bool:
        """Let files go until `need` more bytes fit; False when that must wait for shards that are just being used."""
        shards, total, now = [], need, time.time()
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if path.suffix == ".part" and _is_abandoned(path):
                    path.unlink()
                    continue
                total += stat.st_size
                if path.suffix == ".tar":
                    shards.append((stat.st_mtime, stat.st_size, path))
        for used, size, path in sorted(shards):
            if total > self._limit and abs(now - used) >= GRACE_S:
                path.unlink(missing_ok=True)
                total -= size
        return total <= self._limit

    def _room_lock(self) -> contextlib.AbstractContextManager[None]:
        return _locked(self._folder / ".room.lock")


def fetch_small(url: str) -> bytes:
    """A small object whole: a manifest, a tokenizer. Raises DataError when it cannot be had."""

    def once() -> bytes:
        with open_input(url, None) as source:
            return b"".join(_pieces(source, url))

    return patiently(once, time.monotonic() + SMALL_PATIENCE_S)


def join(folder: str, name: str) -> str:
    """The URL of an object in a folder; a signature in the folder's query is the object's too."""
    head, mark, query = folder.partition("?") if folder.startswith("http") else (folder, "", "")
    return f"{head.rstrip('/')}/{name}{mark}{query}"


def patiently(once: Callable[[], T], deadline: float) -> T:
    """What `once` gives; while it fails it is tried again until the deadline (monotonic), waiting longer each time."""
    for attempt in itertools.count(1):
        try:
            return once()
        except DataError as error:
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
            late = attempt >= MIN_TRIES and time.monotonic() + pause > deadline
            if late or isinstance(error, _FinalError) or _FINAL.search(str(error)):
                tries = f"{attempt} tries" if attempt > 1 else "one try"
                raise DataError(f"{error} (after {tries})") from None
        time.sleep(pause)
    raise AssertionError("there is always another attempt")


def _pieces(source: BinaryIO, url: str, most: float = float("inf")) -> Iterator[bytes]:
    """What comes, until its end or `most` bytes."""
    while most > 0:
        try:
            piece = source.read(int(min(CHUNK, most)))
        except Exception as error:  # every store has exceptions of its own, whose texts may hold secrets
            raise DataError(f"{public(url)} broke off ({type(error).__name__}); check the network") from None
        if not piece:
            return
        most -= len(piece)
        yield piece


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Be the only one, of all threads and processes of this host."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_abandoned(draft: Path) -> bool:
    """Whether nobody is fetching into a draft: whoever fetches holds the shard's lock, until its process ends."""
    with open(draft.with_suffix(".lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
