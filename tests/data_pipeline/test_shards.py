from __future__ import annotations

import dataclasses
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from data_pipeline import shards
from data_pipeline.manifest import ShardInfo
from data_pipeline.shards import Shard, ShardWriter, token_dtype

SMALL = 4096
Documents = list[np.ndarray]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK_BYTES", SMALL)


def documents(seed: int, count: int, longest: int, vocab: int = 257) -> Documents:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, vocab, draw.integers(1, longest)).astype(token_dtype(vocab)) for _ in range(count)]


def write(path: Path, content: Documents, vocab: int = 257) -> ShardInfo:
    writer = ShardWriter(path, "code", "train", vocab)
    for number, ids in enumerate(content):
        writer.add(f"doc {number}", ids, 3 * len(ids))
    return writer.close()


def read(shard: Shard) -> np.ndarray:
    """All tokens, block by block."""
    out = np.empty(shard.tokens, dtype=np.int64)
    for start in range(0, shard.tokens, 777):
        shard.copy(start, min(start + 777, shard.tokens), out[start : start + 777])
    return out


def test_a_document_that_was_come_by_costs_four_bytes_of_memory(tmp_path: Path) -> None:
    shard = Shard(tmp_path / "s.tar", write(tmp_path / "s.tar", documents(0, 5000, 3)))
    ends = shard.ends()
    for start in range(0, shard.tokens - 1, 50):
        stop = min(start + 51, shard.tokens)
        found = shard.boundaries(start, stop)
        assert found.dtype == np.int64
        assert found.tolist() == [end for end in ends[:, 0].tolist() if start < end < stop]
    assert sum(held.nbytes for held in shard._ends) == 4 * 5000
    assert ends[:, 1].tolist() == (3 * ends[:, 0]).tolist()
    assert np.array_equal(shard.ends(), ends)


def test_a_shard_gives_back_what_was_written(tmp_path: Path) -> None:
    content = documents(0, 200, 300)
    info = write(tmp_path / "a.tar", content)
    shard = Shard(tmp_path / "a.tar", info)
    together = np.concatenate(content)
    assert np.array_equal(read(shard), together)
    assert (info.tokens, info.documents, info.text_bytes) == (len(together), 200, 3 * len(together))
    ends = np.cumsum([len(ids) for ids in content])
    assert np.array_equal(shard.ends(), np.stack([ends, 3 * ends], axis=1))
    assert shard.names() == [f"doc {number}" for number in range(200)]
    assert len(shard.blocks) > 10
    shard.verify()


@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=12), data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_stretch_and_its_boundaries_can_be_read(tmp_path: Path, sizes: list[int], data: st.DataObject) -> None:
    content = [np.arange(size, dtype="<u2") for size in sizes]
    shard = Shard(tmp_path / "a.tar", write(tmp_path / "a.tar", content, 5000))
    together, ends = np.concatenate(content), np.cumsum(sizes)
    start = data.draw(st.integers(0, len(together) - 1))
    stop = data.draw(st.integers(start + 1, len(together)))
    out = np.empty(stop - start, dtype=np.int64)
    shard.copy(start, stop, out)
    assert np.array_equal(out, together[start:stop])
    assert shard.boundaries(start, stop).tolist() == [end for end in ends.tolist() if start < end < stop]


@pytest.mark.parametrize(("vocab", "dtype", "member"), [(65536, "<u2", "tokens.u16"), (65537, "<u4", "tokens.u32")])
def test_webdataset_reads_equal_tokens(tmp_path: Path, vocab: int, dtype: str, member: str) -> None:
    content = documents(1, 40, 900, vocab)
    write(tmp_path / "a.tar", content, vocab)
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    found = np.concatenate([np.frombuffer(sample[member], dtype) for sample in samples])
    assert np.array_equal(found, np.concatenate(content))
    ends = np.concatenate([np.frombuffer(sample["ends.u32"], "<u4").reshape(-1, 2) for sample in samples])
    assert ends[:, 0].tolist() == np.cumsum([len(ids) for ids in content]).tolist()
    assert all(len(sample[member]) == SMALL for sample in samples[:-1])


def test_tar_reads_it_too(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", documents(2, 10, 900))
    listed = subprocess.run(["tar", "tf", tmp_path / "a.tar"], capture_output=True, text=True, check=True).stdout
    assert listed.split()[:3] == ["000000.ends.u32", "000000.json", "000000.tokens.u16"]
    assert listed.split()[-2:] == ["__documents__", "__index__"]


def test_equal_documents_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / f"{name}.tar", documents(3, 30, 900)) for name in "ab")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert dataclasses.replace(first, name="b.tar") == second


