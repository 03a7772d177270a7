"""Builds that cannot be, or are not what they were: each is told in a sentence, and nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError, DataError, LeviathanError
from data_pipeline import build as builder
from data_pipeline.build import Progress, build
from data_pipeline.config import DataConfig
from data_pipeline.output import output_of
from tests.data_pipeline.building import Config, Hashes, jsonl


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
def test_a_source_without_text_is_said(tmp_path: Path, config: Config, says: Any, duplicates: str) -> None:
    (tmp_path / "a.txt").write_text(" \n ")
    with pytest.raises(DataError) as error:
        build(config({"s": tmp_path}, duplicates=duplicates), tmp_path / "out", workers=1)
    says(error, "source 's' is empty", "gave 0 documents", "1 documents hold only whitespace", "check its path")


def test_no_sources_and_wrong_tokenizers_are_said_before_any_work(tmp_path: Path, config: Config) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources is empty; name a source"):
        build(config({}), tmp_path / "out", workers=1)
    with pytest.raises(ConfigError, match="did you mean 'bytes'"):
        build(config({"s": "stdlib"}, tokenizer="byte"), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heldout": 0.5}, ["heldout: 0.05 there, 0.5 now"]),
        ({"tokenizer": "sp:300"}, ['tokenizer.spec: "bytes" there, "sp:300" now']),
        ({"shard_mib": 8.0}, ["shard_mib: 0.04 there, 8.0 now"]),
        ({"duplicates": "keep"}, ['duplicates: "drop" there, "keep" now']),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_build_is_left_alone(
    tmp_path: Path,
    data: DataConfig,
    hashes: Hashes,
    says: Any,
    change: dict[str, Any],
    words: list[str],
    finished: bool,
) -> None:
    out = tmp_path / "out"
    build(data, out, workers=1)
    if not finished:
        (out / "manifest.json").unlink()
    before = hashes(out)
    with pytest.raises(ConfigError) as error:
        build(data.model_copy(update=change), out, workers=1)
    says(error, "holds shards of another build", *words, "choose another data.dir, or build with rebuild")
    assert hashes(out) == before


def test_changed_files_are_another_build(tmp_path: Path, tale: Path, data: DataConfig, says: Any) -> None:
    build(data, tmp_path / "out", workers=1)
    (tale / "c.txt").write_text("one more")
    with pytest.raises(ConfigError) as error:
        build(data, tmp_path / "out", workers=1)
    says(error, "sources.tale.files: 2 there, 3 now", "sources.again.bytes:")
    (tale / "c.txt").rename(tale / "d.txt")
    build(data, tmp_path / "out", workers=1, rebuild=True)
    (tale / "d.txt").rename(tale / "c.txt")
    with pytest.raises(ConfigError, match=r"sources\.tale\.files: others than now"):
        build(data, tmp_path / "out", workers=1)


def test_weights_and_places_may_change(tmp_path: Path, data: DataConfig) -> None:
    build(data, tmp_path / "out", workers=1)
    sources = {name: source.model_copy(update={"weight": 7.0}) for name, source in data.sources.items()}
    changed = data.model_copy(update={"sources": sources, "window": 3, "cache_gib": 1.0})
    build(changed, tmp_path / "out", workers=1, progress=lambda progress: pytest.fail("work was done"))


def test_rebuild_replaces_what_builds_wrote_and_nothing_else(tmp_path: Path, data: DataConfig, hashes: Hashes) -> None:
    out = tmp_path / "out"
    build(data.model_copy(update={"tokenizer": "sp:300", "shard_mib": 0.01}), out, workers=1)
    (out / "notes.md").write_text("mine")
    (out / "other-train.tar").write_text("mine")
    build(data, out, workers=1, rebuild=True)
    build(data, tmp_path / "fresh", workers=1)
    mine = {"notes.md", "other-train.tar"}
    assert {name: digest for name, digest in hashes(out).items() if name not in mine} == hashes(tmp_path / "fresh")
    assert mine <= set(hashes(out))


def test_shards_from_elsewhere_are_not_overwritten(tmp_path: Path, data: DataConfig, hashes: Hashes) -> None:
    build(data, tmp_path / "a", workers=1)
    shutil.rmtree(tmp_path / "a" / ".build")
    before = hashes(tmp_path / "a")
    with pytest.raises(ConfigError, match="holds shards, and no plan says what they were made from"):
        build(data, tmp_path / "a", workers=1)
    assert hashes(tmp_path / "a") == before


def test_two_builds_do_not_share_a_folder(tmp_path: Path, data: DataConfig) -> None:
    with output_of(tmp_path / "out").alone(), pytest.raises(ConfigError, match="another build is at work in"):
        build(data, tmp_path / "out", workers=1)
    build(data, tmp_path / "out", workers=1)


def test_text_that_changes_between_scan_and_encoding_is_found(tmp_path: Path, config: Config, says: Any) -> None:
    jsonl(tmp_path / "a.jsonl", ["one", "two"])

    def change(progress: Progress) -> None:
        jsonl(tmp_path / "a.jsonl", ["one", "owt"])

    with pytest.raises(DataError) as error:
        build(config({"s": tmp_path / "a.jsonl"}), tmp_path / "out", workers=1, progress=change)
    says(error, "slice 0 of source 's' changed since it was scanned", "rebuild")
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_full_disk_is_said_and_leaves_no_draft(
    tmp_path: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch, says: Any
) -> None:
    written = 0
    room = 1 << 30

    def write(handle: int) -> None:
        nonlocal written
        written += 1
        if written > room:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", write)
    build(data, tmp_path / "whole", workers=1)
    total = written
    for rest, what in ((total, "the plan"), (total - 9, "slice"), (total // 2, "slice"), (1, "the plan")):
        written, room = 0, total - rest
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with pytest.raises(LeviathanError) as error:
            build(data, tmp_path / "out", workers=1)
        says(error, "is full", f"while writing {what}", "make room and build again", "finished slices are kept")
        assert not list((tmp_path / "out").rglob("*.tmp"))
    room = 1 << 30
    monkeypatch.setattr(builder, "free_bytes", lambda folder: 1000)
    with pytest.raises(LeviathanError) as error:
        build(data, tmp_path / "new", workers=1)
    says(error, "the shards need at least", "1.0 kB are free", "make room")


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, data: DataConfig) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\); choose another data\.dir"):
        build(data, tmp_path / "file" / "out", workers=1)


def test_secrets_of_urls_are_not_written_down(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    file = jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(5)])

    class Web:
        def info(self, url: str) -> dict[str, Any]:
            assert url.endswith("?sig=SECRET")
            return {"size": file.stat().st_size}

        def open(self, url: str, mode: str, **options: Any) -> Any:
            return file.open(mode)

    monkeypatch.setattr("data_pipeline.places.filesystem", lambda url: Web())
    out = tmp_path / "out"
    manifest = build(config({"s": "https://me:SECRET@host/a.jsonl?sig=SECRET"}), out, workers=1)
    assert manifest.sources["s"]["path"] == "https://host/a.jsonl"
    assert not [path for path in out.rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]
