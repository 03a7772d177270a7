"""Where text comes from: a source of the configuration becomes slices, and a slice becomes documents.

    plan(name, source, slice_bytes)   look at what there is; decide who reads what; read no text
    read(slice)                       the documents of one slice, in order

Equal inputs give equal slices and documents on every machine, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from data_pipeline import embedded, textfiles
from data_pipeline.config import SourceConfig
from data_pipeline.documents import Document, Part, Slice, cut_text, document
from data_pipeline.places import explained, find


@dataclass(frozen=True)
class Plan:
    """The slices of a source, and how many files were passed over because their kind is not known."""

    slices: tuple[Slice, ...]
    skipped_files: int

    @property
    def text_bytes(self) -> int:
        """The text to expect."""
        return sum(part.text_bytes for part in self.slices)


def plan(name: str, source: SourceConfig, slice_bytes: int) -> Plan:
    """Deal the inputs of a source to slices of about `slice_bytes` of text.

    Raises ConfigError for a path that is never read, DataError where there is nothing to read.
    """
    parts, skipped = _parts(source, slice_bytes)
    slices = tuple(
        Slice(name, number, group, source.field, source.separator)
        for number, group in enumerate(_packed(parts, slice_bytes))
    )
    return Plan(slices, skipped)


def read(part: Slice) -> Iterator[Document]:
    """The documents of a slice, empty ones too. Raises DataError for what cannot be read."""
    documents = _documents(part)
    return documents if part.limit_bytes is None else _limited(documents, part.limit_bytes)


def _parts(source: SourceConfig, slice_bytes: int) -> tuple[list[Part], int]:
    if source.path in embedded.EMBEDDED:
        with explained(source.path):
            return embedded.parts_of(source.path), 0
    found = find(source.path)
    parts: list[Part] = []
    for one in found.inputs:
        with explained(one.path):
            parts += textfiles.parts_of(one, slice_bytes, source.field, source.separator)
    return parts, found.skipped


def _packed(parts: list[Part], slice_bytes: int) -> Iterator[tuple[Part, ...]]:
    """Neighbours together while they do not exceed `slice_bytes`."""
    group: list[Part] = []
    total = 0
    for part in parts:
        if group and total + part.text_bytes > slice_bytes:
            yield tuple(group)
            group, total = [], 0
        group.append(part)
        total += part.text_bytes
    if group:
        yield tuple(group)


def _documents(part: Slice) -> Iterator[Document]:
    for one in part.parts:
        with explained(one.path):
            if one.kind in ("stdlib", "headers", "docs", "topics", "unicode"):
                yield from embedded.read_part(one)
            else:
                yield from textfiles.read_part(one, part.field, part.separator)


def _limited(documents: Iterator[Document], limit: int) -> Iterator[Document]:
    left = limit
    for found in documents:
        size = len(found.text.encode())
        if size >= left:
            head = document(found.name, cut_text(found.text, left))
            yield replace(head, problem=head.problem or found.problem)
            return
        left -= size
        yield found