def test_a_shard_appears_when_it_is_whole_or_not_at_all(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.tar", "code", "train", 257)
    writer.add("x", np.zeros(9000, dtype="<u2"), 9000)
    assert not (tmp_path / "a.tar").exists()
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.tar", "code", "train", 257)
    with pytest.raises(DataError, match="document 'x' has token id 257, the vocabulary ends at 256"):
        writer.add("x", np.array([0, 257], dtype="<u2"), 2)
    writer.abort()


def test_a_name_is_one_line(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.tar", "code", "train", 257)
    for name in ("a\nb", "c", "\udc80 from a disk"):
        writer.add(name, np.zeros(1, dtype="<u2"), 1)
    assert Shard(tmp_path / "a.tar", writer.close()).names() == ["a b", "c", "? from a disk"]


def use(path: Path, info: ShardInfo) -> None:
    """Open a shard and use all that is in it, as training does: every block is checked at its first touch."""
    shard = Shard(path, info)
    read(shard)
    shard.ends()
    shard.names()


def test_every_flipped_bit_is_found_before_use(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    content = documents(4, 60, 500)
    info = write(path, content)
    whole, shard, draw = path.read_bytes(), Shard(path, info), random.Random(0)
    # in each block: its headers, its ends, its tokens, its padding; then names, index and what follows it
    places = [(block.begin, block.end) for block in shard.blocks]
    places += [(shard.blocks[-1].end, info.index_offset), (info.index_offset, info.bytes)]
    flips = [draw.randrange(8 * begin, 8 * end) for begin, end in places for _ in range(12)]
    assert len(flips) > 60
    for flip in flips:
        damaged = bytearray(whole)
        damaged[flip // 8] ^= 1 << flip % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"shard .*a\.tar is damaged or not the one that was built: found"):
            use(path, info)
        with pytest.raises(DataError, match="sha256"):
            Shard.verify(_opened(path, info, whole))


def _opened(path: Path, info: ShardInfo, whole: bytes) -> Shard:
    """A shard that was whole when it was opened."""
    damaged = path.read_bytes()
    path.write_bytes(whole)
    shard = Shard(path, info)
    path.write_bytes(damaged)
    return shard


def test_a_damaged_block_is_found_at_its_first_read_and_others_are_not_concerned(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    content = documents(5, 60, 500)
    info = write(path, content)
    whole, together = path.read_bytes(), np.concatenate(content)
    blocks, per_block = Shard(path, info).blocks, SMALL // 2
    for bad, block in enumerate(blocks):
        damaged = bytearray(whole)
        damaged[block.tokens_at + 5] ^= 16
        path.write_bytes(damaged)
        shard = Shard(path, info)
        for number in range(len(blocks)):
            start, stop = number * per_block, min((number + 1) * per_block, info.tokens)
            out = np.empty(stop - start, dtype=np.int64)
            if number == bad:
                with pytest.raises(DataError, match=f"block {bad} with checksum"):
                    shard.copy(start, stop, out)
                with pytest.raises(DataError, match=f"block {bad} with checksum"):
                    shard.boundaries(start, stop)
            else:
                shard.copy(start, stop, out)
                assert np.array_equal(out, together[start:stop])


def test_a_shard_of_another_length_is_found_at_opening(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    info = write(path, documents(6, 40, 500))
    whole, block, draw = path.read_bytes(), Shard(path, info).blocks[3], random.Random(0)
    cuts = [0, 1, 511, block.begin, block.begin + 100, block.tokens_at + 7, info.bytes - 512, info.bytes - 1]
    for cut in cuts + [draw.randrange(info.bytes) for _ in range(20)]:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"found {cut:,} bytes, the manifest says {info.bytes:,} bytes"):
            Shard(path, info)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DataError, match="found"):
        Shard(path, info)


def test_another_file_in_its_place_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    info = write(path, documents(7, 40, 500))
    for content in (os.urandom(info.bytes), bytes(info.bytes)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="an index with sha256"):
            Shard(path, info)
    path.unlink()
    with pytest.raises(DataError, match="found no such file"):
        Shard(path, info)
    path.mkdir()
    with pytest.raises(DataError, match="found Is a directory"):
        Shard(path, info)
