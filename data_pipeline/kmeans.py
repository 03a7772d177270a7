"""Balanced k-means: clusters that hold equal shares of all tokens, so that no module starves.

Each round gives every document the nearest centre that still has room, those who would lose most elsewhere first, and
then moves each centre to the mean of what it got. Source: c-BTM (arXiv 2303.14177) balances by documents; shares of
tokens are this project's, since documents of different kinds have different lengths.

Shapes: N documents, E width, K clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

ROUNDS, STARTS = 20, 8


class Grouped(NamedTuple):
    """cluster_N: of each document, int64. centres_KE. distance_N: squared, of each document to its centre."""

    cluster_N: np.ndarray
    centres_KE: np.ndarray
    distance_N: np.ndarray


def balanced_kmeans(
    e_NE: np.ndarray, weight_N: np.ndarray, clusters: int, seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Grouped:  # fmt: skip
    """The best of several starts, a function of its arguments. weight_N: tokens of each document, all > 0.

    Clusters are numbered in the order of their first documents. A cluster may be empty where single documents are
    longer than a share.
    """
    best, least = None, np.inf
    for start in range(STARTS):
        found = _from_start(e_NE, weight_N, clusters, np.random.default_rng([seed, start]))
        mean = float(np.average(found.distance_N, weights=weight_N))
        if mean < least:
            best, least = found, mean
        progress(start + 1, STARTS)
    assert best is not None
    return _in_order(best)


def assign(distance_NK: np.ndarray, weight_N: np.ndarray) -> np.ndarray:
    """(N,) the nearest cluster with room, in the order of what each document would lose by its second choice.

    Room is an equal share of all weight, rounded up; the document that crosses the limit is the last one taken.
    """
    count, clusters = distance_NK.shape
    cluster_N = np.full(count, -1)
    room_K = np.full(clusters, np.ceil(weight_N.sum() / clusters))
    left = np.arange(count)
    while len(left):
        d = np.where(room_K > 0, distance_NK[left], np.inf)
        nearest = d.argmin(1)
        rows = np.arange(len(left))
        least = d[rows, nearest]
        d[rows, nearest] = np.inf
        gain = d.min(1) - least  # inf where only one has room
        taken = np.zeros(len(left), dtype=bool)
        for k in np.flatnonzero(room_K > 0):
            wanting = np.flatnonzero(nearest == k)
            wanting = wanting[np.argsort(-gain[wanting], kind="stable")]
            weight = weight_N[left[wanting]]
            fits = np.cumsum(weight) - weight < room_K[k]
            taken[wanting[fits]] = True
            cluster_N[left[wanting[fits]]] = k
            room_K[k] -= weight[fits].sum()
        left = left[~taken]
    return cluster_N


def _from_start(e_NE: np.ndarray, weight_N: np.ndarray, clusters: int, draw: np.random.Generator) -> Grouped:
    centres_KE, before = _first_centres(e_NE, weight_N, clusters, draw), None
    for _ in range(ROUNDS):
        distance_NK = distances(e_NE, centres_KE)
        cluster_N = assign(distance_NK, weight_N)
        if before is not None and np.array_equal(cluster_N, before):
            break
        before = cluster_N
        for k in range(clusters):
            own = cluster_N == k
            if own.any():
                centres_KE[k] = np.average(e_NE[own], axis=0, weights=weight_N[own])
    return Grouped(cluster_N, centres_KE, distance_NK[np.arange(len(e_NE)), cluster_N])


def _first_centres(e_NE: np.ndarray, weight_N: np.ndarray, clusters: int, draw: np.random.Generator) -> np.ndarray:
    """Documents that are far from each other (k-means++), drawn by their squared distance and weight."""
    centres = [e_NE[draw.choice(len(e_NE), p=weight_N / weight_N.sum())]]
    for _ in range(clusters - 1):
        far_N = distances(e_NE, np.stack(centres)).min(1) * weight_N
        # where all documents are alike, any will do
        share_N = far_N / far_N.sum() if far_N.sum() > 0 else weight_N / weight_N.sum()
        centres.append(e_NE[draw.choice(len(e_NE), p=share_N)])
    return np.stack(centres).astype(np.float64)


def distances(e_NE: np.ndarray, centres_KE: np.ndarray) -> np.ndarray:
    """(N, K) squared distances, never negative."""
    e_NE = e_NE.astype(np.float64, copy=False)
    inner_NK = e_NE @ centres_KE.T
    squares = np.square(e_NE).sum(1)[:, None] + np.square(centres_KE).sum(1)
    return np.maximum(squares - 2 * inner_NK, 0)


def _in_order(found: Grouped) -> Grouped:
    """The same clusters, numbered as their first documents come; empty ones last."""
    known, first = np.unique(found.cluster_N, return_index=True)
    order = [*known[np.argsort(first)], *sorted(set(range(len(found.centres_KE))) - set(known.tolist()))]
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.arange(len(order))
    return Grouped(number[found.cluster_N], found.centres_KE[order], found.distance_N)
