"""This rank's share of every global batch, made ready by one thread ahead of the training loop.

Global batch g is rows [gR, (g+1)R) of the order. Rank r of W takes the r-th R/W of them, whatever W is, and cuts its
share into micro-batches. The loader's whole state is the number of rows that were consumed.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np

from configs.errors import ConfigError
from data_pipeline.batch import Batch, collate
from data_pipeline.manifest import Manifest, ShardInfo
from data_pipeline.order import Order
from data_pipeline.shards import Shard

AHEAD = 2
"""Handfuls of steps that wait ready at most."""
_STEPS_PLANNED = 64
_HANDFUL_BYTES, _HANDFUL_STEPS = 1 << 20, 16


_Handful: TypeAlias = deque[list[Batch]]
"""The micro-batches of some steps, in order."""


class ShardSet:
    """The shards of a manifest, opened when first read; at most `most` are open at once.

    locate: where a shard lies on this host. expect: told which will be needed, so that they can be fetched.
    """

    def __init__(
        self,
        manifest: Manifest,
        locate: Callable[[ShardInfo], Path],
        expect: Callable[[list[ShardInfo]], None] | None = None,
        most: int = 4096,
    ) -> None:
        self._manifest, self._locate, self._expect, self._most = manifest, locate, expect, most
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, row: int) -> Shard:
        """The shard in row `row` of the manifest's table."""
        with self._lock:
            shard = self._open.get(row)
            if shard is not None:
                self._open.move_to_end(row)
                return shard
        info = self._manifest.shard(row)
        shard = Shard(self._locate(info), info)
        with self._lock:
            self._open[row] = shard
            if len(self._open) > self._most:
                self._open.popitem(last=False)
        return shard

    def expect(self, rows: Callable[[], list[int]]) -> None:
        """Have the shards in these rows of the table brought near, where they are far; `rows` is asked only then.

        All others are closed: a file that left the disk takes its room there until nobody has it open.
        """
        if self._expect is None:
            return
        expected = rows()
        with self._lock:
            for row in self._open.keys() - set(expected):
                del self._open[row]
        self._expect([self._manifest.shard(row) for row in expected])


class Loader:
    """Batches of one rank, in order, from any row on.

    batch_rows: rows of a global batch over all ranks. micro_rows: rows this rank runs forward at once.
    pin: whether to lay batches in page-locked memory, for copies to a GPU that do not wait.
    """

    def __init__(
        self,
        order: Order,
        shards: ShardSet,
        *,
        batch_rows: int,
        micro_rows: int,
        rank: int,
        world: int,
        pin: bool = False,
    ) -> None:
        check_divides(batch_rows, micro_rows, world)
        self._order, self._shards = order, shards
        self._batch_rows, self._micro_rows, self._pin = batch_rows, micro_rows, pin
        self._first, self._share = rank * batch_rows // world, batch_rows // world
        # every handover wakes a thread, which costs more than making a small batch: hand over several at once
        step_bytes = 4 * 8 * self._share * order.length
        self._handful = max(1, min(_HANDFUL_STEPS, _HANDFUL_BYTES // step_bytes))
        self._ready: queue.Queue[_Handful | BaseException] = queue.Queue(maxsize=AHEAD)
        self._hand: _Handful = deque()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.rows_consumed = 0

    def seek(self, rows_consumed: int) -> None:
        """Go on after `rows_consumed` rows of the run, whatever batches they were read in."""
        self.close()
        self.rows_consumed = rows_consumed
        self._ready, self._hand = queue.Queue(maxsize=AHEAD), deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(self._ready, self._stop), daemon=True, name="loader")
        self._thread.start()

    def next(self) -> list[Batch]:
        """This rank's micro-batches of the next step. Raises what went wrong while they were made."""
        if self._thread is None:
            self.seek(self.rows_consumed)
        if not self._hand:
            item = self._ready.get()
            if isinstance(item, BaseException):
                raise item
            self._hand = item
        self.rows_consumed += self._batch_rows
        return self._hand.popleft()

    def last_rows(self) -> tuple[int, int]:
        """The rows [first, last) of the run that the last global batch was, over all ranks."""
        return self.rows_consumed - self._batch_rows, self.rows_consumed

    def close(self) -> None:
        """Stop the thread."""
        if self._thread is not None:
            self._stop.set()
            while self._thread.is_alive():
                self._drain()
                self._thread.join(timeout=0.05)
            self._thread = None

    def _drain(self) -> None:
        while True:
            try:
                self._ready.get_nowait()
            except queue.Empty:
                return

    def _work(self, ready: queue.Queue[_Handful | BaseException], stop: threading.Event) -> None:
        step = self.rows_consumed // self._batch_rows
        try:
            while not stop.is_set():
                self._shards.expect(partial(self._order.shards_ahead, self._row_of(step)))
                made = self.steps(step, _STEPS_PLANNED)
                while handful := deque(islice(made, self._handful)):
                    ready.put(handful)
                    if stop.is_set():
                        return
                step += _STEPS_PLANNED
        except BaseException as error:
            ready.put(error)

    def _row_of(self, step: int) -> int:
        """The first row of a step, counted in batches of today's size: earlier ones may have been of another."""
        return step * self._batch_rows + self.rows_consumed % self._batch_rows

    def steps(self, first: int, count: int) -> Iterator[list[Batch]]:
        """The micro-batches of `count` steps from step `first` on, one list a step."""
        begins = self._row_of(first) + np.arange(count, dtype=np.int64) * self._batch_rows + self._first
        rows = self._order.locate((begins[:, None] + np.arange(self._share)).reshape(-1))
        size = self._order.length + 1
        for step in range(count):
            share = slice(step * self._share, (step + 1) * self._share)
            tokens = np.empty((self._share, size), dtype=np.int64)
            boundaries = []
            for i, (shard_row, start) in enumerate(zip(rows.shard[share].tolist(), rows.start[share].tolist())):
                shard = self._shards[shard_row]
                shard.copy(start, start + size, tokens[i])
                boundaries.append(shard.boundaries(start, start + size) - start)
            yield self._cut(tokens, boundaries, rows.source[share])

    def _cut(self, tokens: np.ndarray, boundaries: list[np.ndarray], source: np.ndarray) -> list[Batch]:
        n = self._micro_rows
        return [
            collate(tokens[at : at + n], boundaries[at : at + n], source[at : at + n], pin=self._pin)
            for at in range(0, self._share, n)
        ]


def check_divides(batch_rows: int, micro_rows: int, world: int) -> None:
    """Raise ConfigError where a global batch cannot be dealt evenly."""
    if batch_rows % world:
        near = max(1, round(batch_rows / world)) * world
        raise ConfigError(f"train.batch_rows is {batch_rows}, not a multiple of {world} ranks; the nearest is {near}")
    share = batch_rows // world
    if share % micro_rows:
        fits = max(d for d in range(1, micro_rows + 1) if share % d == 0)
        raise ConfigError(
            f"train.micro_rows is {micro_rows}, which does not divide the {share} rows of a rank;"
            f" the nearest smaller is {fits}"
        )
