"""Which row comes when: a pure function of manifest, mixture, seed and row number.

Nothing is remembered between calls, so the order is the same for every world size, worker count and restart, and a
run's place in its data is one integer. Four steps, each in closed form:

1. skips      the row's number, moved past the windows of data that the run was told to skip;
2. mixture    a binary tree of Bresenham splits deals rows to sources: at every prefix each source is within
              ceil(log2 sources) rows of its exact share;
3. epoch      a source's shards are permuted anew in each pass over them and cut into windows of `window` shards, so
              that a run that reads from far away needs one window on disk;
4. row        inside a window all rows are permuted.

Permutations are keyed Feistel networks over Z_a x Z_b with a*b >= n, walked until the value falls below n: constant
memory, any row in constant time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd, isqrt, lcm
from typing import Any, TypeAlias

import numpy as np

from configs.errors import ConfigError, DataError
from data_pipeline.manifest import Manifest

Ints: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
WeightChange = tuple[int, Mapping[str, float]]
Skip = tuple[int, int]

_ROUNDS = 3
_MAX_WEIGHT = 1_000_000


@dataclass(frozen=True)
class Rows:
    """Where some rows lie; three arrays of equal length.

    source: index into the order's sources. shard: row of the manifest's table. start: first token within the shard.
    """

    source: Ints
    shard: Ints
    start: Ints


class Mixture:
    """Deal rows to sources by integer weights, in closed form."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.names = tuple(weights)
        self.weights = _integers(weights)

    def deal(self, rows: Ints) -> tuple[Ints, Ints]:
        """For each row its source, and its number among the rows of that source."""
        source, local = np.zeros_like(rows), np.zeros_like(rows)
        self._deal(rows, np.arange(len(rows)), 0, len(self.names), source, local)
        return source, local

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows each source has."""
        out = [0] * len(self.names)

        def walk(count: int, low: int, high: int) -> None:
            if high - low == 1:
                out[low] = count
                return
            middle, p, q = self._node(low, high)
            walk(count * p // q, low, middle)
            walk(count - count * p // q, middle, high)

        walk(rows, 0, len(self.names))
        return out

    def _node(self, low: int, high: int) -> tuple[int, int, int]:
        """Where sources [low, high) are parted, and the left part's share as p/q."""
        middle = (low + high) // 2
        return middle, sum(self.weights[low:middle]), sum(self.weights[low:high])

    def _deal(self, index: Ints, place: Ints, low: int, high: int, source: Ints, local: Ints) -> None:
        if high - low == 1:
            source[place], local[place] = low, index
            return
        middle, p, q = self._node(low, high)
        before = index * p // q
        left = (index + 1) * p // q > before
        self._deal(before[left], place[left], low, middle, source, local)
        self._deal((index - before)[~left], place[~left], middle, high, source, local)


class Order:
    """The order of one run's training rows.

    manifest: the shards. length: tokens in a row (a row reads length + 1). weights: what the run started with; rows are
    dealt in the order in which it names sources. changes: (from which row, new weights), ascending. skips: (before
    which row, how many rows are passed over). names: the same sources in the order that rows are labelled by, where
    that is another.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        length: int,
        seed: int,
        weights: Mapping[str, float],
        window: int | None = None,
        changes: Sequence[WeightChange] = (),
        skips: Sequence[Skip] = (),
        names: Sequence[str] | None = None,
    ) -> None:
        self._dealt = tuple(weights)
        self.names = tuple(names or weights)
        if sorted(self.names) != sorted(self._dealt):
            raise ConfigError(f"rows are dealt to {', '.join(self._dealt)} and labelled {', '.join(self.names)}")
        self._labels = [self.names.index(name) for name in self._dealt]
        self.length = length
        self.skips = tuple(skips)
        self._sources = [_Source(manifest, name, length, seed, window) for name in self._dealt]
        self._segments = self._plan([(0, weights), *changes])

    def rows(self, first: int, count: int) -> Rows:
        """Rows [first, first + count) of the run."""
        return self.locate(np.arange(first, first + count, dtype=np.int64))

    def locate(self, rows: Ints) -> Rows:
        """Where each of `rows` (any numbers, any order) lies."""
        index = rows.copy()
        for at, count in self.skips:
            index[rows >= at] += count
        out = Rows(np.empty_like(rows), np.empty_like(rows), np.empty_like(rows))
        starts = [start for start, _, _ in self._segments]
        segment = np.searchsorted(starts, index, side="right") - 1
        for number in np.unique(segment):
            start, mixture, base = self._segments[number]
            here = np.flatnonzero(segment == number)
            source, local = mixture.deal(index[here] - start)
            for s in np.unique(source):
                chosen = here[source == s]
                out.source[chosen] = self._labels[s]
                out.shard[chosen], out.start[chosen] = self._sources[s].locate(local[source == s] + base[s])
        return out

    def epoch_rows(self, source: int) -> int:
        """Rows in one pass over a source, by its place in `names`."""
        return self._sources[self._labels.index(source)].epoch_rows

    def shards_ahead(self, row: int) -> list[int]:
        """Rows of the manifest's table: the shards of every source's window at `row`, then of its next window."""
        given = self._given(row)
        return [s for ahead in (0, 1) for n, c in enumerate(given) for s in self._sources[n].window_at(c, ahead)]

    def counts(self, rows: int) -> list[int]:
        """How many of the run's first `rows` rows each of `names` gives, skipped ones counted in."""
        given = dict(zip(self._dealt, self._given(rows)))
        return [given[name] for name in self.names]

    def _given(self, rows: int) -> list[int]:
        """The same for each source in the order in which rows are dealt."""
        index = rows + sum(count for at, count in self.skips if at < rows)
        start, mixture, base = [s for s in self._segments if s[0] <= index][-1]
        return [b + c for b, c in zip(base, mixture.counts(index - start))]

    def _plan(self, changes: Sequence[WeightChange]) -> list[tuple[int, Mixture, list[int]]]:
        """Per stretch of constant weights: its first row, its mixture, the rows each source gave before."""
        segments: list[tuple[int, Mixture, list[int]]] = []
        base = [0] * len(self._dealt)
        for start, weights in changes:
            if set(weights) != set(self._dealt):
                raise ConfigError(
                    f"rows are dealt to {', '.join(self._dealt)}, and from row {start:,} to {dict(weights)}"
                )
            if segments:
                began, mixture, _ = segments[-1]
                base = [b + c for b, c in zip(base, mixture.counts(start - began))]
            segments.append((start, Mixture({name: weights[name] for name in self._dealt}), base))
        return segments


