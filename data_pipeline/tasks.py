"""The work of a build that can be done anywhere: scan, sample or encode one slice, depending on nothing else; train.

A finished task leaves a record in the folder's `.build`, written when all it names is durable. Whoever is given the
same task again (a restarted build, or a second machine) takes the record if the files it names are still whole.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.errors import ConfigError, DataError, LeviathanError
from data_pipeline import tokenizer as tokenizers
from data_pipeline.documents import Slice, cut_text
from data_pipeline.files import free_bytes, human_bytes
from data_pipeline.manifest import ShardInfo, Split
from data_pipeline.output import Output, load_tokenizer, save_tokenizer
from data_pipeline.places import RECORDS
from data_pipeline.shards import MAX_TEXT_BYTES, ShardWriter
from data_pipeline.splits import HASH_BYTES, Counts, Piece, Rules, divide, usable
from data_pipeline.tokenizer import Tokenizer

_ERRORS: dict[str, type[LeviathanError]] = {kind.__name__: kind for kind in (LeviathanError, ConfigError, DataError)}


@dataclass(frozen=True)
class Scanned:
    """What a scan found: counts, and a file with the hash of every usable document's text."""

    counts: Counts
    hashes: str
    sha256: str


@dataclass(frozen=True)
class Scan:
    """Hash every document of a slice."""

    slice: Slice
    rules: Rules
    output: Output

    @property
    def what(self) -> str:
        """What people know it by."""
        return _what(self.slice)

    @property
    def name(self) -> str:
        """The name of its record."""
        limit = "" if self.slice.limit_bytes is None else f"-first{self.slice.limit_bytes}"
        return f"scan-{self.slice.source}-{self.slice.number:05d}{limit}"

    def finished(self) -> Scanned | None:
        """The result an earlier build left, if it is whole."""
        record = _record(self.output, self.name)
        if record is None:
            return None
        found = Scanned(Counts(**record["counts"]), record["hashes"], record["sha256"])
        size = HASH_BYTES * found.counts.documents
        return found if self.output.has(f"{RECORDS}/{found.hashes}", size, found.sha256) else None

    def work(self) -> Scanned:
        """Read the slice."""
        counts = Counts()
        digests = bytearray()
        for document in usable(self.slice, self.rules, counts):
            digests += document.digest
            counts.documents += 1
            counts.text_bytes += document.text_bytes
        result = Scanned(counts, f"{self.name}.hashes", hashlib.sha256(digests).hexdigest())
        self.output.write(f"{RECORDS}/{result.hashes}", bytes(digests))
        _write_record(self.output, self.name, asdict(result))
        return result


@dataclass(frozen=True)
class Sample:
    """Take about `budget` bytes of training text, spread over a slice."""

    slice: Slice
    rules: Rules
    budget: int
    output: Output

    @property
    def what(self) -> str:
        """What people know it by."""
        return _what(self.slice)

    @property
    def name(self) -> str:
        """Its place among other samples."""
        return f"sample-{self.slice.source}-{self.slice.number:05d}"

    def finished(self) -> None:
        """Samples are not kept."""

    def work(self) -> list[str]:
        """Read the slice, as far as needed."""
        texts: list[str] = []
        seen = taken = 0
        for document, digest, text_bytes in usable(self.slice, self.rules, Counts()):
            if taken >= self.budget:
                break
            if taken * max(1, self.slice.text_bytes) <= seen * self.budget:
                for piece in divide(document, digest, self.rules):
                    if piece.split == "train":
                        texts.append(cut_text(piece.text, self.budget - taken))
                        taken += len(texts[-1].encode())
            seen += text_bytes
        return texts


@dataclass(frozen=True)
class Train:
    """Make a tokenizer of a kind (`sp:4096`) from texts, and save it."""

    spec: str
    texts: list[str]
    output: Output

    name = what = "the tokenizer"

    def finished(self) -> None:
        """Whoever builds looks for it before samples are taken."""

    def work(self) -> Tokenizer:
        """The same texts give the same tokenizer."""
        made = tokenizers.make(self.spec, self.texts)
        save_tokenizer(self.output, made)
        return made


@dataclass(frozen=True)
class Encoded:
    """What a slice became: counts, and its shards in the order they were written."""

    counts: Counts
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True, eq=False)
class Encode:
    """Write the shards of a slice.

    tokenizer: the sha256 of the one saved in the folder. dropped: (n,) int64, the usable documents of the slice that
    were seen before. scanned: sha256 of the hashes that this was decided by, None where nothing was scanned.
    """

    slice: Slice
    rules: Rules
    output: Output
    tokenizer: str
    shard_bytes: int
    dropped: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    scanned: str | None = None

    @property
    def what(self) -> str:
        """What people know it by."""
        return _what(self.slice)

    @property
    def name(self) -> str:
        """The name of its record."""
        return f"encode-{self.slice.source}-{self.slice.number:05d}"

    @property
    def key(self) -> str:
        """What the result depends on besides the plan."""
        words = [self.tokenizer, self.scanned, self.slice.limit_bytes, asdict(self.rules), self.shard_bytes]
        return hashlib.sha256(json.dumps(words).encode() + self.dropped.tobytes()).hexdigest()

    def finished(self) -> Encoded | None:
        """The result an earlier build left, if every shard is whole."""
        record = _record(self.output, self.name)
        if record is None or record["key"] != self.key:
            return None
        shards = tuple(ShardInfo(**shard) for shard in record["shards"])
        whole = all(self.output.has(shard.name, shard.bytes, shard.sha256) for shard in shards)
        return Encoded(Counts(**record["counts"]), shards) if whole else None

    def work(self) -> Encoded:
        """Read the slice, write the shards. Raises DataError when the text is not what was scanned."""
        with self.output.drafts() as folder:
            result = self._write(_Shards(self, folder))
        _write_record(self.output, self.name, {"key": self.key, **asdict(result)})
        return result

    def _write(self, shards: _Shards) -> Encoded:
        counts, dropped, digests = Counts(), set(self.dropped.tolist()), hashlib.sha256()
        try:
            for number, found in enumerate(usable(self.slice, self.rules, counts)):
                digests.update(found.digest)
                if number in dropped:
                    counts.duplicates += 1
                    continue
                counts.documents += 1
                counts.text_bytes += found.text_bytes
                for piece in divide(found.document, found.digest, self.rules):
                    shards.add(piece)
            if self.scanned not in (None, digests.hexdigest()):
                raise DataError(
                    f"slice {self.slice.number} of source {self.slice.source!r} changed since it was scanned;"
                    " build again with rebuild, when its files are finished"
                )
            return Encoded(counts, tuple(shards.close()))
        except BaseException:
            shards.abort()
            raise


