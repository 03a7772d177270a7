"""Which documents a training step read: the order of the rows, asked for people instead of for a model.

Nothing was recorded while training. The run folder says which rows the step took and in what mixture, the shards say
what stands there, so the answer is the same for every step of every run, also for steps that are still to come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import DataError, UsageError
from configs.load import load
from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.order import Order
from data_pipeline.places import public
from data_pipeline.shards import Shard
from pretrain.checkpoint_files import read_manifest
from pretrain.config import RunConfig
from pretrain.place import Place, beginning, numbering, place_of, reads_on
from pretrain.run_folder import RunFolder, step_name

PREVIEW_TOKENS = 64


@dataclass(frozen=True)
class Part:
    """What a row read of one document: `tokens` of it, from its token `first` on."""

    name: str
    first: int
    tokens: int


@dataclass(frozen=True)
class Row:
    """One row of a step. number: in the run. first: its first token within the shard. text: how it begins."""

    number: int
    source: str
    shard: str
    first: int
    parts: tuple[Part, ...]
    text: str


@dataclass(frozen=True)
class Step:
    """What one step reads. number: from 1, as in metrics.jsonl. rows: how many, from row `first_row` of the run on."""

    number: int
    length: int
    first_row: int
    count: int
    rows: Iterator[Row]


def explain(folder: RunFolder, step: int) -> Step:
    """The rows of step `step` of a run, counted from 1 as in metrics.jsonl, and the documents behind them.

    Raises UsageError for a step that is not this run's, DataError where the shards are not those it was trained on.
    """
    config = load(RunConfig, [folder.config])
    dataset = open_dataset(config.data)
    _check_same_data(folder, config, dataset)
    anchor, begins_at = _anchor(folder, config, dataset)
    if step < begins_at + 1:
        origin = f"; steps up to {begins_at} are those of {folder.facts()['from']['run']}" if step > 0 else ""
        raise UsageError(f"{folder.name} has no step {step}: its first is {begins_at + 1}{origin}")
    changed_at = _changed_at(folder)
    if step <= changed_at:
        raise UsageError(
            f"{folder.name} went on after step {changed_at} with another train.batch_rows or model.length; ask for"
            " a later step"
        )
    batch = config.train.batch_rows
    first = anchor.rows + (step - 1 - anchor.step) * batch
    (_, weights), *changes = anchor.weights
    order = Order(
        dataset.manifest, length=config.model.length, seed=config.run.seed, weights=weights,
        window=config.data.window, changes=changes, skips=anchor.skips,
    )  # fmt: skip
    return Step(step, config.model.length, first, batch, _rows(order, dataset, first, batch))


def _rows(order: Order, dataset: Dataset, first: int, count: int) -> Iterator[Row]:
    found = order.rows(first, count)
    opened, ends, names = -1, np.empty(0, dtype=np.int64), list[str]()
    for number, (source, place, start) in enumerate(zip(found.source, found.shard, found.start.tolist())):
        shard = dataset.shards[int(place)]
        if place != opened:
            opened, ends, names = int(place), shard.ends()[:, 0], shard.names()
        parts = tuple(_parts(ends, names, start, start + order.length + 1))
        text = _text(shard, dataset, start, min(order.length, PREVIEW_TOKENS))
        yield Row(first + number, order.names[source], shard.info.name, start, parts, text)


def _parts(ends: np.ndarray, names: list[str], start: int, stop: int) -> Iterator[Part]:
    """The documents that tokens [start, stop) belong to."""
    at = start
    document = int(np.searchsorted(ends, start, side="right"))
    while at < stop:
        begin = int(ends[document - 1]) if document else 0
        yield Part(names[document], at - begin, min(int(ends[document]), stop) - at)
        at, document = int(ends[document]), document + 1


def _text(shard: Shard, dataset: Dataset, start: int, count: int) -> str:
    ids = np.empty(count, dtype=np.int64)
    shard.copy(start, start + count, ids)
    return dataset.tokenizer.decode(ids)


def _check_same_data(folder: RunFolder, config: RunConfig, dataset: Dataset) -> None:
    stated = folder.facts().get("data_fingerprint", dataset.manifest.fingerprint)
    if stated != dataset.manifest.fingerprint:
        raise DataError(
            f"{public(config.data.dir)} holds other shards than {folder.name} was trained on (fingerprint"
            f" {dataset.manifest.fingerprint[:12]}…, the run has {stated[:12]}…); put the old ones back to ask about it"
        )


def _anchor(folder: RunFolder, config: RunConfig, dataset: Dataset) -> tuple[Place, int]:
    """The newest place that is known, of this run or, before its first checkpoint, of the run it branched from; and the
    step after which this run begins."""
    own = {name: source.weight for name, source in config.data.sources.items()}
    origin, begins_at = folder.facts().get("from"), 0
    resumed = [event["step"] for event in folder.history() if event["event"] == "resume" and event.get("step")]
    if origin is not None and "run" not in origin:
        # what begins with parts of other runs begins with the first row
        origin = None
    if origin is not None:
        begins_at = int(origin["step"] or (resumed[0] if resumed else 0))
    found = _newest_manifest(folder)
    if found is None and origin is not None:
        other = RunFolder(Path(origin["run"]))
        found = read_manifest(other.checkpoints / step_name(begins_at)) if begins_at else _newest_manifest(other)
        if found is None:
            raise DataError(f"{folder.name} branched from {origin['run']}, which has no checkpoint to tell from where")
        begins_at = found["step"]
    if found is None:
        return beginning(0, own), begins_at
    if not reads_on(found, numbering(config, dataset.manifest.fingerprint), own):
        return beginning(found["step"], own), begins_at
    return place_of(found, own), begins_at


_DEALING = {"train.batch_rows", "model.length", "run.seed", "data.window"}
"""What may be allowed to change, and deals rows to steps otherwise."""


def _changed_at(folder: RunFolder) -> int:
    """The step after which rows were last dealt to steps otherwise than before; 0 where they never were."""
    step, waits = 0, False
    for event in folder.history():
        if event["event"] == "change":
            waits |= not _DEALING.isdisjoint(event["changes"])
        elif event["event"] == "resume" and waits:
            step, waits = event["step"], False
    return step


def _newest_manifest(folder: RunFolder) -> dict[str, Any] | None:
    """What the newest checkpoint says whose manifest is whole; its tensors do not matter here."""
    for step in folder.committed_steps():
        try:
            return read_manifest(folder.checkpoints / step_name(step))
        except DataError:
            continue
    return None
