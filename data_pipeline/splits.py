"""What becomes of a document: used or refused, trained on or held out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from configs.errors import DataError
from data_pipeline.corpora import read
from data_pipeline.documents import Document, Slice
from data_pipeline.manifest import Split

HASH_BYTES = 16


@dataclass(frozen=True)
class Rules:
    """What becomes of a document. Texts whose hash, as a number, is below `heldout_below` are held out.

    tail: instead, every document is cut in two, and its last `heldout` of all characters is held out.
    """

    unicode_errors: Literal["replace", "skip", "fail"]
    heldout: float
    heldout_below: int
    tail: bool = False


def hash_number(digest: bytes) -> int:
    """The number below 2^64 that decides whether a text is held out; equal texts always share their fate."""
    return int.from_bytes(digest[:8], "little")


@dataclass
class Counts:
    """What was met while reading. documents, text_bytes: of those that are used. read_bytes: of all text read."""

    documents: int = 0
    empty: int = 0
    unicode_errors: int = 0
    duplicates: int = 0
    text_bytes: int = 0
    read_bytes: int = 0


class Usable(NamedTuple):
    """A document that is neither empty nor refused; the hash of its text."""

    document: Document
    digest: bytes
    text_bytes: int


class Piece(NamedTuple):
    """What is encoded as one document. `ends`: it ends where its document ends."""

    split: Split
    name: str
    text: str
    ends: bool


def usable(part: Slice, rules: Rules, counts: Counts) -> Iterator[Usable]:
    """The documents of a slice that may be used; the others are counted. Raises DataError where the rules say fail."""
    for document in read(part):
        raw = document.text.encode()
        counts.read_bytes += len(raw)
        if document.problem == "empty":
            counts.empty += 1
            continue
        if document.problem == "unicode":
            counts.unicode_errors += 1
            if rules.unicode_errors == "fail":
                raise DataError(
                    f"document {document.name!r} of source {part.source!r} is not UTF-8; save it as UTF-8,"
                    " or set data.unicode_errors to replace or skip"
                )
            if rules.unicode_errors == "skip":
                continue
        yield Usable(document, hashlib.blake2b(raw, digest_size=HASH_BYTES).digest(), len(raw))


def divide(document: Document, digest: bytes, rules: Rules) -> list[Piece]:
    """A document whole, in train or heldout; or, where documents are few, its head in train and its tail in heldout."""
    name, text = document.name, document.text
    if not rules.tail:
        return [Piece("heldout" if hash_number(digest) < rules.heldout_below else "train", name, text, True)]
    size = min(len(text) - 1, math.ceil(len(text) * rules.heldout))
    if size < 1:
        return [Piece("train", name, text, True)]
    # the head does not end where its document ends, and a model should not learn that it does
    head = Piece("train", f"{name}#head", text[:-size], False)
    return [head, Piece("heldout", f"{name}#tail", text[-size:], True)]