class _Source:
    """The endless order of one source's rows, pass after pass."""

    def __init__(self, manifest: Manifest, name: str, length: int, seed: int, window: int | None) -> None:
        self.name, self.length, self.seed = name, length, seed
        self.shards = manifest.rows_of(name, "train")
        self.rows = (manifest.column("tokens")[self.shards] - 1) // length
        self.window = window or max(1, len(self.shards))
        self.epoch_rows = int(self.rows.sum())
        if self.epoch_rows <= 0:
            longest = int(manifest.column("tokens")[self.shards].max(initial=0))
            raise DataError(
                f"source {name!r} has no shard of {length + 1} tokens (the longest has {longest}), so not one row;"
                f" give it more text or make model.length at most {max(1, longest - 1)}"
            )
        self._epoch = lru_cache(maxsize=4)(self._epoch)  # type: ignore[method-assign]

    def locate(self, index: Ints) -> tuple[Ints, Ints]:
        """The table row of the shard, and the first token, of each of the source's rows."""
        shard, start = np.empty_like(index), np.empty_like(index)
        epoch, inside = np.divmod(index, self.epoch_rows)
        for e in np.unique(epoch):
            order, ends, window_ends = self._epoch(int(e))
            here = np.flatnonzero(epoch == e)
            windows = np.searchsorted(window_ends, inside[here], side="right")
            for w in np.unique(windows):
                chosen = here[windows == w]
                begin = int(window_ends[w - 1]) if w else 0
                size = int(window_ends[w]) - begin
                row = begin + permute(inside[chosen] - begin, size, _key("rows", self.seed, self.name, int(e), int(w)))
                place = np.searchsorted(ends, row, side="right")
                shard[chosen] = self.shards[order[place]]
                start[chosen] = (row - (ends[place] - self.rows[order[place]])) * self.length
        return shard, start

    def window_at(self, index: int, ahead: int) -> list[int]:
        """The shards of the window that the source's row `index` lies in, or of the one `ahead` windows later."""
        epoch, inside = divmod(index, self.epoch_rows)
        order, _, window_ends = self._epoch(epoch)
        window = int(np.searchsorted(window_ends, inside, side="right")) + ahead
        if window >= len(window_ends):
            window -= len(window_ends)
            order, _, window_ends = self._epoch(epoch + 1)
        chosen = order[window * self.window : (window + 1) * self.window]
        return self.shards[chosen].tolist()

    def _epoch(self, epoch: int) -> tuple[Ints, Ints, Ints]:
        """The shards in this pass's order, the row at which each ends, the row at which each window ends."""
        count = len(self.shards)
        order = permute(np.arange(count, dtype=np.int64), count, _key("shards", self.seed, self.name, epoch))
        ends = np.cumsum(self.rows[order])
        last = np.minimum(np.arange(self.window, count + self.window, self.window), count) - 1
        return order, ends, ends[last]


def permute(index: Ints, size: int, key: bytes) -> Ints:
    """Map each of `index` (all in [0, size)) by the permutation of [0, size) that `key` (32 bytes) names."""
    if size <= 1:
        return index.copy()
    a = isqrt(size - 1) + 1
    b = -(-size // a)
    keys = np.frombuffer(key, dtype=np.uint64)
    out = _network(index, a, b, keys)
    while True:
        outside = np.flatnonzero(out >= size)
        if not len(outside):
            return out
        out[outside] = _network(out[outside], a, b, keys)


def _network(index: Ints, a: int, b: int, keys: np.ndarray) -> Ints:
    left, right = np.divmod(index.astype(np.uint64), np.uint64(b))
    for r in range(_ROUNDS):
        left = (left + _mix(right ^ keys[r % 4]) % np.uint64(a)) % np.uint64(a)
        right = (right + _mix(left + keys[(r + 2) % 4]) % np.uint64(b)) % np.uint64(b)
    return (left * np.uint64(b) + right).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*parts: object) -> bytes:
    return hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=32).digest()


def _integers(weights: Mapping[str, float]) -> list[int]:
    """Weights as whole numbers in the same proportions."""
    exact = [Fraction(str(weight)) for weight in weights.values()]
    scale = lcm(*(f.denominator for f in exact))
    whole = [int(f * scale) for f in exact]
    divisor = gcd(*whole)
    whole = [w // divisor for w in whole]
    if sum(whole) > _MAX_WEIGHT:
        raise ConfigError(
            f"the weights {dict(weights)} need whole numbers that add up to {sum(whole):,};"
            f" round them so that they add up to at most {_MAX_WEIGHT:,}"
        )
    return whole
