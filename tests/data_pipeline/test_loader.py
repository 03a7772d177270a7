"""Batches: targets within documents, shares of ranks, the thread that makes them ready."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, DataError
from data_pipeline import manifest as manifests
from data_pipeline.batch import IGNORE, collate
from data_pipeline.loader import Loader, ShardSet, check_divides
from data_pipeline.manifest import TokenizerInfo
from data_pipeline.order import Order
from data_pipeline.shards import ShardWriter

LENGTH = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three shards of short documents, and the tokens of each."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    infos, documents = [], []
    for number in range(3):
        writer = ShardWriter(folder / f"s{number}.tar", "a" if number else "b", "train", 300)
        documents.append([rng.integers(0, 300, rng.integers(1, 40)).astype(np.uint16) for _ in range(60)])
        for i, tokens in enumerate(documents[-1]):
            writer.add(f"d{i}", tokens, len(tokens))
        infos.append(writer.close())
    manifest = manifests.make(TokenizerInfo("bytes", "x", 300), infos, {"b": {}, "a": {}})
    return folder, manifest, documents


def loader_of(corpus, batch_rows=8, micro_rows=4, rank=0, world=1):
    folder, manifest, _ = corpus
    order = Order(manifest, length=LENGTH, seed=3, weights={"a": 2.0, "b": 1.0})
    shards = ShardSet(manifest, lambda info: folder / info.name)
    return Loader(order, shards, batch_rows=batch_rows, micro_rows=micro_rows, rank=rank, world=world)


def content(batch):
    return [getattr(batch, n) for n in ("tokens_BT", "targets_BT", "doc_BT", "pos_BT", "source_B")]


def test_after_a_change_of_the_batch_it_goes_on_with_the_next_row(corpus):
    loader = loader_of(corpus, batch_rows=12)
    loader.seek(40)  # five batches of 8
    taken = [loader.next() for _ in range(3)]
    assert loader.last_rows() == (64, 76)
    loader.seek(64)
    again = loader.next()
    loader.close()
    straight = loader_of(corpus, batch_rows=4)
    expected = [batch for step in straight.steps(10, 9) for batch in step]
    assert len(expected) == 9
    for batch, other in zip([b for step in taken for b in step], expected):
        assert all(np.array_equal(a, b) for a, b in zip(content(batch), content(other)))
    assert all(np.array_equal(a, b) for a, b in zip(content(again[0]), content(taken[2][0])))


def test_targets_documents_and_positions_are_those_of_the_text(corpus):
    _, _, documents = corpus
    loader = loader_of(corpus)
    order = loader._order.rows(0, 40)
    flat = [np.concatenate(d) for d in documents]
    owner = [np.repeat(np.arange(len(d)), [len(t) for t in d]) for d in documents]
    row = 0
    for step in loader.steps(0, 5):
        for batch in step:
            for i in range(4):
                shard, start = int(order.shard[row]), int(order.start[row])
                tokens, docs = flat[shard][start : start + LENGTH + 1], owner[shard][start : start + LENGTH + 1]
                same = docs[1:] == docs[:-1]
                assert batch.tokens_BT[i].tolist() == tokens[:-1].tolist()
                assert batch.targets_BT[i].tolist() == np.where(same, tokens[1:].astype(int), IGNORE).tolist()
                assert batch.doc_BT[i].tolist() == (docs[:-1] - docs[0]).tolist()
                begins = np.concatenate([[0], np.flatnonzero(np.diff(docs[:-1])) + 1])
                expected = np.arange(LENGTH) - begins[np.searchsorted(begins, np.arange(LENGTH), "right") - 1]
                assert batch.pos_BT[i].tolist() == expected.tolist()
                assert batch.source_B[i] == order.source[row]
                row += 1
            assert batch.count == int((batch.targets_BT != IGNORE).sum())
            assert batch.packed == bool((batch.doc_BT > 0).any())


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_rows", [1, 2])
def test_the_global_batch_is_the_same_for_any_ranks_and_micro_batches(corpus, world, micro_rows):
    whole = [content(b) for step in loader_of(corpus, micro_rows=8).steps(5, 3) for b in step]
    shares = [list(loader_of(corpus, micro_rows=micro_rows, rank=r, world=world).steps(5, 3)) for r in range(world)]
    for step in range(3):
        parts = [content(batch) for share in shares for batch in share[step]]
        for together, pieces in zip(whole[step], zip(*parts)):
            assert torch.equal(together, torch.cat(pieces))


def test_going_on_after_some_rows_gives_what_would_have_come(corpus):
    straight, resumed = loader_of(corpus), loader_of(corpus)
    straight.seek(0)
    batches = [straight.next() for _ in range(150)]
    resumed.seek(90 * 8)
    for step in range(90, 150):
        for a, b in zip(batches[step], resumed.next()):
            assert all(torch.equal(x, y) for x, y in zip(content(a), content(b)))
    assert straight.rows_consumed == resumed.rows_consumed == 1200
    straight.close()
    resumed.close()


def test_closing_leaves_no_thread(corpus):
    loader = loader_of(corpus)
    loader.next()
    assert any(t.name == "loader" for t in threading.enumerate())
    loader.close()
    assert not any(t.name == "loader" for t in threading.enumerate())


def test_what_goes_wrong_in_the_thread_is_raised_by_next(corpus, tmp_path):
    _, manifest, _ = corpus
    order = Order(manifest, length=LENGTH, seed=3, weights={"a": 1.0})
    loader = Loader(
        order, ShardSet(manifest, lambda info: tmp_path / info.name), batch_rows=2, micro_rows=2, rank=0, world=1
    )
    with pytest.raises(DataError, match=r"s\d\.tar is damaged .* found no such file"):
        loader.next()
    loader.close()


def test_the_thread_works_ahead_but_not_without_bound(corpus):
    loader = loader_of(corpus)
    loader.seek(0)
    time.sleep(0.3)
    assert loader._ready.qsize() == loader._ready.maxsize
    loader.close()


@pytest.mark.parametrize(
    ("batch_rows", "micro_rows", "world", "says"),
    [(10, 5, 4, "not a multiple of 4 ranks; the nearest is 8"), (12, 5, 2, "does not divide the 6 rows of a rank"),
     (3, 1, 4, "the nearest is 4")],
)  # fmt: skip
def test_a_batch_that_cannot_be_dealt_is_told_with_one_that_can(batch_rows, micro_rows, world, says):
    with pytest.raises(ConfigError, match=says):
        check_divides(batch_rows, micro_rows, world)


@given(st.lists(st.sets(st.integers(1, 12)), min_size=1, max_size=4), st.integers(0, 99))
@settings(deadline=None)
def test_collate_agrees_with_a_walk_over_the_tokens(cuts, seed):
    rows, length = len(cuts), 12
    tokens = np.random.default_rng(seed).integers(0, 9, (rows, length + 1))
    batch = collate(tokens, [np.array(sorted(c), dtype=np.int64) for c in cuts], np.zeros(rows, dtype=np.int64))
    for r in range(rows):
        doc = pos = 0
        for t in range(length):
            if t in cuts[r]:
                doc, pos = doc + 1, 0
            assert (int(batch.doc_BT[r, t]), int(batch.pos_BT[r, t])) == (doc, pos)
            assert int(batch.targets_BT[r, t]) == (IGNORE if t + 1 in cuts[r] else tokens[r, t + 1])
            pos += 1
