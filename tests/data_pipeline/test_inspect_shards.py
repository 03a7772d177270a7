"""Shards looked at from outside: what is wrong with them, and samples of what they hold."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from configs.errors import UsageError
from data_pipeline.build import build
from data_pipeline.config import DataConfig
from data_pipeline.inspect_shards import check, show
from data_pipeline.manifest import Manifest
from tests.data_pipeline.building import decoded


@pytest.fixture
def built(tmp_path: Path, data: DataConfig) -> tuple[Path, Manifest]:
    return tmp_path / "out", build(data, tmp_path / "out", workers=1)


def test_check_finds_nothing_wrong_and_says_how_far_it_is(built: tuple[Path, Manifest]) -> None:
    told: list[tuple[int, int]] = []
    assert check(built[0], lambda done, total: told.append((done, total))) == []
    assert told[-1][0] == told[-1][1] == built[1].column("bytes").sum()
    assert len(told) == built[1].table.num_rows


def test_check_finds_every_fault_at_once(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    names = manifest.table["name"].to_pylist()
    (folder / names[0]).unlink()
    (folder / names[1]).write_bytes(b"")
    content = bytearray((folder / names[2]).read_bytes())
    content[len(content) // 2] ^= 8
    (folder / names[2]).write_bytes(content)
    shutil.copy(folder / names[4], folder / names[3])
    (folder / "tokenizer.json").unlink()
    problems = check(folder)
    assert len(problems) == 5
    assert "no tokenizer in" in problems[0]
    for name, problem in zip(names, problems[1:]):
        assert name in problem and "\n" not in problem
    assert check(folder / "nowhere")[0].startswith("no shards in")


def test_random_damage_to_a_folder_never_goes_unnoticed(built: tuple[Path, Manifest]) -> None:
    folder, draw = built[0], random.Random(0)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for _ in range(70):
        path = draw.choice(files)
        whole = path.read_bytes()
        kind = draw.choice(["flip", "flip", "cut", "delete", "swap"])
        if kind == "flip":
            damaged = bytearray(whole)
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
        elif kind == "cut":
            path.write_bytes(whole[: draw.randrange(len(whole))])
        elif kind == "swap":
            path.write_bytes(next(other for other in files if other.read_bytes() != whole).read_bytes())
        else:
            path.unlink()
        if path.name != "tokenizer.json" or kind != "flip":
            assert check(folder), (path.name, kind)
        path.write_bytes(whole)
    assert check(folder) == []


def test_a_shard_without_documents_is_refused(built: tuple[Path, Manifest]) -> None:
    from data_pipeline import manifest as manifests
    from data_pipeline.shards import ShardWriter

    folder, manifest = built
    empty = ShardWriter(folder / "tale-train-99999-00.tar", "tale", "train", 257).close()
    shards = [manifest.shard(row) for row in range(manifest.table.num_rows)]
    header, table = manifests.encode(manifests.make(manifest.tokenizer, [*shards, empty], manifest.sources))
    (folder / "manifest.json").write_bytes(header)
    (folder / "shards.parquet").write_bytes(table)
    assert check(folder) == ["shard tale-train-99999-00.tar has 0 documents; delete it and build again"]


def test_samples_are_shown_from_all_over_a_source(built: tuple[Path, Manifest], tale: Path) -> None:
    folder = built[0]
    found = list(show(folder, "tale", "train", 6))
    wanted = decoded(folder, "tale", "train")
    assert len(found) == 6
    assert found[0].name == "a.jsonl@0" and found[-1].name.startswith("b.txt@")
    assert all(wanted[name].startswith(text) and tokens > 1 for name, text, tokens in found)
    assert len(list(show(folder, "tale", "heldout", 10_000))) == len(decoded(folder, "tale", "heldout"))
    assert list(show(folder, "tale", "train", 0)) == []
    with pytest.raises(UsageError, match=r"no source 'tail' in .*; did you mean 'tale'"):
        list(show(folder, "tail", "train", 1))
