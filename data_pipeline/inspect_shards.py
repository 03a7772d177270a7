"""Look at a folder of shards: load its manifest, check every byte of it, show what its documents say."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.errors import DataError, UsageError
from data_pipeline import manifest as manifests
from data_pipeline import tokenizer as tokenizers
from data_pipeline.config import DataConfig
from data_pipeline.manifest import HEADER, TABLE, Manifest, ShardInfo, Split
from data_pipeline.places import is_url
from data_pipeline.remote import fetch_small, join
from data_pipeline.shards import Shard

SHOWN = 2000
"""Tokens of a document that `show` decodes."""


class Shown(NamedTuple):
    """A document as people see it: its name, how its text begins, how many tokens it has."""

    name: str
    text: str
    tokens: int


def is_built(data: DataConfig) -> bool:
    """Whether a build of `data.dir` has come to its end: the manifest is written last."""
    if not is_url(data.dir):
        return (Path(data.dir).expanduser() / HEADER).is_file()
    try:
        fetch_small(join(data.dir, HEADER))
    except DataError:
        return False
    return True


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a local folder. Raises DataError when there is none, or it is damaged."""
    try:
        header, table = (folder / HEADER).read_bytes(), (folder / TABLE).read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"no shards in {folder} (there is no {Path(error.filename).name}); run `leviathan data build CONFIG`"
        ) from None
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); check the path") from None
    return manifests.decode(header, table, str(folder))


def check(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """Everything that is wrong with a folder of shards, one sentence each; empty when all is well.

    Every byte that the manifest names is read. `progress` gets the bytes checked so far, and all bytes.
    """
    try:
        manifest = load_manifest(folder)
    except DataError as error:
        return [str(error)]
    problems = [*_check_tokenizer(folder, manifest), *_check_totals(folder, manifest)]
    total, done = int(manifest.column("bytes").sum()), 0
    for row in range(manifest.table.num_rows):
        info = manifest.shard(row)
        problems += _check_shard(folder, info, manifest.tokenizer.vocab)
        done += info.bytes
        progress(done, total)
    return problems


def show(folder: Path, source: str, split: Split, count: int) -> Iterator[Shown]:
    """`count` documents spread evenly over a source, each with the start of its text.

    Raises UsageError for an unknown source, DataError for damaged shards.
    """
    manifest = load_manifest(folder)
    if source not in manifest.sources:
        near = difflib.get_close_matches(source, manifest.sources, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(manifest.sources)}"
        raise UsageError(f"no source {source!r} in {folder}; {hint}")
    tokenizer = tokenizers.load_folder(folder)
    rows = manifest.rows_of(source, split)
    ends = np.cumsum(manifest.column("documents")[rows])
    if not len(rows) or count < 1:
        return
    wanted = np.unique(np.linspace(0, ends[-1] - 1, count).astype(np.int64))
    opened, shard = -1, None
    for document in wanted:
        place = int(np.searchsorted(ends, document, "right"))
        if place != opened or shard is None:
            info = manifest.shard(int(rows[place]))
            opened, shard = place, Shard(folder / info.name, info)
            token_ends, names = shard.ends()[:, 0], shard.names()
        number = int(document - (ends[place - 1] if place else 0))
        start, stop = int(token_ends[number - 1]) if number else 0, int(token_ends[number])
        ids = np.empty(min(stop - start, SHOWN), dtype=np.int64)
        shard.copy(start, start + len(ids), ids)
        yield Shown(names[number], tokenizer.decode(ids), stop - start)


def _check_tokenizer(folder: Path, manifest: Manifest) -> list[str]:
    try:
        found = tokenizers.load_folder(folder)
    except DataError as error:
        return [str(error)]
    stated = manifest.tokenizer
    if (found.sha256, found.vocab) == (stated.sha256, stated.vocab):
        return []
    return [
        f"the tokenizer in {folder} is not the one its shards were made with: found {found.vocab} ids with sha256"
        f" {found.sha256[:12]}…, the manifest says {stated.vocab} with {stated.sha256[:12]}…; copy the right one there"
    ]


def _check_totals(folder: Path, manifest: Manifest) -> list[str]:
    problems = []
    if manifests.fingerprint(manifest.tokenizer, manifest.table) != manifest.fingerprint:
        problems.append(f"{folder}/{HEADER} has a fingerprint that is not that of its shards; build again")
    if unknown := set(manifest.table["source"].to_pylist()) - set(manifest.sources):
        problems.append(f"{folder}/{TABLE} has shards of sources that {HEADER} lacks: {sorted(unknown)}; build again")
    return problems


def _check_shard(folder: Path, info: ShardInfo, vocab: int) -> list[str]:
    try:
        shard = Shard(folder / info.name, info)
        shard.verify()
        ends, names = shard.ends(), shard.names()
        highest = _highest_id(shard)
    except DataError as error:
        return [str(error)]
    last = tuple(map(int, ends[-1])) if len(ends) else (0, 0)
    problems = [
        f"{what} of shard {info.name} is {found:,}, the manifest says {stated:,}; delete it and build again"
        for what, found, stated in (
            ("the number of documents", len(ends), info.documents),
            ("the number of document names", len(names), info.documents),
            ("the number of tokens", last[0], info.tokens),
            ("the number of tokens in blocks", sum(block.tokens for block in shard.blocks), info.tokens),
            ("the bytes of text", last[1], info.text_bytes),
        )
        if found != stated
    ]
    if not info.documents:
        problems.append(f"shard {info.name} has 0 documents; delete it and build again")
    if highest >= vocab:
        problems.append(f"shard {info.name} has the token id {highest}, the vocabulary ends at {vocab - 1}")
    return problems


def _highest_id(shard: Shard) -> int:
    highest, piece = -1, np.empty(1 << 20, dtype=shard.dtype)
    for start in range(0, shard.tokens, len(piece)):
        view = piece[: min(len(piece), shard.tokens - start)]
        shard.copy(start, start + len(view), view)
        highest = max(highest, int(view.max()))
    return highest
