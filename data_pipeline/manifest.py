"""The list of shards: what each holds, how long it is, its hash. Written last, so what it names is whole.

`manifest.json` is a small header; `shards.parquet` beside it has one row a shard, so that a million shards load in
seconds. The header holds the table's sha256, and the table holds every shard's: whoever trusts the header can check
all the rest.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.errors import DataError

HEADER = "manifest.json"
TABLE = "shards.parquet"
FORMAT = 1
Split = Literal["train", "heldout"]
_PLAIN_NAME = r"\A[A-Za-z0-9_][A-Za-z0-9_.-]*\z"

SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("split", pa.string()),
        ("name", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("tokens", pa.int64()),
        ("documents", pa.int64()),
        ("text_bytes", pa.int64()),
        ("index_offset", pa.int64()),
        ("index_sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class TokenizerInfo:
    """What shards say of the tokenizer that made them."""

    spec: str
    sha256: str
    vocab: int


@dataclass(frozen=True)
class ShardInfo:
    """One row of the table: a shard, and what must be true of it.

    tokens, documents: how many it holds. text_bytes: bytes of text they were made from.
    index_offset: where the member `__index__` begins in the tar. index_sha256: of that member's content.
    """

    source: str
    split: Split
    name: str
    bytes: int
    sha256: str
    tokens: int
    documents: int
    text_bytes: int
    index_offset: int
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of a folder of shards.

    fingerprint: sha256 over the tokenizer and every shard; two folders with the same one hold the same data.
    sources: per source, what was counted while building (empty documents, duplicates, Unicode errors ...).
    """

    tokenizer: TokenizerInfo
    table: pa.Table
    sources: dict[str, dict[str, Any]]
    fingerprint: str

    def source_names(self) -> list[str]:
        """The sources in the order they were configured."""
        return list(self.sources)

    def shard(self, row: int) -> ShardInfo:
        """The shard in row `row` of the table."""
        return ShardInfo(**{name: self.table.column(name)[row].as_py() for name in SCHEMA.names})

    def rows_of(self, source: str, split: Split) -> np.ndarray:
        """The table rows (int64) of one source's shards in one split, in building order."""
        return np.flatnonzero(self._is("source", source) & self._is("split", split)).astype(np.int64)

    def column(self, name: str) -> np.ndarray:
        """One numeric column as an array."""
        # dlpack, as to_numpy() and comparing with a Python value import pandas: half a second of every rank's start
        return np.from_dlpack(self.table.column(name).combine_chunks())

    def _is(self, name: str, value: str) -> np.ndarray:
        """Which rows have this value in a column of few different ones."""
        codes = self.table.column(name).dictionary_encode().combine_chunks()
        return np.isin(
            np.from_dlpack(codes.indices), [n for n, v in enumerate(codes.dictionary.to_pylist()) if v == value]
        )

    def total(self, column: str, source: str, split: Split) -> int:
        """The sum of a numeric column over one source's shards in one split."""
        return int(self.column(column)[self.rows_of(source, split)].sum())


def make(tokenizer: TokenizerInfo, shards: list[ShardInfo], sources: dict[str, dict[str, Any]]) -> Manifest:
    """A manifest of `shards`, in the order given."""
    # pa.table would ask whether this is of pandas, and import it to know: a second of every build
    table = pa.Table.from_pydict({name: [getattr(s, name) for s in shards] for name in SCHEMA.names}, schema=SCHEMA)
    return Manifest(tokenizer, table, sources, fingerprint(tokenizer, table))


def encode(manifest: Manifest) -> tuple[bytes, bytes]:
    """The bytes of the header and of the table."""
    buffer = io.BytesIO()
    pq.write_table(manifest.table, buffer, compression="zstd")
    table = buffer.getvalue()
    tokenizer = manifest.tokenizer
    header = {
        "format": FORMAT,
        "fingerprint": manifest.fingerprint,
        "tokenizer": {"spec": tokenizer.spec, "sha256": tokenizer.sha256, "vocab": tokenizer.vocab},
        "sources": manifest.sources,
        "table": {"name": TABLE, "bytes": len(table), "sha256": hashlib.sha256(table).hexdigest()},
    }
    header["sha256"] = _header_hash(header)
    return json.dumps(header, indent=1).encode(), table


def decode(header_bytes: bytes, table_bytes: bytes, where: str) -> Manifest:
    """The manifest that `encode` wrote. `where` names the folder in errors.

    Raises DataError when either part is damaged or of another format.
    """
    header = decode_header(header_bytes, where)
    expected = header["table"]
    found = hashlib.sha256(table_bytes).hexdigest()
    if found != expected["sha256"]:
        raise DataError(
            f"{where}/{TABLE} is damaged: {len(table_bytes)} bytes with sha256 {found[:12]}…, the manifest says"
            f" {expected['bytes']} bytes with {expected['sha256'][:12]}…; build or copy the shards again"
        )
    # not io.BytesIO, which would hand over copies of what is there already
    table = pq.ParquetFile(pa.BufferReader(table_bytes)).read().cast(SCHEMA)
    strange = table.filter(pc.invert(pc.match_substring_regex(table["name"], _PLAIN_NAME)))
    if len(strange):
        # names become paths, and a manifest may come from anywhere
        raise DataError(
            f"{where}/{TABLE} names the shard {strange['name'][0].as_py()!r}, which is no plain file name; do not use"
            " these shards unless you know who made them"
        )
    return Manifest(TokenizerInfo(**header["tokenizer"]), table, header["sources"], header["fingerprint"])


def decode_header(header_bytes: bytes, where: str) -> dict[str, Any]:
    """The checked content of `manifest.json`."""
    try:
        header = json.loads(header_bytes)
        stated = header.pop("sha256")
        computed = _header_hash(header)
        damaged = stated != computed
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{where}/{HEADER} is damaged (not what was written); build or copy the shards again") from None
    if damaged:
        raise DataError(
            f"{where}/{HEADER} is damaged: its own sha256 says {str(stated)[:12]}…, its content has"
            f" {computed[:12]}…; build or copy the shards again"
        )
    if header.get("format") != FORMAT:
        raise DataError(f"{where}/{HEADER} has format {header.get('format')}, this version reads {FORMAT}; build again")
    return header


def _header_hash(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def fingerprint(tokenizer: TokenizerInfo, table: pa.Table) -> str:
    """The sha256 over the tokenizer and every shard's name, hash and tokens."""
    digest = hashlib.sha256(f"{FORMAT} {tokenizer.sha256} {tokenizer.vocab}\n".encode())
    columns = [table.column(name).to_pylist() for name in ("source", "split", "name", "sha256", "tokens")]
    for row in zip(*columns):
        digest.update(" ".join(map(str, row)).encode() + b"\n")
    return digest.hexdigest()
