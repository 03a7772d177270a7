"""Where text comes from, how it becomes shards, and how shards are read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from configs.schema import Config, key


class SourceConfig(Config):
    """One source of text."""

    path: str = key(
        ..., "match",
        "`stdlib`, `headers`, `docs`, `unicode` (text every machine has), or a file, folder, glob or URL"
        " of .txt, .jsonl(.gz|.zst), .parquet or .tar",
    )  # fmt: skip
    weight: float = key(1.0, "record", "share of the training rows, relative to the other sources", gt=0)
    field: str = key("text", "match", "the field or column that holds the text (.jsonl, .parquet)")
    separator: str | None = key(
        None, "match", "cut .txt files into documents at this text; left out: a file is one document", min_length=1
    )
    limit_mib: float | None = key(None, "match", "take at most this much text, from the start of the source", gt=0)


class DataConfig(Config):
    """Text, tokenizer, shards and the order they are read in."""

    dir: str = key("shards/demo", "free", "folder or URL of the shards")
    tokenizer: str = key(
        "bytes", "match", "`bytes`, `sp:4096` (unigram), `sp-bpe:4096`, or a sentencepiece .model file"
    )
    tokenizer_sample_mib: float = key(16.0, "match", "text that a new tokenizer is trained on", gt=0)
    sources: dict[str, SourceConfig] = key(
        {}, "match", "the sources of text, by a name of yours; `NAME: ~` leaves out one that an earlier file names"
    )
    heldout: float = key(0.01, "match", "share of the documents kept for evaluation, never trained on", ge=0, lt=1)
    unicode_errors: Literal["replace", "skip", "fail"] = key(
        "replace", "match", "what to do with a document that is not UTF-8"
    )
    duplicates: Literal["drop", "keep"] = key("drop", "match", "what to do with a document seen before in its source")
    shard_mib: float = key(256.0, "match", "size of a shard", gt=0, le=1024)
    window: int | None = key(
        None,
        "match",
        "shards shuffled together, and kept on disk by a remote run; empty: all of a source",
        gt=0,
    )
    cache_dir: str = key("~/.cache/leviathan/shards", "free", "where remote shards are kept")
    cache_gib: float = key(100.0, "free", "the most that remote shards may take on disk", gt=0)

    @field_validator("sources", mode="before")
    @classmethod
    def _some_are_left_out(cls, sources: Any) -> Any:
        if not isinstance(sources, dict):
            return sources
        return {name: source for name, source in sources.items() if source is not None}

    @field_validator("sources")
    @classmethod
    def _names_are_plain(cls, sources: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        for name in sources:
            if not (name.isidentifier() and name.isascii()):
                raise ValueError(f"holds the name {name!r}; use letters, digits and _, starting with a letter")
        return sources
