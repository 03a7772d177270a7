"""Read the text members of a plain tar as a stream: nothing is extracted, nothing is guessed, nothing is executed.

Python's tarfile ends quietly where a header is damaged or the file was cut off, and follows sizes and links it was
told by whoever made the file. Here a tar is whole or refused: every header's checksum must hold, the end must be
marked, and the only members are plain .txt and .json files of a bounded size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from configs.errors import DataError
from data_pipeline.documents import MAX_DOCUMENT, Document, document, json_document

Read = Callable[[int], bytes]

BLOCK = 512
MAX_NAME = 4096
MAX_EXTENDED = 1 << 16
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_KINDS |= {b"S": "a sparse file", b"D": "a folder dump", b"M": "a part of a split file", b"V": "a volume label"}
_FILE, _FOLDER, _LONG_NAME, _LONG_LINK, _PAX, _PAX_ALL = (b"0", b"\0", b"7"), b"5", b"L", b"K", b"x", b"g"


@dataclass(frozen=True)
class _Header:
    name: str
    kind: bytes
    size: int


def tar_documents(read: Read, field: str, where: str) -> Iterator[Document]:
    """The documents of a tar: each .txt member, and the text under `field` of each .json member.

    A .json beside a .txt of the same name describes it (as in webdataset) and is no document of its own.
    Raises DataError for a tar that is damaged, cut off or compressed, and for any other kind of member.
    """
    held: tuple[str, bytes] | None = None  # a .json whose .txt may still follow
    last_text = ""
    for name, content in _members(read, where):
        stem, suffix = _stem(name), PurePosixPath(name).suffix
        if held is not None and not (suffix == ".txt" and _stem(held[0]) == stem):
            yield _from_json(*held, field, where)
        held = None
        if suffix == ".txt":
            last_text = stem
            yield document(f"{where}/{name}", content)
        elif stem != last_text:
            held = (name, content)
    if held is not None:
        yield _from_json(*held, field, where)


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _from_json(name: str, content: bytes, field: str, where: str) -> Document:
    return json_document(content, field, f"{where}/{name}", f"{where}: member {name!r}")


def _members(read: Read, where: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of every text member."""
    long_name: str | None = None
    long_size: int | None = None
    while (header := _header(read, where)) is not None:
        if header.kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_ALL):
            content = _content(read, header, MAX_EXTENDED, where)
            if header.kind == _LONG_NAME:
                long_name = _text(content)
            elif header.kind == _PAX:
                records = _pax(content, where)
                long_name = records.get("path", long_name)
                long_size = _pax_size(records, where)
            continue
        name = long_name if long_name is not None else header.name
        size = long_size if long_size is not None else header.size
        long_name = long_size = None
        if len(name) > MAX_NAME:
            raise DataError(f"{where} has a member whose name is {len(name):,} letters long; the limit is {MAX_NAME:,}")
        if header.kind == _FOLDER or (header.kind in _FILE and name.endswith("/") and not size):
            continue
        if header.kind not in _FILE:
            what = _KINDS.get(header.kind, f"of the unknown type {header.kind!r}")
            raise DataError(f"{where}: member {name!r} is {what}; only plain files are read from a tar")
        if PurePosixPath(name).suffix not in (".txt", ".json"):
            raise DataError(f"{where}: member {name!r} is neither .txt nor .json, and nothing else is read from a tar")
        yield name, _content(read, _Header(name, header.kind, size), MAX_DOCUMENT, where)


def _header(read: Read, where: str) -> _Header | None:
    """The next header, or None at the mark that ends the tar."""
    block = _exactly(read, BLOCK, where)
    if not any(block):
        return None
    stated = _number(block[148:156])
    # the checksum was computed with its own field full of spaces
    if stated != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise DataError(
            f"{where} is damaged or no plain tar (a header's checksum is wrong); copy it again or unpack it"
        )
    size = _number(block[124:136])
    if size is None or size < 0:
        raise DataError(f"{where} is damaged (a member has the size {_text(block[124:136])!r}); copy it again")
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and (prefix := _text(block[345:500])):
        name = f"{prefix}/{name}"
    return _Header(name, block[156:157], size)


def _content(read: Read, header: _Header, limit: int, where: str) -> bytes:
    if header.size > limit:
        raise DataError(
            f"{where}: member {header.name!r} has {header.size:,} bytes; the limit is {limit:,}, cut it into documents"
        )
    content = _exactly(read, header.size, where)
    _exactly(read, -header.size % BLOCK, where)
    return content


def _exactly(read: Read, size: int, where: str) -> bytes:
    content = bytearray()
    while len(content) < size:
        piece = read(min(size - len(content), 1 << 20))
        if not piece:
            raise DataError(f"{where} is cut off: it ends before the mark that ends a tar; copy it again")
        content += piece
    return bytes(content)


def _number(field: bytes) -> int | None:
    """A tar number: octal digits, or big-endian after a byte 0x80. None: neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    if not digits:
        return 0
    return int(digits, 8) if all(byte in b"01234567" for byte in digits) else None


def _pax(content: bytes, where: str) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of an extended header."""
    records: dict[str, str] = {}
    while content:
        length, _, rest = content.partition(b" ")
        size = int(length) if length.isdigit() and len(length) < 8 else 0
        record, content = rest[: max(0, size - len(length) - 1)], content[size:] if size else b""
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise DataError(f"{where} is damaged (an extended header that cannot be read); copy it again")
        if key.startswith(b"GNU.sparse"):
            raise DataError(f"{where} has a sparse file; only plain files are read from a tar")
        records[_text(key)] = _text(value[:-1])
    return records


def _pax_size(records: dict[str, str], where: str) -> int | None:
    size = records.get("size")
    if size is not None and not (size.isascii() and size.isdigit() and len(size) < 20):
        raise DataError(f"{where} is damaged (a member has the size {size[:20]!r}); copy it again")
    return None if size is None else int(size)


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "replace")
