"""What tests of builds look at: documents as the tokens of shards say them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from data_pipeline.config import DataConfig
from data_pipeline.inspect_shards import load_manifest
from data_pipeline.manifest import Split
from data_pipeline.shards import Shard
from data_pipeline.tokenizer import load_folder

Config = Callable[..., DataConfig]
Hashes = Callable[[Path], dict[str, str]]


def decoded(folder: Path, source: str, split: Split) -> dict[str, str]:
    """Every document of a source by its name, as its tokens say; eod becomes ¶."""
    manifest, tokenizer = load_manifest(folder), load_folder(folder)
    found: dict[str, str] = {}
    for row in manifest.rows_of(source, split):
        info = manifest.shard(int(row))
        shard = Shard(folder / info.name, info)
        ids = np.empty(shard.tokens, dtype=np.int64)
        shard.copy(0, shard.tokens, ids)
        start = 0
        for name, (end, _) in zip(shard.names(), shard.ends().tolist(), strict=True):
            document = ids[start:end]
            found[name] = tokenizer.decode(document) + "¶" * int((document == tokenizer.eod).sum())
            assert (document[:-1] != tokenizer.eod).all()
            start = end
    return found


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
