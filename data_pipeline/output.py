"""Where a build writes: a folder here, or a folder of objects on s3:// or gs://.

Names are relative to the folder. Whatever is written is whole or absent: files are renamed into place, and a store
shows an object when all of it has come. A shard is made on a disk in both cases; one that goes far away is made in a
temporary folder of whoever makes it, sent under its final name, read back and compared before it counts as there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import re
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from configs.errors import ConfigError, DataError
from data_pipeline import manifest as manifests
from data_pipeline import remote
from data_pipeline import tokenizer as tokenizers
from data_pipeline.files import CHUNK, sha256_file, write_whole
from data_pipeline.manifest import HEADER, TABLE, Manifest, ShardInfo
from data_pipeline.places import RECORDS, Doing, explained, filesystem, is_url, public, scheme_of
from data_pipeline.scratch import scratch, sweep
from data_pipeline.tokenizer import Tokenizer

T = TypeVar("T")
WRITABLE = ("s3", "gs")
_DRAFT = re.compile(r"\..+\.[0-9]+\.tmp")


class Output(ABC):
    """A folder that a build writes into. A plain value: tasks carry it to wherever they are done.

    where: the folder as people know it. disk: where files are made, for errors about a disk that is full.
    """

    where: str
    disk: Path

    @abstractmethod
    def alone(self) -> contextlib.AbstractContextManager[None]:
        """See that the folder can be had, and keep other builds out where that can be done. Raises ConfigError."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """All of a small file; None where there is none."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """A small file, whole or absent, in place of what had its name."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> None:
        """Write it unless something has that name; of several that try at once, one succeeds."""

    @abstractmethod
    def sizes(self, folder: str = "") -> dict[str, int]:
        """The files in the folder, or in one below it, each with its bytes."""

    @abstractmethod
    def remove(self, names: Iterable[str]) -> None:
        """Remove files that are there."""

    @abstractmethod
    def has(self, name: str, size: int, sha256: str) -> bool:
        """Whether a file is there as it was written. Far away its size tells, for it was compared when it was sent."""

    @abstractmethod
    def drafts(self) -> contextlib.AbstractContextManager[Path]:
        """A folder of this machine in which shards are made."""

    @abstractmethod
    def keep(self, folder: Path, shard: ShardInfo) -> None:
        """Take a shard that was finished in a folder of drafts. Raises DataError when it does not arrive."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove drafts of killed builds from this machine."""


def output_of(place: Path | str) -> Output:
    """The folder at a path or URL. Raises ConfigError for a URL that cannot be written to."""
    if isinstance(place, Path) or not is_url(place):
        return LocalFolder(Path(place))
    if scheme_of(place) not in WRITABLE:
        raise ConfigError(
            f"data.dir is {public(place)}, where nothing can be written; build on s3:// or gs://, or into a folder here"
            " and copy it to where it belongs"
        )
    return RemoteFolder(place.rstrip("/"))


def load_manifest(output: Output) -> Manifest:
    """The manifest of a finished build. Raises DataError when there is none, or it is damaged."""
    header, table = output.read(HEADER), output.read(TABLE)
    if header is None or table is None:
        raise DataError(f"no shards in {output.where} (there is no manifest); run `leviathan data build CONFIG`")
    return manifests.decode(header, table, output.where)


def load_tokenizer(output: Output) -> Tokenizer:
    """The tokenizer that a build saved. Raises DataError when it is missing or damaged."""
    header = output.read(tokenizers.HEADER)
    if header is None:
        raise DataError(f"no tokenizer in {output.where}; build the shards again, or copy the tokenizer beside them")
    return tokenizers.load(header, output.read(tokenizers.MODEL), output.where)


def save_tokenizer(output: Output, made: Tokenizer) -> None:
    """Write the files of a tokenizer, the one that names the others last."""
    for name, content in made.files().items():
        output.write(name, content)


