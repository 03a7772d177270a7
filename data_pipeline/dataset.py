"""A folder of shards, here or far away, opened for reading: manifest, tokenizer, shards."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.errors import ConfigError, DataError
from data_pipeline import manifest as manifests
from data_pipeline import tokenizer as tokenizers
from data_pipeline.config import DataConfig
from data_pipeline.files import human_bytes
from data_pipeline.inspect_shards import load_manifest
from data_pipeline.loader import ShardSet
from data_pipeline.manifest import HEADER, TABLE, Manifest
from data_pipeline.places import is_url, public
from data_pipeline.remote import ShardCache, fetch_small, join
from data_pipeline.tokenizer import Tokenizer


@dataclass(frozen=True)
class Dataset:
    """What training and evaluation read."""

    manifest: Manifest
    tokenizer: Tokenizer
    shards: ShardSet


def open_dataset(data: DataConfig, rank: int = 0, world: int = 1) -> Dataset:
    """Open `data.dir` and check that it holds what the configuration asks for.

    Of `world` ranks, each looks at the sizes of its share of the shards, so that all of them together look at each
    shard once, however many they are.

    Raises DataError where there are no shards, the tokenizer is another, a source is missing, or, for a local folder,
    a shard is missing or of another size; ConfigError where a window of remote shards does not fit their cache.
    """
    if is_url(data.dir):
        manifest, tokenizer, shards = _open_remote(data)
    else:
        folder = Path(data.dir).expanduser()
        manifest, tokenizer = load_manifest(folder), tokenizers.load_folder(folder)
        _check_sizes(folder, manifest, rank, world)
        shards = ShardSet(manifest, lambda info: folder / info.name)
    _check_belongs(data, manifest, tokenizer)
    return Dataset(manifest, tokenizer, shards)


def _open_remote(data: DataConfig) -> tuple[Manifest, Tokenizer, ShardSet]:
    url, where = data.dir, public(data.dir).rstrip("/")
    manifest = manifests.decode(fetch_small(join(url, HEADER)), fetch_small(join(url, TABLE)), where)
    if not re.fullmatch("[0-9a-f]{64}", manifest.fingerprint):
        # it becomes a folder's name, and a manifest may come from anywhere
        raise DataError(
            f"{where}/{HEADER} has the fingerprint {manifest.fingerprint!r}, which is no sha256; do not use these"
            " shards unless you know who made them"
        )
    model = None if manifest.tokenizer.spec == "bytes" else fetch_small(join(url, tokenizers.MODEL))
    tokenizer = tokenizers.load(fetch_small(join(url, tokenizers.HEADER)), model, where)
    limit = int(data.cache_gib * 2**30)
    _check_window(data, manifest, limit)
    cache = ShardCache(url, Path(data.cache_dir).expanduser() / manifest.fingerprint[:16], limit)
    return manifest, tokenizer, ShardSet(manifest, cache.locate, cache.expect)


def _check_window(data: DataConfig, manifest: Manifest, limit: int) -> None:
    """Shards that are read together must fit the cache together, or they would be fetched again and again."""
    sizes = [np.sort(manifest.column("bytes")[manifest.rows_of(name, "train")])[::-1] for name in data.sources]
    need = sum(int(source[: data.window].sum()) for source in sizes)
    if need > limit:
        what = f"{data.window} shards of each source" if data.window else "all shards, as data.window is not set,"
        raise ConfigError(
            f"shuffling {what} takes {human_bytes(need)} on disk, but data.cache_gib allows {human_bytes(limit)};"
            " raise it, or set data.window lower"
        )


def _check_sizes(folder: Path, manifest: Manifest, rank: int, world: int) -> None:
    """Fail before step 0 rather than at the first read: compare shards' sizes with the manifest."""
    mine = np.arange(rank, manifest.table.num_rows, world)
    names = manifest.table.column("name")
    # one by one: pyarrow's take() imports pandas, half a second of every rank's start
    for at, size in zip(mine.tolist(), manifest.column("bytes")[mine].tolist()):
        name = names[at].as_py()
        try:
            found: int | None = (folder / name).stat().st_size
        except FileNotFoundError:
            found = None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise DataError(
                f"shard {folder / name} {state}, the manifest says {size:,} bytes; build or copy it again"
                " (`leviathan data check` lists all that are wrong)"
            )


def _check_belongs(data: DataConfig, manifest: Manifest, tokenizer: Tokenizer) -> None:
    stated = manifest.tokenizer
    if tokenizer.sha256 != stated.sha256 or tokenizer.vocab != stated.vocab:
        raise DataError(
            f"the tokenizer in {public(data.dir)} (sha256 {tokenizer.sha256[:12]}…, vocabulary {tokenizer.vocab}) is"
            f" not the one its shards were made with ({stated.sha256[:12]}…, {stated.vocab}); put that one back or"
            " build again"
        )
    if data.tokenizer != stated.spec and not data.tokenizer.endswith(".model"):
        raise DataError(
            f"data.tokenizer is {data.tokenizer!r}, but the shards in {public(data.dir)} were made with"
            f" {stated.spec!r}; set it to that, or build shards in another data.dir"
        )
    missing = [name for name in data.sources if name not in manifest.sources]
    if missing or not data.sources:
        what = f"no source {missing[0]!r}" if missing else "sources, but data.sources names none"
        raise DataError(
            f"{public(data.dir)} has {what}; it has {', '.join(manifest.sources)};"
            " name some of those under data.sources"
        )
