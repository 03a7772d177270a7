"""The order of rows: pure, complete, the same for every way of asking."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, DataError
from data_pipeline import manifest as manifests
from data_pipeline.manifest import ShardInfo, TokenizerInfo
from data_pipeline.order import Mixture, Order, permute

GOLDEN = [(1, 3, 480), (0, 1, 0), (0, 0, 20), (1, 3, 70), (0, 1, 190), (0, 1, 260)]


def manifest_of(**sources):
    """A manifest whose sources have training shards of these many tokens."""
    shards = [
        ShardInfo(name, "train", f"{name}-{i}.tar", 1, "x", tokens, 1, tokens, 0, "x")
        for name, sizes in sources.items()
        for i, tokens in enumerate(sizes)
    ]
    return manifests.make(TokenizerInfo("bytes", "x", 257), shards, {name: {} for name in sources})


def order_of(manifest, length=10, seed=0, window=None, weights=None, **more):
    weights = weights or dict.fromkeys(manifest.sources, 1.0)
    return Order(manifest, length=length, seed=seed, window=window, weights=weights, **more)


def places(rows):
    return list(zip(rows.source.tolist(), rows.shard.tolist(), rows.start.tolist()))


def test_the_order_of_a_seed_is_fixed_for_all_time():
    """These numbers may never change: resumed runs would read other rows than they say."""
    order = order_of(manifest_of(a=[101, 301, 57], b=[500]), weights={"a": 2.0, "b": 1.0}, seed=7)
    assert places(order.rows(0, 6)) == GOLDEN


@given(st.integers(0, 5000), st.binary(min_size=32, max_size=32))
@settings(deadline=None, max_examples=60)
def test_a_permutation_reaches_every_number_once(size, key):
    out = permute(np.arange(size, dtype=np.int64), size, key)
    assert np.array_equal(np.sort(out), np.arange(size))


def test_permutations_of_different_keys_differ_and_look_shuffled():
    n = 10_000
    a, b = (permute(np.arange(n, dtype=np.int64), n, bytes([k] * 32)) for k in (1, 2))
    assert (a == b).mean() < 0.001
    assert (a == np.arange(n)).mean() < 0.001
    assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.05
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.05


@given(
    st.lists(st.integers(2, 400), min_size=1, max_size=9), st.integers(1, 40), st.integers(1, 10) | st.none(),
    st.integers(0, 3),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_every_epoch_has_every_row_once(sizes, length, window, seed):
    expected = {(i, j * length) for i, n in enumerate(sizes) for j in range((n - 1) // length)}
    if not expected:
        with pytest.raises(DataError, match="not one row"):
            order_of(manifest_of(a=sizes), length=length, window=window, seed=seed)
        return
    order = order_of(manifest_of(a=sizes), length=length, window=window, seed=seed)
    for epoch in range(3):
        rows = order.rows(epoch * len(expected), len(expected))
        got = list(zip(rows.shard.tolist(), rows.start.tolist()))
        assert len(got) == len(set(got))
        assert set(got) == expected


def test_epochs_differ_and_so_do_seeds():
    manifest = manifest_of(a=[5000, 5000])
    order, n = order_of(manifest), order_of(manifest).epoch_rows(0)
    assert places(order.rows(0, n)) != places(order.rows(n, n))
    assert places(order.rows(0, n)) != places(order_of(manifest, seed=1).rows(0, n))


@given(st.integers(0, 10_000), st.integers(1, 300))
@settings(deadline=None, max_examples=40)
def test_any_slice_is_what_row_by_row_gives(first, count):
    order = order_of(manifest_of(a=[999, 1400, 31], b=[2000, 77]), weights={"a": 0.7, "b": 0.3}, window=2)
    together = places(order.rows(first, count))
    assert together == [places(order.rows(first + i, 1))[0] for i in range(count)]


def test_a_window_of_shards_is_used_up_before_the_next_is_opened():
    order = order_of(manifest_of(a=[101] * 12), window=3)
    shards = order.rows(0, 120).shard.reshape(4, 30)
    windows = [set(row.tolist()) for row in shards]
    assert all(len(w) == 3 for w in windows)
    assert set().union(*windows) == set(range(12))
    assert [set(order.shards_ahead(row * 30)[:3]) for row in range(4)] == windows
    assert set(order.shards_ahead(0)[3:]) == windows[1]


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=9),
    st.integers(0, 3000),
)
@settings(deadline=None, max_examples=60)
def test_at_every_prefix_each_source_is_near_its_exact_share(weights, prefix):
    mixture = Mixture({f"s{i}": float(w) for i, w in enumerate(weights)})
    source, local = mixture.deal(np.arange(prefix, dtype=np.int64))
    bound = ceil(log2(len(weights))) if len(weights) > 1 else 0
    for i, weight in enumerate(weights):
        mine = source == i
        exact = Fraction(prefix * weight, sum(weights))
        assert abs(int(mine.sum()) - exact) <= bound
        assert np.array_equal(local[mine], np.arange(mine.sum()))
        assert mixture.counts(prefix)[i] == mine.sum()


def test_decimal_weights_are_exact():
    assert Mixture({"a": 0.1, "b": 0.2, "c": 0.7}).weights == [1, 2, 7]
    with pytest.raises(ConfigError, match="add up to"):
        Mixture({"a": 0.123456789, "b": 1.0})


def test_the_row_order_does_not_depend_on_the_mixture_of_others():
    """What a source gives, and in which order, is its own affair."""
    manifest = manifest_of(a=[999, 500], b=[2000])
    alone = order_of(manifest_of(a=[999, 500])).rows(0, 60)
    mixed = order_of(manifest, weights={"a": 1.0, "b": 3.0}).rows(0, 240)
    mine = mixed.source == 0
    assert mine.sum() == 60
    assert np.array_equal(mixed.start[mine], alone.start)


def test_a_change_of_weights_goes_on_where_each_source_was():
    manifest = manifest_of(a=[3001], b=[3001])
    changed = order_of(manifest, weights={"a": 1.0, "b": 1.0}, changes=[(100, {"a": 3.0, "b": 1.0})])
    before = order_of(manifest, weights={"a": 1.0, "b": 1.0})
    assert places(changed.rows(0, 100)) == places(before.rows(0, 100))
    after = changed.rows(100, 200)
    assert (after.source == 0).sum() == 150
    a_rows = np.concatenate(
        [changed.rows(0, 100).start[changed.rows(0, 100).source == 0], after.start[after.source == 0]]
    )
    assert np.array_equal(a_rows, order_of(manifest_of(a=[3001])).rows(0, 200).start)
    assert changed.counts(300) == [200, 100]


def test_skipped_rows_are_passed_over_and_nothing_else_moves():
    manifest = manifest_of(a=[5001])
    plain, skipping = order_of(manifest), order_of(manifest, skips=[(40, 25), (60, 5)])
    assert places(skipping.rows(0, 40)) == places(plain.rows(0, 40))
    assert places(skipping.rows(40, 20)) == places(plain.rows(65, 20))
    assert places(skipping.rows(60, 20)) == places(plain.rows(90, 20))


def test_a_corpus_shorter_than_a_row_is_told():
    with pytest.raises(DataError, match=r"source 'a' has no shard of 11 tokens \(the longest has 10\).*model\.length"):
        order_of(manifest_of(a=[10, 7]))


def test_a_million_shards_are_no_burden():
    manifest = manifest_of(a=[100])
    order = order_of(manifest)
    source = order._sources[0]
    source.shards = np.arange(1_000_000)
    source.rows = np.full(1_000_000, 1000)
    source.window, source.epoch_rows = 1000, 10**9
    rows = order.rows(10**9 - 5, 10)
    assert len(set(places(rows))) == 10


def test_labels_may_have_another_order_than_rows_are_dealt_in():
    manifest, weights = manifest_of(a=[101, 301, 57], b=[500], c=[300]), {"a": 2.0, "b": 1.0, "c": 3.0}
    plain = order_of(manifest, weights=weights, window=1)
    turned = order_of(manifest, weights=weights, window=1, names=["c", "a", "b"])
    rows, same = plain.rows(0, 500), turned.rows(0, 500)
    assert np.array_equal(rows.shard, same.shard)
    assert np.array_equal(rows.start, same.start)
    assert [plain.names[s] for s in rows.source] == [turned.names[s] for s in same.source]
    assert turned.counts(500) == [plain.counts(500)[n] for n in (2, 0, 1)]
    assert [turned.epoch_rows(n) for n in range(3)] == [plain.epoch_rows(n) for n in (2, 0, 1)]
    assert turned.shards_ahead(77) == plain.shards_ahead(77)


@pytest.mark.parametrize("more", [{"names": ["a"]}, {"changes": [(5, {"a": 1.0})]}])
def test_sources_that_come_or_go_in_the_middle_are_refused(more):
    with pytest.raises(ConfigError, match=r"rows are dealt to a, b[, ]"):
        order_of(manifest_of(a=[101], b=[500]), **more)
