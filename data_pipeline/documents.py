"""What is passed between the places text comes from and the builder: documents, and the slices they are read in."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Literal

from configs.errors import DataError

Kind = Literal["text", "jsonl", "parquet", "tar", "stdlib", "headers", "docs", "topics", "unicode"]
Problem = Literal["empty", "unicode"]

MAX_DOCUMENT = 64 << 20
"""Bytes that one document of a collection (.jsonl, .tar, .parquet, a .txt with separators) may have."""

MAX_TEXT = 1 << 30
"""Bytes that a .txt file which is one document may have."""

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Document:
    """A text and what it is called. `problem`: only whitespace in it, or bytes that were no Unicode (now U+FFFD)."""

    name: str
    text: str
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of one input, the least that is read at a time.

    path: where it is opened, a local path or a URL; for embedded text relative to where that text lies.
    name: what its documents are called, the same on every machine.
    size: bytes of the input when it was planned (None: not known before it is read).
    begin, end: bytes of a text file, row groups of a Parquet file, code points; 0, 0 is all of it.
    text_bytes: the text to expect, for progress and for even slices.
    """

    kind: Kind
    path: str
    name: str
    size: int | None
    text_bytes: int
    begin: int = 0
    end: int = 0


@dataclass(frozen=True, slots=True)
class Slice:
    """The parts of one source that one task reads, in order. Equal plans give equal slices, so equal shards.

    limit_bytes: read no more text than this; the document that crosses it is cut there.
    """

    source: str
    number: int
    parts: tuple[Part, ...]
    field: str = "text"
    separator: str | None = None
    limit_bytes: int | None = None

    @property
    def text_bytes(self) -> int:
        """The text to expect."""
        expected = sum(part.text_bytes for part in self.parts)
        return expected if self.limit_bytes is None else min(expected, self.limit_bytes)


def document(name: str, content: bytes | str | None) -> Document:
    """A document from what a file holds for it: bytes are read as UTF-8; None, as databases have it, is empty text."""
    damaged = False
    if content is None:
        text = ""
    elif isinstance(content, bytes):
        try:
            text = content.decode()
        except UnicodeDecodeError:
            text, damaged = content.decode("utf-8", "replace"), True
    else:
        text = content
        try:
            content.encode()
        except UnicodeEncodeError:
            # JSON can say half of a surrogate pair, which no encoding can write down
            text, damaged = _SURROGATE.sub("\ufffd", content), True
    problem: Problem | None = "unicode" if damaged else "empty" if not text or text.isspace() else None
    return Document(printable(name), text, problem)


def json_document(content: bytes, field: str, name: str, where: str) -> Document:
    """The document under `field` of one JSON object. `where` stands before errors. Raises DataError."""
    try:
        text, damaged = content.decode(), False
    except UnicodeDecodeError:
        text, damaged = content.decode("utf-8", "replace"), True
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise DataError(f"{where}: found {text[:40]!r}, not a JSON object; each document is one object")
    found = record.get(field, record)
    if found is record:
        keys = ", ".join(repr(key[:40]) for key in list(record)[:8]) or "none"
        raise DataError(f"{where}: no key {field!r}, found {keys}; set the source's `field` to the key of the text")
    if found is not None and not isinstance(found, str):
        raise DataError(
            f"{where}: {field!r} holds {type(found).__name__}, not text;"
            " set the source's `field` to the key of the text"
        )
    made = document(name, found)
    return replace(made, problem="unicode") if damaged and made.problem is None else made


def printable(name: str) -> str:
    """A name from outside that cannot break a line or command a terminal."""
    return name if name.isprintable() else "".join(c if c.isprintable() else "?" for c in name)


def cut_text(text: str, size: int) -> str:
    """The longest head of `text` that has at most `size` bytes of UTF-8."""
    return text.encode()[:size].decode("utf-8", "ignore")
