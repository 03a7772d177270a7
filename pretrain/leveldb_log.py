"""The log that wandb writes is LevelDB's: blocks of 32 KiB, records cut into chunks, each with a checksum."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

MAGIC, HEADER_BYTES, BLOCK_BYTES = b":W&B", 7, 32768
CHUNK, FULL, FIRST, LAST = struct.Struct("<IHB"), 1, 2, 4


def log_records(data: bytes) -> Iterator[bytes]:
    """The whole records of a W&B log, up to its end or the first damage: a crash tears the tail."""
    position, parts = HEADER_BYTES if data.startswith(MAGIC) else len(data), b""
    while position + CHUNK.size <= len(data):
        room = BLOCK_BYTES - position % BLOCK_BYTES
        if room < CHUNK.size:
            position += room
            continue
        checksum, length, kind = CHUNK.unpack_from(data, position)
        start, position = position + CHUNK.size, position + CHUNK.size + length
        content = data[start:position]
        if len(content) < length or zlib.crc32(content, zlib.crc32(bytes([kind]))) != checksum:
            return
        parts = content if kind in (FULL, FIRST) else parts + content
        if kind in (FULL, LAST):
            yield parts
