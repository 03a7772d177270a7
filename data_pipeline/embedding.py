"""The table that embeds texts, learned from a corpus: tf-idf of hashed n-grams, then its largest singular directions.

    row i: counts of stretch i's buckets times idf_h = log((1 + N) / (1 + df_h)) + 1, of length 1
    table = diag(idf) V_E,   V_E the E right singular vectors of these rows

Stretches of a document are counted apart, for a long one has nearly every bucket, and a model reads no more at a time.
Document frequencies are of all of them; the singular vectors are of every k-th, as many as memory is meant for.

Shapes: H buckets, E width, S stretches, P pairs of a stretch and a bucket that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from data_pipeline.clusters import Facts, buckets_of, unit

STRETCH = 1024
PAIRS = 2_000_000
"""Pairs of a stretch and a bucket that are kept to learn from: 16 MB, four times that while it learns."""

_BLOCK = 1 << 20  # ids of a document that are looked at together
_PASSES = 3
_OVERSAMPLED = 8
_FAINT = 1e-5  # of the largest singular value: directions below it are rounding


class Learner:
    """Counts the buckets of a corpus, document by document; then makes its table."""

    def __init__(self, facts: Facts, pairs: int = PAIRS) -> None:
        self._facts, self._most, self._every, self._seen = facts, pairs, 1, 0
        self._frequency_H = np.zeros(facts.buckets, dtype=np.int64)
        self._kept: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._pairs = 0

    def add(self, ids_N: np.ndarray) -> None:
        """Count in a document."""
        for at_P, bucket_P, count_P, stretches in _pairs_of(ids_N, self._facts):
            self._frequency_H += np.bincount(bucket_P, minlength=self._facts.buckets)
            starts = np.searchsorted(at_P, np.arange(stretches + 1))
            for number in range(stretches):
                if (self._seen + number) % self._every == 0:
                    own = slice(starts[number], starts[number + 1])
                    pair = (bucket_P[own].astype(np.int32), count_P[own].astype(np.float32))
                    self._kept.append((self._seen + number, *pair))
                    self._pairs += len(pair[0])
            self._seen += stretches
            while self._pairs > self._most and len(self._kept) > 1:
                self._every *= 2
                self._kept = [one for one in self._kept if one[0] % self._every == 0]
                self._pairs = sum(len(buckets) for _, buckets, _ in self._kept)

    def table(self, seed: int, progress: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:
        """(H, E) float32, a function of what was added and the seed. Directions that the text has not are zero."""
        idf_H = np.log((1 + self._seen) / (1 + self._frequency_H)) + 1
        rows = [np.float32(idf_H[bucket]) * count for _, bucket, count in self._kept]
        value_P = np.concatenate([row / np.linalg.norm(row) for row in rows] or [np.empty(0, np.float32)])
        bucket_P = np.concatenate([bucket for _, bucket, _ in self._kept] or [np.empty(0, np.int32)])
        row_P = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        matrix = _Sparse(row_P, bucket_P, value_P, (len(rows), self._facts.buckets))
        vectors_HE = _right_vectors(matrix, self._facts.width, seed, progress)
        return (idf_H[:, None] * vectors_HE).astype(np.float32)


def embed(ids_N: np.ndarray, table_HE: np.ndarray, facts: Facts) -> np.ndarray:
    """(E,) float32: the embedding of a whole document."""
    total_E = np.zeros(table_HE.shape[1])
    for _, bucket_P, count_P, _ in _pairs_of(ids_N, facts):
        total_E += count_P @ table_HE[bucket_P].astype(np.float64)
    return unit(total_E).astype(np.float32)


def _pairs_of(ids_N: np.ndarray, facts: Facts) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """A document, a bounded piece at a time: of each pair its stretch in the piece, bucket and count; the stretches."""
    last = facts.ids - 1
    for start in range(0, len(ids_N), _BLOCK):
        before = ids_N[start - last : start] if start else None
        bucket_N = buckets_of(ids_N[start : start + _BLOCK], facts, before)
        at_N = np.arange(len(bucket_N)) // STRETCH
        pair_P, count_P = np.unique(at_N * facts.buckets + bucket_N, return_counts=True)
        yield pair_P // facts.buckets, pair_P % facts.buckets, count_P, int(at_N[-1]) + 1


class _Sparse:
    """A matrix of few values, sorted by rows; no row is empty."""

    def __init__(self, row_P: np.ndarray, column_P: np.ndarray, value_P: np.ndarray, shape: tuple[int, int]) -> None:
        by_column = np.argsort(column_P, kind="stable")
        self.shape = shape
        self._by_row = (row_P, column_P, value_P)
        self._by_column = (column_P[by_column], row_P[by_column], value_P[by_column])

    def times(self, x: np.ndarray) -> np.ndarray:
        """A x."""
        return _sums(*self._by_row, x, self.shape[0])

    def transposed_times(self, x: np.ndarray) -> np.ndarray:
        """A^T x."""
        return _sums(*self._by_column, x, self.shape[1])


def _sums(to_P: np.ndarray, from_P: np.ndarray, value_P: np.ndarray, x: np.ndarray, size: int) -> np.ndarray:
    """(size, E): for each place the sum of what goes to it; `to_P` is sorted."""
    out, x = np.zeros((size, x.shape[1]), dtype=np.float64), x.astype(np.float32)
    for start in range(0, len(to_P), _BLOCK // 4):
        piece = slice(start, start + _BLOCK // 4)
        places, first = np.unique(to_P[piece], return_index=True)
        out[places] += np.add.reduceat(value_P[piece, None] * x[from_P[piece]], first, axis=0)
    return out


def _right_vectors(matrix: _Sparse, width: int, seed: int, progress: Callable[[int, int], None]) -> np.ndarray:
    """(H, width): right singular vectors by subspace iteration (Halko et al., arXiv 0909.4061)."""
    columns = matrix.shape[1]
    vectors = np.random.default_rng(seed).standard_normal((columns, min(columns, width + _OVERSAMPLED)))
    for number in range(_PASSES):
        vectors, _ = np.linalg.qr(matrix.transposed_times(matrix.times(vectors)))
        progress(number + 1, _PASSES)
    _, values, turned = np.linalg.svd(matrix.times(vectors), full_matrices=False)
    found = (vectors @ turned.T)[:, :width]
    strong = values[:width] > _FAINT * values[:1].max(initial=0)
    out = np.zeros((columns, width))
    out[:, : len(strong)] = found[:, : len(strong)] * strong
    return out
