"""Loss on held-out text: mean, perplexity and bits per byte, per source and by how much context a token had.

Every held-out token but the first of a document is a target once; the last, short row of a shard is filled up and its
filling not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

import numpy as np
import torch

from data_pipeline.batch import IGNORE, Batch, collate
from data_pipeline.loader import ShardSet
from data_pipeline.manifest import Manifest
from data_pipeline.order import permute
from pretrain.model import LossParts
from pretrain.parallel import Ranks, sum_over_ranks
from pretrain.run_folder import RunFolder, read_lines

_SPREAD = b"held-out rows, spread evenly....."[:32]


@dataclass(frozen=True)
class HeldOutRow:
    """A row of held-out text: its source, its shard's row in the table, its first token, its tokens (at most T + 1)."""

    source: int
    shard: int
    start: int
    tokens: int


class HeldOut:
    """The held-out rows of a run, dealt to ranks.

    length: tokens of a row. most: rows of each source, spread over all of it; None for every one.
    """

    def __init__(self, manifest: Manifest, shards: ShardSet, sources: list[str], length: int, most: int | None) -> None:
        self.sources, self.length, self._shards = sources, length, shards
        self.rows: list[HeldOutRow] = []
        for number, name in enumerate(sources):
            rows = [row for shard in manifest.rows_of(name, "heldout") for row in _cut(manifest, number, shard, length)]
            if most is not None and len(rows) > most:
                chosen = permute(np.arange(most, dtype=np.int64), len(rows), _SPREAD)
                rows = [rows[i] for i in sorted(chosen.tolist())]
            self.rows += rows

    def batches(self, ranks: Ranks, batch_rows: int) -> Iterator[Batch]:
        """This rank's batches. Every rank has equally many; one that has no rows left has a row that does not count."""
        per_round = batch_rows * ranks.world
        for at in range(0, len(self.rows), per_round):
            mine = self.rows[at + ranks.rank * batch_rows : at + (ranks.rank + 1) * batch_rows]
            yield self._batch(mine)

    def _batch(self, rows: list[HeldOutRow]) -> Batch:
        count = max(1, len(rows))
        tokens = np.zeros((count, self.length + 1), dtype=np.int64)
        boundaries, source = [_NONE] * count, np.zeros(count, dtype=np.int64)
        for i, row in enumerate(rows):
            shard, stop = self._shards[row.shard], row.start + row.tokens
            shard.copy(row.start, stop, tokens[i])
            boundaries[i] = shard.boundaries(row.start, stop) - row.start
            source[i] = row.source
        batch = collate(tokens, boundaries, source)
        for i in range(count):
            filled = rows[i].tokens - 1 if i < len(rows) else 0
            batch.targets_BT[i, filled:] = IGNORE
        return batch


_NONE = np.empty(0, dtype=np.int64)


def _cut(manifest: Manifest, source: int, shard: int, length: int) -> Iterator[HeldOutRow]:
    tokens = int(manifest.column("tokens")[shard])
    for start in range(0, tokens - 1, length):
        yield HeldOutRow(source, int(shard), start, min(length + 1, tokens - start))


def evaluate(
    forward: Callable[[Batch], LossParts],
    heldout: HeldOut,
    byte_lengths: np.ndarray,
    ranks: Ranks,
    *,
    batch_rows: int,
    alive: Callable[[], None] = lambda: None,
    told_by: Callable[[Sequence[float]], dict[str, float]] = lambda measures: {},
) -> dict[str, Any]:
    """The figures of an evaluation, the same on every rank.

    forward: the loss of a batch without gradient. byte_lengths: bytes of text behind each token id. alive: called
    before every batch. told_by: what the model's measures say, by names that `/` divides into a tree.
    """
    buckets = _bucket(heldout.length - 1) + 1
    sums = torch.zeros(len(heldout.sources), 3, dtype=torch.float64)
    places = torch.zeros(buckets, 2, dtype=torch.float64)
    measures = torch.zeros(0, dtype=torch.float64)
    lengths = torch.from_numpy(byte_lengths)
    bucket_of = torch.tensor([_bucket(t) for t in range(heldout.length)])
    for batch in heldout.batches(ranks, batch_rows):
        alive()
        parts = forward(batch)
        loss_BT = parts.loss_BT.double().cpu()
        counted = batch.targets_BT != IGNORE
        if parts.measures is not None:
            told = parts.measures.double().cpu() * bool(counted.any())
            measures = measures + told if len(measures) else told
        byte_BT = lengths[batch.targets_BT.clamp_min(0)] * counted
        per_row = torch.stack((loss_BT.sum(1), counted.sum(1).double(), byte_BT.sum(1).double()), dim=1)
        sums.index_add_(0, batch.source_B, per_row)
        per_token = torch.stack((loss_BT, counted.double()), dim=-1)
        places.index_add_(0, bucket_of[batch.pos_BT].flatten(), per_token.flatten(0, 1))
    sizes = [sums.numel(), places.numel(), measures.numel()]
    flat = sum_over_ranks(torch.cat((sums.flatten(), places.flatten(), measures))).cpu().split(sizes)
    sums, places = flat[0].view_as(sums), flat[1].view_as(places)
    named = {name: _figures(*sums[i].tolist()) for i, name in enumerate(heldout.sources) if sums[i, 1] > 0}
    by_position = [
        [2**k - 1, min(2 ** (k + 1) - 2, heldout.length - 1), total / count, int(count)]
        for k, (total, count) in enumerate(places.tolist())
        if count
    ]
    record = {"time": time.time(), **_figures(*sums.sum(0).tolist()), "sources": named, "by_position": by_position}
    tree = _tree(told_by(flat[2].tolist()) if len(flat[2]) else {})
    return record | ({"model": tree} if tree else {})


def lacks_evaluation(folder: RunFolder, step: int, stop: int, every: int) -> bool:
    """Whether a run saved a step that it was to evaluate and did not: it ended in between, or was asked to leave."""
    due = every and step in folder.committed_steps() and (step % every == 0 or step == stop)
    return bool(due) and all(record["step"] != step for record in read_lines(folder.evals))


def _tree(flat: dict[str, float]) -> dict[str, Any]:
    """`{"a/b": 1}` as `{"a": {"b": 1}}`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return tree


def _bucket(position: int) -> int:
    """Positions 0; 1-2; 3-6; 7-14; ... : as many tokens of context as all buckets before, and one more."""
    return (position + 1).bit_length() - 1


def _figures(total: float, count: float, size: float) -> dict[str, Any]:
    loss = total / count
    bits = total / log(2) / size if size else None
    return {"loss": loss, "perplexity": exp(min(loss, 700.0)), "bits_per_byte": bits, "tokens": int(count)}
