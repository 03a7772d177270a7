from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from configs.errors import DataError
from data_pipeline import manifest as manifests
from data_pipeline.inspect_shards import load_manifest
from data_pipeline.manifest import HEADER, TABLE, Manifest, ShardInfo, TokenizerInfo


def info(source: str, split: Any, number: int, name: str | None = None) -> ShardInfo:
    name = f"{source}-{split}-{number:05d}-00.tar" if name is None else name
    digest = hashlib.sha256(name.encode()).hexdigest()
    return ShardInfo(source, split, name, 10_000 + number, digest, 4000 + number, 7, 12_345, 8192, digest)


def make(*names: str) -> Manifest:
    shards = [info(source, split, n) for source in ("code", "web") for split in ("train", "heldout") for n in range(3)]
    shards += [info("code", "train", 9, name) for name in names]
    counts = {"code": {"path": "./Schrödinger", "documents": 42}, "web": {"path": "web", "documents": 42}}
    return manifests.make(TokenizerInfo("bytes", "ab" * 32, 257), shards, counts)


def save(folder: Path, manifest: Manifest) -> Path:
    header, table = manifests.encode(manifest)
    (folder / HEADER).write_bytes(header)
    (folder / TABLE).write_bytes(table)
    return folder


def test_what_was_encoded_is_decoded(tmp_path: Path) -> None:
    wanted, found = make(), load_manifest(save(tmp_path, make()))
    assert (found.tokenizer, found.sources, found.fingerprint) == (wanted.tokenizer, wanted.sources, wanted.fingerprint)
    assert found.table.equals(wanted.table)
    assert found.source_names() == ["code", "web"]
    assert found.shard(4) == info("code", "heldout", 1)


def test_rows_and_totals_belong_to_a_source_and_a_split() -> None:
    manifest = make()
    assert manifest.rows_of("web", "train").tolist() == [6, 7, 8]
    assert manifest.rows_of("nobody", "train").tolist() == []
    assert manifest.total("tokens", "web", "train") == 4000 + 4001 + 4002


def test_equal_contents_give_equal_bytes() -> None:
    assert manifests.encode(make()) == manifests.encode(make())


def test_the_fingerprint_depends_on_every_shard_and_the_tokenizer() -> None:
    manifest = make()
    shards = [manifest.shard(row) for row in range(manifest.table.num_rows)]
    assert manifests.make(manifest.tokenizer, shards[::-1], {}).fingerprint != manifest.fingerprint
    assert manifests.make(manifest.tokenizer, shards[1:], {}).fingerprint != manifest.fingerprint
    other = TokenizerInfo("bytes", "cd" * 32, 257)
    assert manifests.make(other, shards, {}).fingerprint != manifest.fingerprint
    assert manifests.make(manifest.tokenizer, shards, {"any": {}}).fingerprint == manifest.fingerprint


@pytest.mark.parametrize("name", [HEADER, TABLE])
def test_every_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    save(tmp_path, make())
    whole, draw = (tmp_path / name).read_bytes(), random.Random(0)
    for flip in draw.sample(range(8 * len(whole)), 80):
        damaged = bytearray(whole)
        damaged[flip // 8] ^= 1 << flip % 8
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{name} (is damaged|has format)"):
            load_manifest(tmp_path)


@pytest.mark.parametrize("name", [HEADER, TABLE])
def test_what_was_cut_off_or_is_missing_is_found(tmp_path: Path, name: str) -> None:
    save(tmp_path, make())
    whole, draw = (tmp_path / name).read_bytes(), random.Random(0)
    for cut in [0, 1, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(20))]:
        (tmp_path / name).write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"{name} is damaged"):
            load_manifest(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"no shards in .* \(there is no {name}\); run `leviathan data build CONFIG`"):
        load_manifest(tmp_path)


def test_a_manifest_and_a_table_of_two_builds_do_not_go_together(tmp_path: Path) -> None:
    save(tmp_path, make())
    (tmp_path / TABLE).write_bytes(manifests.encode(make("code-train-00009-00.tar"))[1])
    with pytest.raises(DataError, match=r"shards\.parquet is damaged"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("header", [b"", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"sha256": 5}', b"[" * 100_000])
def test_anything_else_in_its_place_is_refused(header: bytes) -> None:
    with pytest.raises(DataError, match=r"here/manifest\.json is damaged"):
        manifests.decode(header, b"", "here")


def test_another_format_is_named() -> None:
    header = {"format": 99}
    header["sha256"] = manifests._header_hash(dict(header))  # type: ignore[assignment]
    with pytest.raises(DataError, match="has format 99, this version reads 1; build again"):
        manifests.decode(json.dumps(header).encode(), b"", "here")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/b.tar", "..", ".hidden.tar", "a\nb.tar", "a\0.tar", "", "-x.tar"]
)
def test_a_name_that_could_lead_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="which is no plain file name"):
        load_manifest(save(tmp_path, make(name)))