Task = Scan | Sample | Train | Encode


class Outcome(NamedTuple):
    """What came of a task: a result (`kept`: of an earlier build), or the kind and sentence of an error.

    Errors travel as values, because every kind of executor wraps what is raised in something of its own.
    """

    result: Any
    kept: bool = False
    kind: str = ""
    error: str = ""

    def get(self) -> Any:
        """The result. Raises the error where there is one."""
        if self.kind:
            raise _ERRORS[self.kind](self.error)
        return self.result


def run(task: Task) -> Outcome:
    """Do a task, or find it done. This is what an executor is given."""
    try:
        with disk_may_be_full(task.output.disk, task.what):
            kept = task.finished()
            return Outcome(kept, kept=True) if kept is not None else Outcome(task.work())
    except LeviathanError as error:
        kind = next(name for name in ("ConfigError", "DataError", "LeviathanError") if isinstance(error, _ERRORS[name]))
        return Outcome(None, kind=kind, error=str(error))


@contextlib.contextmanager
def disk_may_be_full(folder: Path, what: str) -> Iterator[None]:
    """Say it in a sentence when `what` finds no room in `folder`. Raises LeviathanError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise LeviathanError(
            f"the disk of {folder} is full ({human_bytes(free_bytes(folder))} free) while writing {what};"
            " make room and build again, finished slices are kept"
        ) from None


class _Shards:
    """The shards of one slice: one row of parts for each split, begun when they have something to hold."""

    def __init__(self, task: Encode, folder: Path) -> None:
        self._slice, self._limit, self._output, self._folder = task.slice, task.shard_bytes, task.output, folder
        self._tokenizer = _tokenizer(task.output, task.tokenizer)
        self._open: dict[Split, ShardWriter] = {}
        self._done: dict[Split, list[ShardInfo]] = {"train": [], "heldout": []}

    def add(self, piece: Piece) -> None:
        """Encode a piece into the shard of its split."""
        ids = self._tokenizer.encode(piece.text)
        if piece.ends:
            ids = np.append(ids, np.array(self._tokenizer.eod, dtype=ids.dtype))
        if len(ids) == 0:
            return  # a foreign sentencepiece model may remove all of a text
        text_bytes = len(piece.text.encode())
        writer = self._open.get(piece.split)
        if writer and (writer.bytes >= self._limit or writer.text_bytes + text_bytes > MAX_TEXT_BYTES):
            self._finish(piece.split)
        if piece.split not in self._open:
            self._open[piece.split] = self._begin(piece.split)
        self._open[piece.split].add(piece.name, ids, text_bytes)

    def close(self) -> list[ShardInfo]:
        """Finish what is open; all shards, train first."""
        for split in list(self._open):
            self._finish(split)
        return self._done["train"] + self._done["heldout"]

    def abort(self) -> None:
        """Leave no drafts behind."""
        for writer in self._open.values():
            writer.abort()

    def _finish(self, split: Split) -> None:
        # forgotten only when it is closed, so that a writer which fails to close is aborted
        shard = self._open[split].close()
        del self._open[split]
        self._output.keep(self._folder, shard)
        self._done[split].append(shard)

    def _begin(self, split: Split) -> ShardWriter:
        part = self._slice
        name = f"{part.source}-{split}-{part.number:05d}-{len(self._done[split]):02d}.tar"
        return ShardWriter(self._folder / name, part.source, split, self._tokenizer.vocab)


@functools.lru_cache(maxsize=1)
def _tokenizer(output: Output, sha256: str) -> Tokenizer:
    found = load_tokenizer(output)
    if found.sha256 != sha256:
        raise DataError(
            f"the tokenizer in {output.where} was replaced while shards were written; build again with rebuild"
        )
    return found


def _what(part: Slice) -> str:
    return f"slice {part.number} of source {part.source!r}"


def _record(output: Output, name: str) -> dict[str, Any] | None:
    content = output.read(f"{RECORDS}/{name}.json")
    try:
        record = None if content is None else json.loads(content)
    except ValueError:
        return None  # damaged, so it proves nothing
    return record if isinstance(record, dict) else None


def _write_record(output: Output, name: str, content: dict[str, Any]) -> None:
    output.write(f"{RECORDS}/{name}.json", json.dumps(content).encode())
