"""Balanced clusters: every document in one, none with more than its share but for the last, always the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.kmeans import assign, balanced_kmeans, distances


def blobs(sizes: list[int], seed: int = 0, spread: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Points around far centres, in random order, and which centre each is of."""
    draw = np.random.default_rng(seed)
    of = np.repeat(np.arange(len(sizes)), sizes)
    points = np.eye(len(sizes), 6)[of] + spread * draw.standard_normal((len(of), 6))
    order = draw.permutation(len(of))
    return points[order].astype(np.float32), of[order]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(2, 6), st.integers(0, 2**32 - 1), st.lists(st.integers(1, 50), min_size=1)
)  # fmt: skip
def test_every_document_is_placed_and_no_cluster_takes_more_than_its_share_and_one(
    count: int, clusters: int, seed: int, weights: list[int]
) -> None:
    draw = np.random.default_rng(seed)
    weight = np.resize(np.array(weights, dtype=np.float64), count)
    # ties too: whole numbers as distances
    found = assign(draw.integers(0, 4, (count, clusters)).astype(np.float64), weight)
    assert ((found >= 0) & (found < clusters)).all()
    room = np.ceil(weight.sum() / clusters)
    for k in range(clusters):
        own = weight[found == k]
        assert own.sum() < room + own.max(initial=0)


def test_where_there_is_room_each_document_is_with_its_nearest_centre() -> None:
    distance = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert assign(distance, np.ones(4)).tolist() == [0, 0, 1, 1]


def test_who_has_least_to_lose_makes_room() -> None:
    distance = np.array([[0.0, 0.1], [0.0, 9.0], [0.0, 5.0], [0.0, 0.2]])
    assert assign(distance, np.ones(4)).tolist() == [1, 0, 0, 1]


def test_shares_are_of_weight_and_not_of_documents() -> None:
    distance = np.array([[0.0, 1.0]] * 10 + [[1.0, 0.0]])
    weight = np.array([1.0] * 10 + [10.0])
    assert assign(distance, weight).tolist() == [0] * 10 + [1]


def test_clear_groups_of_equal_size_are_found_whatever_the_seed() -> None:
    points, of = blobs([50, 50, 50, 50])
    for seed in range(5):
        found = balanced_kmeans(points, np.ones(200), 4, seed)
        pairs = {(int(a), int(b)) for a, b in zip(found.cluster_N, of)}
        assert len(pairs) == 4
        assert found.cluster_N[0] == 0, "clusters are numbered as their first documents come"
        nearest = distances(points, found.centres_KE).min(1)
        np.testing.assert_allclose(found.distance_N, nearest, atol=1e-9)


def test_equal_arguments_give_equal_clusters() -> None:
    points, _ = blobs([30, 70, 20], spread=0.6)
    a, b = (balanced_kmeans(points, np.arange(1.0, 121.0), 5, 3) for _ in range(2))
    for one, other in zip(a, b):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("count", [3, 4, 9])
def test_documents_that_are_all_alike_are_still_shared_out(count: int) -> None:
    found = balanced_kmeans(np.ones((count, 5), np.float32), np.ones(count), 3, 0)
    assert np.bincount(found.cluster_N, minlength=3).max() == -(-count // 3)


def test_a_share_below_one_document_leaves_clusters_empty_and_says_so_by_their_count() -> None:
    points, _ = blobs([2, 1])
    weight = np.array([1.0, 1.0, 1000.0])
    found = balanced_kmeans(points, weight, 3, 0)
    assert len(found.centres_KE) == 3
    assert np.isfinite(found.centres_KE).all()
