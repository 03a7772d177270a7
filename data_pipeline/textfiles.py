"""The file formats text comes in: how a file is cut into parts, and how the documents of a part are read.

Big plain files are cut at documents, so that several workers share one file; a compressed file is read whole, as a
stream. Nothing is held in memory but one document and what a read brings.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

from configs.errors import DataError
from data_pipeline.documents import MAX_DOCUMENT, MAX_TEXT, Document, Part, document, json_document
from data_pipeline.places import Input, can_jump, is_url, open_input, open_seekable, public, suffix_of
from data_pipeline.tartext import tar_documents

CHUNK = 1 << 20
_LOOK = 64 << 10  # what is read at a time of a file in a store to find where a document ends
PARQUET_ROWS = 256
_BOM = b"\xef\xbb\xbf"
_COMPRESSED = {".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
_EXPANSION = 4  # text to expect of a compressed byte; only progress and the evenness of slices depend on it


def parts_of(found: Input, slice_bytes: int, field: str, separator: str | None) -> list[Part]:
    """The parts of one file, each of about `slice_bytes` of text where the format can be cut."""
    suffix = suffix_of(found.name)
    size, expected = found.size, slice_bytes if found.size is None else found.size
    if suffix == ".parquet":
        return _row_groups(found, slice_bytes, field)
    if suffix == ".tar":
        return [Part("tar", found.path, found.name, size, expected)]
    if suffix in _COMPRESSED:
        return [Part("jsonl", found.path, found.name, size, expected * (_EXPANSION if size is not None else 1))]
    whole = Part("text" if suffix == ".txt" else "jsonl", found.path, found.name, size, expected)
    mark = separator.encode() if separator is not None else None
    if whole.kind == "jsonl":
        mark = b"\n"
    if mark is None and expected > MAX_TEXT:
        raise DataError(
            f"{public(found.path)} has {expected:,} bytes and is one document, which may have {MAX_TEXT:,};"
            " set the source's `separator` to the text that divides its documents"
        )
    if mark is None or not can_jump(found.path) or expected <= slice_bytes:
        return [whole]
    starts = _even_starts(found, expected, slice_bytes, mark)
    return [replace(whole, begin=a, end=b, text_bytes=b - a) for a, b in zip(starts, [*starts[1:], expected])]


def read_part(part: Part, field: str, separator: str | None) -> Iterator[Document]:
    """The documents of one part of a file. Raises DataError for what cannot be read as its format."""
    if part.kind == "parquet":
        yield from _parquet(part, field)
        return
    with open_input(part.path, part.size) as file:
        if part.kind == "tar":
            yield from tar_documents(file.read, field, part.name)
        elif part.kind == "jsonl":
            yield from _jsonl(_expanded(file, part), part, field)
        elif separator is not None:
            for at, piece in _split(_stretch(file, part), separator.encode(), part, MAX_DOCUMENT):
                yield document(f"{part.name}@{at}", piece)
        else:
            content = file.read(MAX_TEXT + 1)
            if len(content) > MAX_TEXT:
                raise _too_long(part, 0, MAX_TEXT)
            yield document(part.name, content.removeprefix(_BOM))


def _even_starts(found: Input, size: int, slice_bytes: int, mark: bytes) -> list[int]:
    """Where documents begin, about every `slice_bytes`."""
    count = -(-size // slice_bytes)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_input(found.path, found.size, _LOOK))
        data: mmap.mmap | _Far = (
            _Far(file, size)
            if is_url(found.path)
            else stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        )
        starts = {_next_start(data, mark, size * number // count) for number in range(1, count)}
    return [0, *sorted(starts - {0, size})]


class _Far:
    """What is asked of a memory map to find a mark, for a file in a store: read from where it is asked, no further."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def __len__(self) -> int:
        return self._size

    def find(self, mark: bytes, start: int) -> int:
        """As of bytes."""
        while start < self._size:
            piece = self._read(start, start + _LOOK + len(mark) - 1)
            if (found := piece.find(mark)) >= 0:
                return start + found
            start += _LOOK
        return -1

    def rfind(self, mark: bytes, start: int, end: int) -> int:
        """As of bytes."""
        found = self._read(start, end).rfind(mark)
        return found if found < 0 else start + found

    def _read(self, start: int, end: int) -> bytes:
        self._file.seek(start)
        return self._file.read(min(end, self._size) - start)


def _next_start(data: mmap.mmap | _Far, mark: bytes, at: int) -> int:
    """The first document that begins at or after `at`, as whoever reads from the start of the file would find it."""
    size = len(mark)
    found = data.find(mark, max(0, at - size))
    if found < 0:
        return len(data)
    # "\n\n\n" holds "\n\n" twice, and the first counts: go back to a mark that no other overlaps, then forward again
    while (earlier := data.rfind(mark, max(0, found - size + 1), found + size - 1)) >= 0:
        found = earlier
    while found + size < at:
        found = data.find(mark, found + size)
        if found < 0:
            return len(data)
    return found + size


