"""A shard: an uncompressed tar of ~1 MiB token blocks that `tar` and `webdataset` read, and that we read by mmap.

A block is one webdataset sample of three members:
    000007.ends.u32     pairs (token, byte), from the shard's start: where each document that ends here ends
    000007.json         {"first": first token of the block, "tokens": how many}
    000007.tokens.u16   the tokens (u32 where the vocabulary needs it), little-endian
A document may run over several blocks. Two more members follow, whose names webdataset skips:
    __documents__       the name of each document, one a line, zstd
    __index__           where each block lies, and a checksum of every byte between
The manifest names the offset and the sha256 of the index, so a reader needs one small read to know a whole shard, and
checks each block when it first touches it: nothing is used that was not verified.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import mmap
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from configs.errors import DataError
from data_pipeline.files import fsync_folder, sha256_file
from data_pipeline.manifest import ShardInfo, Split

WRITE_BYTES = 4 << 20
BLOCK_BYTES = 1 << 20
HEADER_BYTES = 512
INDEX = "__index__"
DOCUMENTS = "__documents__"
MAX_TEXT_BYTES = (1 << 32) - 1  # of one shard: the ends of documents are u32


def token_dtype(vocab: int) -> np.dtype[Any]:
    """The smallest little-endian type that holds ids below `vocab`."""
    return np.dtype("<u2" if vocab <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class Block:
    """Where one block lies in the file, in bytes from its start. [begin, end) covers headers, members and padding."""

    begin: int
    end: int
    tokens_at: int
    tokens: int
    ends_at: int
    documents: int
    checksum: str


class ShardWriter:
    """Write documents into a new shard; it appears under its name only when `close` has made it durable."""

    def __init__(self, path: Path, source: str, split: Split, vocab: int) -> None:
        import webdataset  # imports torch, which readers must not pay for

        self.path, self.source, self.split, self.vocab = path, source, split, vocab
        self.dtype = token_dtype(vocab)
        self.tokens = self.text_bytes = 0
        self._draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        # a tar writes in small pieces, and what was written in small pieces is later mapped in small pieces: slowly
        self._file = open(self._draft, "w+b", buffering=WRITE_BYTES)  # noqa: SIM115 (closed by close or abort)
        # fixed owner, mode and time, so that equal content gives equal bytes
        self._tar = webdataset.TarWriter(self._file, user="", group="", mode=0o444, mtime=0, encoder=False)
        self._names: list[str] = []
        self._block = np.empty(BLOCK_BYTES // self.dtype.itemsize, dtype=self.dtype)
        self._filled = 0
        self._ends: list[tuple[int, int]] = []
        self._spans: list[tuple[int, int, int, int]] = []  # begin, end, tokens, documents

    def add(self, name: str, tokens: np.ndarray, text_bytes: int) -> None:
        """Append one document: its name (one line), its ids including the end-of-document id, its bytes of text."""
        assert len(tokens), "a document ends with its end-of-document id, so it is never empty"
        if int(tokens.max()) >= self.vocab:
            raise DataError(
                f"document {name!r} has token id {int(tokens.max())}, the vocabulary ends at {self.vocab - 1}"
            )
        self._names.append(name.replace("\n", " "))
        start = 0
        while start < len(tokens):
            piece = tokens[start : start + len(self._block) - self._filled]
            self._block[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            start += len(piece)
            self.tokens += len(piece)
            if start == len(tokens):
                self.text_bytes += text_bytes
                self._ends.append((self.tokens, self.text_bytes))
            if self._filled == len(self._block):
                self._flush()

    @property
    def bytes(self) -> int:
        """Bytes of tokens so far."""
        return self.tokens * self.dtype.itemsize

    def close(self) -> ShardInfo:
        """Finish the file, make it durable, give it its name, and tell what it holds."""
        if self._filled or self._ends:
            self._flush()
        self._tar.close()
        index_offset = self._append_meta()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.seek(0, io.SEEK_END)
        self._file.seek(index_offset)
        index_hash = hashlib.sha256(self._file.read()).hexdigest()
        self._file.close()
        digest = sha256_file(self._draft)
        os.replace(self._draft, self.path)
        fsync_folder(self.path.parent)
        return ShardInfo(
            self.source, self.split, self.path.name, size, digest,
            self.tokens, len(self._names), self.text_bytes, index_offset, index_hash,
        )  # fmt: skip

    def abort(self) -> None:
        """Leave nothing behind, also after `close` failed."""
        # a tar that is not closed writes its end when it is collected, into a file that is closed by then
        with contextlib.suppress(OSError, ValueError):
            self._tar.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self._draft.unlink(missing_ok=True)

    def _flush(self) -> None:
        begin = self._tar.tarstream.offset
        first = self.tokens - self._filled
        self._tar.write(
            {
                "__key__": f"{len(self._spans):06d}",
                "ends.u32": np.asarray(self._ends, dtype="<u4").tobytes(),
                "json": json.dumps({"first": first, "tokens": self._filled}).encode(),
                f"tokens.u{8 * self.dtype.itemsize}": self._block[: self._filled].tobytes(),
            }
        )
        self._spans.append((begin, self._tar.tarstream.offset, self._filled, len(self._ends)))
        self._filled, self._ends = 0, []

    def _append_meta(self) -> int:
        """Append the names of the documents and the index; return where the index begins."""
        self._file.flush()
        self._file.seek(0)
        names = "\n".join(self._names).encode("utf-8", "replace")
        with tarfile.open(fileobj=self._file, mode="a", format=tarfile.USTAR_FORMAT) as tar:
            begin = tar.offset
            _add_member(tar, DOCUMENTS, zstandard.ZstdCompressor(level=9).compress(names))
            self._spans.append((begin, tar.offset, 0, 0))
            self._file.flush()
            rows = [self._index_row(*span) for span in self._spans]
            self._file.seek(index_offset := tar.offset)
            index = {"dtype": self.dtype.str, "spans": rows}
            _add_member(tar, INDEX, json.dumps(index, separators=(",", ":")).encode())
        return index_offset

    def _index_row(self, begin: int, end: int, tokens: int, documents: int) -> list[Any]:
        self._file.seek(begin)
        checksum = xxhash.xxh3_64_hexdigest(self._file.read(end - begin))
        tokens_at = end - _padded(tokens * self.dtype.itemsize)
        return [begin, end, tokens_at, tokens, begin + HEADER_BYTES, documents, checksum]


class Shard:
    """One shard opened for reading. Every block is verified before its first byte is used.

    Raises DataError, at opening for a wrong size or index, at reading for a damaged block.
    """

    def __init__(self, path: Path, info: ShardInfo) -> None:
        self.path, self.info = path, info
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != info.bytes:
                    raise self._wrong(f"{size:,} bytes", f"{info.bytes:,} bytes")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
            raise self._wrong(reason, f"a shard of {info.bytes:,} bytes") from None
        spans, self.dtype = self._read_index()
        self.blocks, self._names_span = spans[:-1], spans[-1]
        self._per_block = BLOCK_BYTES // self.dtype.itemsize
        self._tokens: list[np.ndarray | None] = [None] * len(self.blocks)
        self._ends: list[np.ndarray] = [_NONE] * len(self.blocks)

    @property
    def tokens(self) -> int:
        """How many tokens it holds."""
        return self.info.tokens

    def copy(self, start: int, stop: int, out: np.ndarray) -> None:
        """Copy tokens [start, stop) into `out`, converting to its type."""
        block, at = divmod(start, self._per_block)
        view = self._tokens[block]
        # nearly every row lies in one block that was read before: microseconds count
        first = (self._view(block) if view is None else view)[at : at + stop - start]
        done = len(first)
        out[:done] = first
        while done < stop - start:
            block += 1
            piece = self._view(block)[: stop - start - done]
            out[done : done + len(piece)] = piece
            done += len(piece)

    def boundaries(self, start: int, stop: int) -> np.ndarray:
        """The tokens in (start, stop) at which a new document begins, ascending (int64)."""
        block, last = start // self._per_block, (stop - 1) // self._per_block
        if block == last:
            return self._cut(block, start, stop)
        return np.concatenate([self._cut(b, start, stop) for b in range(block, last + 1)])

    def ends(self) -> np.ndarray:
        """(documents, 2) int64: the token and the byte of text where each document ends."""
        for block in range(len(self.blocks)):
            self._view(block)
        pairs = [self._pairs(block) for block in self.blocks]
        return np.concatenate(pairs).astype(np.int64) if pairs else np.empty((0, 2), dtype=np.int64)

    def names(self) -> list[str]:
        """The names of its documents, in order."""
        span = self._names_span
        self._check(span, "the document names")
        size = int(self._map[span.begin + 124 : span.begin + 135], 8)
        at = span.begin + HEADER_BYTES
        text = zstandard.ZstdDecompressor().decompress(self._map[at : at + size])
        return text.decode("utf-8").split("\n") if self.info.documents else []

    def verify(self) -> None:
        """Compare the whole file with the manifest's sha256; raise DataError where they differ."""
        found = sha256_file(self.path)
        if found != self.info.sha256:
            raise self._wrong(f"sha256 {found[:12]}…", f"sha256 {self.info.sha256[:12]}…")

    def _cut(self, block: int, start: int, stop: int) -> np.ndarray:
        self._view(block)
        ends = self._ends[block]
        # a number of another type would have all of them converted
        first = ends.searchsorted(ends.dtype.type(start), "right")
        if first == len(ends) or ends[first] >= stop:
            return _NONE
        return ends[first : ends.searchsorted(ends.dtype.type(stop), "left")].astype(np.int64)

    def _view(self, block: int) -> np.ndarray:
        view = self._tokens[block]
        if view is None:
            b = self.blocks[block]
            self._check(b, f"block {block}")
            view = np.frombuffer(self._map, self.dtype, b.tokens, b.tokens_at)
            # side by side for the search; 4 bytes of every document that a long run has come by stay in memory
            self._ends[block] = np.ascontiguousarray(self._pairs(b)[:, 0])
            self._tokens[block] = view
        return view

    def _pairs(self, block: Block) -> np.ndarray:
        """(documents, 2) u32, where they lie: token and byte of text at which each document of a block ends."""
        return np.frombuffer(self._map, "<u4", 2 * block.documents, block.ends_at).reshape(-1, 2)

    def _check(self, block: Block, what: str) -> None:
        found = xxhash.xxh3_64_hexdigest(memoryview(self._map)[block.begin : block.end])
        if found != block.checksum:
            raise self._wrong(f"{what} with checksum {found}", f"checksum {block.checksum}")

    def _read_index(self) -> tuple[list[Block], np.dtype[Any]]:
        tail = self._map[self.info.index_offset :]
        found = hashlib.sha256(tail).hexdigest()
        if found != self.info.index_sha256:
            raise self._wrong(f"an index with sha256 {found[:12]}…", f"sha256 {self.info.index_sha256[:12]}…")
        size = int(tail[124:135], 8)
        content = json.loads(tail[HEADER_BYTES : HEADER_BYTES + size])
        return [Block(*row) for row in content["spans"]], np.dtype(content["dtype"])

    def _wrong(self, found: str, expected: str) -> DataError:
        return DataError(
            f"shard {self.path} is damaged or not the one that was built: found {found}, the manifest says {expected};"
            " delete it and build again, or copy it again (`leviathan data check` lists all that are wrong)"
        )


_NONE = np.empty(0, dtype=np.int64)


def _padded(size: int) -> int:
    return -(-size // HEADER_BYTES) * HEADER_BYTES


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o444
    tar.addfile(member, io.BytesIO(content))