@dataclass(frozen=True)
class LocalFolder(Output):
    """A folder of this machine, or of a disk that all nodes see under the same path."""

    path: Path

    @property
    def where(self) -> str:  # type: ignore[override]
        """Its path."""
        return str(self.path)

    @property
    def disk(self) -> Path:  # type: ignore[override]
        """The folder itself."""
        return self.path

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock of the folder, which ends with the process."""
        try:
            (self.path / RECORDS).mkdir(parents=True, exist_ok=True)
            file = open(self.path / RECORDS / "lock", "ab")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise ConfigError(
                f"data.dir {self.path} cannot be written ({error.strerror}); choose another data.dir"
            ) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"another build is at work in {self.path}; wait for it, or choose another data.dir"
                ) from None
            except OSError as error:
                # some cluster file systems have no locks; records and renames keep the shards whole there too
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
            yield

    def read(self, name: str) -> bytes | None:
        """From the disk."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Durable when this returns."""
        write_whole(self.path / name, content)

    def create(self, name: str, content: bytes) -> None:
        """Nobody else can try: the folder is locked."""
        if not (self.path / name).exists():
            self.write(name, content)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """As the disk says."""
        here = self.path / folder
        paths = [path for path in here.iterdir() if path.is_file()] if here.is_dir() else []
        return {path.name: path.stat().st_size for path in paths}

    def remove(self, names: Iterable[str]) -> None:
        """One by one, in their order."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def has(self, name: str, size: int, sha256: str) -> bool:
        """Every byte is read."""
        try:
            return sha256_file(self.path / name) == sha256
        except FileNotFoundError:
            return False

    def drafts(self) -> contextlib.AbstractContextManager[Path]:
        """The folder itself: a finished shard is renamed there."""
        return contextlib.nullcontext(self.path)

    def keep(self, folder: Path, shard: ShardInfo) -> None:
        """It lies where it belongs."""

    def sweep(self) -> None:
        """What was begun and not finished in this folder."""
        for folder in (self.path, self.path / RECORDS):
            for path in folder.iterdir() if folder.is_dir() else ():
                if _DRAFT.fullmatch(path.name) and (path.is_file() or path.is_symlink()):
                    path.unlink(missing_ok=True)


@dataclass(frozen=True)
class RemoteFolder(Output):
    """A folder of objects. It cannot be locked; what protects it is its plan (data_pipeline/plan.py)."""

    url: str

    @property
    def where(self) -> str:  # type: ignore[override]
        """Its URL, without secrets."""
        return public(self.url)

    @property
    def disk(self) -> Path:  # type: ignore[override]
        """Where temporary files are made."""
        return Path(tempfile.gettempdir())

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """See that somebody answers, without patience: it is the first that happens, and somebody may be waiting."""
        with explained(self.url, "written"), contextlib.suppress(FileNotFoundError):
            self._fs.cat_file(self._of(HEADER))
        yield

    def read(self, name: str) -> bytes | None:
        """As it is in the store at this moment."""

        def once() -> bytes | None:
            try:
                return self._fs.cat_file(self._of(name))
            except FileNotFoundError:
                return None

        return self._patiently(name, "read", once)

    def write(self, name: str, content: bytes) -> None:
        """Stores have it whole or not at all."""
        self._patiently(name, "written", lambda: self._fs.pipe_file(self._of(name), content))

    def create(self, name: str, content: bytes) -> None:
        """By the store's own condition that there is no such object, where it keeps that; else the last one wins."""

        def once() -> None:
            try:
                self._fs.pipe_file(self._of(name), content, mode="create")
            except Exception as error:  # each store says it in its own way: 412, a condition that did not hold
                if not isinstance(error, FileExistsError) and getattr(error, "code", None) != 412:
                    raise

        self._patiently(name, "written", once)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """As the store lists them."""
        url = self._of(folder).rstrip("/")

        def once() -> dict[str, int]:
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(url, detail=True)
            except FileNotFoundError:
                return {}
            return {one["name"].rpartition("/")[2]: one["size"] for one in found if one["type"] == "file"}

        return self._patiently(folder, "read", once)

    def remove(self, names: Iterable[str]) -> None:
        """Together, in no order."""
        paths = [self._of(name) for name in names]
        if paths:
            self._patiently("", "written", lambda: self._fs.rm(paths))

    def has(self, name: str, size: int, sha256: str) -> bool:
        """By its size: an object is there after it was read back and compared, and is never changed in part."""

        def once() -> bool:
            try:
                self._fs.invalidate_cache()
                return self._fs.info(self._of(name))["size"] == size
            except FileNotFoundError:
                return False

        return self._patiently(name, "read", once)

    def drafts(self) -> contextlib.AbstractContextManager[Path]:
        """A temporary folder."""
        return scratch()

    def keep(self, folder: Path, shard: ShardInfo) -> None:
        """Send it, read it back, compare, and remove it here."""

        def once() -> None:
            self._fs.put_file(str(folder / shard.name), self._of(shard.name))
            self._fs.invalidate_cache()
            digest = hashlib.sha256()
            with self._fs.open(self._of(shard.name), "rb", block_size=CHUNK, cache_type="readahead") as file:
                while piece := file.read(CHUNK):
                    digest.update(piece)
            if digest.hexdigest() != shard.sha256:
                raise DataError(
                    f"{self.where}/{shard.name} does not hold what was sent there (sha256 {digest.hexdigest()[:12]}…,"
                    f" sent {shard.sha256[:12]}…); check whether something else writes there, and build again"
                )

        self._patiently(shard.name, "written", once)
        (folder / shard.name).unlink()

    def sweep(self) -> None:
        """What processes of this machine have left in temporary folders."""
        sweep()

    @property
    def _fs(self) -> Any:
        return filesystem(self.url)

    def _of(self, name: str) -> str:
        return remote.join(self.url, name)

    def _patiently(self, name: str, what: Doing, act: Callable[[], T]) -> T:
        """What `act` gives, tried again while the store fails. Raises DataError in the end."""

        def once() -> T:
            with explained(self._of(name), what):
                return act()

        return remote.patiently(once, time.monotonic() + remote.PATIENCE_S)