def _stretch(file: BinaryIO, part: Part) -> Iterator[bytes]:
    """The bytes of a part, in chunks."""
    if part.begin:
        file.seek(part.begin)
    left = part.end - part.begin if part.end else None
    while left is None or left > 0:
        chunk = file.read(CHUNK if left is None else min(CHUNK, left))
        if not chunk:
            return
        left = None if left is None else left - len(chunk)
        yield chunk


def _expanded(file: BinaryIO, part: Part) -> Iterator[bytes]:
    """The bytes of a part, decompressed in bounded chunks where the file is compressed."""
    codec = _COMPRESSED.get(suffix_of(part.name) or "")
    if codec is None or part.size == 0:
        yield from _stretch(file, part)
        return
    # unlike the modules made for it, Arrow raises when the compressed stream was cut off
    import pyarrow as pa

    with pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec) as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def _split(chunks: Iterator[bytes], mark: bytes, part: Part, limit: int) -> Iterator[tuple[int, bytes]]:
    """The pieces between marks, and the byte of the stream at which each begins."""
    at, rest = part.begin, bytearray()
    for number, chunk in enumerate(chunks):
        if number == 0 and not part.begin and chunk.startswith(_BOM):
            chunk, at = chunk[len(_BOM) :], len(_BOM)
        # what was searched before is not searched again, or one long document would take quadratic time
        seen = max(0, len(rest) - len(mark) + 1)
        rest += chunk
        if rest.find(mark, seen) >= 0:
            *pieces, tail = bytes(rest).split(mark)
            for piece in pieces:
                if len(piece) > limit:
                    raise _too_long(part, at, limit)
                yield at, piece
                at += len(piece) + len(mark)
            rest = bytearray(tail)
        if len(rest) > limit + len(mark):
            raise _too_long(part, at, limit)
    if rest:
        yield at, bytes(rest)


def _too_long(part: Part, at: int, limit: int) -> DataError:
    return DataError(
        f"{part.name} has a document of more than {limit >> 20} MiB, from byte {at:,} on; cut it into smaller ones"
    )


def _jsonl(chunks: Iterator[bytes], part: Part, field: str) -> Iterator[Document]:
    for line, (at, piece) in enumerate(_split(chunks, b"\n", part, MAX_DOCUMENT), 1):
        if not piece or piece.isspace():
            continue
        try:
            yield json_document(piece, field, f"{part.name}@{at}", "")
        except DataError as error:
            raise DataError(f"{part.name}:{line + _lines_before(part)}{error}") from None


def _lines_before(part: Part) -> int:
    """The lines of the file before this part; counted only when an error must name one."""
    count = 0
    if part.begin:
        with open_input(part.path, part.size) as file:
            for chunk in _stretch(file, replace(part, begin=0, end=part.begin)):
                count += chunk.count(b"\n")
    return count


@contextlib.contextmanager
def _parquet_file(path: str, size: int | None, name: str) -> Iterator[Any]:
    """A Parquet file; what Arrow finds wrong with it becomes a DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_seekable(path, size) as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
            yield file
    except pa.ArrowException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise DataError(f"{name} is no Parquet file, or a damaged one ({reason}); copy it again") from None


def _row_groups(found: Input, slice_bytes: int, field: str) -> list[Part]:
    """Parts of whole row groups."""
    with _parquet_file(found.path, found.size, found.name) as file:
        column = _column(file, field, found.name)
        groups = file.metadata
        sizes = [groups.row_group(g).column(column).total_uncompressed_size for g in range(groups.num_row_groups)]
    parts: list[Part] = []
    begin = total = 0
    for group, size in enumerate(sizes):
        if total and total + size > slice_bytes:
            parts.append(Part("parquet", found.path, found.name, found.size, total, begin, group))
            begin, total = group, 0
        total += size
    return [*parts, Part("parquet", found.path, found.name, found.size, total, begin, len(sizes))]


def _column(file: Any, field: str, name: str) -> int:
    """The index of the column that holds the text."""
    import pyarrow as pa

    schema = file.schema_arrow
    if field not in schema.names:
        raise DataError(
            f"{name} has no column {field!r}, only {', '.join(schema.names[:12])};"
            " set the source's `field` to the column of the text"
        )
    kind = schema.field(field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    if not any(is_text(kind) for is_text in texts):
        raise DataError(f"{name}: the column {field!r} holds {kind}, not text; set the source's `field` to another")
    columns = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
    return columns.index(field)


def _parquet(part: Part, field: str) -> Iterator[Document]:
    with _parquet_file(part.path, part.size, part.name) as file:
        _column(file, field, part.name)
        row = sum(file.metadata.row_group(group).num_rows for group in range(part.begin))
        groups = list(range(part.begin, part.end))
        for batch in file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=[field], use_threads=False):
            for content in _binary(batch.column(0)):
                if content is not None and len(content) > MAX_DOCUMENT:
                    raise DataError(
                        f"{part.name}: row {row:,} has a document of more than {MAX_DOCUMENT >> 20} MiB;"
                        " cut it into smaller ones"
                    )
                yield document(f"{part.name}#{row}", content)
                row += 1


def _binary(column: Any) -> list[bytes | None]:
    """The rows of a column as bytes: Arrow does not check that strings are Unicode, and would raise half way."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary()).to_pylist()
