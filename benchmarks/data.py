"""Reading shards: tokens per CPU second against a flat file in memory and against webdataset's own reader.

All arms read the same tokens, page cache warm, into int64 batches of 8 rows of 1,025 tokens.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.common import Interval, Table, alternate, interval
from data_pipeline.build import build
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.inspect_shards import load_manifest
from data_pipeline.loader import Loader, ShardSet
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from data_pipeline.shards import Shard

ROWS, SIZE = 8, 1025
BATCH = ROWS * SIZE


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--mib", type=float, default=None, help="text to build shards from (default 24)")
    parser.add_argument("--rounds", type=int, default=None, help="rounds of alternated arms (default 9)")
    parser.add_argument("--build", action="store_true", help="text to shards instead, of 400 MiB unless --mib says so")


def run(options: argparse.Namespace) -> Table:
    """Measure and return the table."""
    if options.build:
        from benchmarks.data_build import run_build

        return run_build(options.mib or 400.0, options.rounds or 9)
    mib, rounds = options.mib or 24.0, options.rounds or 9
    table = Table("reading shards, one process, CPU time, (8, 1025) int64 batches")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = SourceConfig(path="stdlib", limit_mib=mib)
        data = DataConfig(dir=name, sources={"python": source}, heldout=0.01, shard_mib=16)
        build(data, folder, workers=os.cpu_count() or 1)
        manifest = load_manifest(folder)
        _sizes(table, manifest)
        _throughput(table, folder, manifest, rounds)
        _main_thread(table, folder, manifest)
        _resume(table, folder, manifest)
    return table


def _sizes(table: Table, manifest: Manifest) -> None:
    rows = manifest.rows_of("python", "train")
    tokens, size, documents = (int(manifest.column(c)[rows].sum()) for c in ("tokens", "bytes", "documents"))
    table.add("tokens a document", tokens / documents, "")
    table.add("bytes a token on disk", size / tokens, "B", goal=2.01)


def _throughput(table: Table, folder: Path, manifest: Manifest, rounds: int) -> None:
    infos = [manifest.shard(int(row)) for row in manifest.rows_of("python", "train")]
    flat = folder / "flat.bin"
    pieces = []
    for info in infos:
        out = np.empty(info.tokens, dtype=np.uint16)
        Shard(folder / info.name, info).copy(0, info.tokens, out)
        pieces.append(out)
    np.concatenate(pieces).tofile(flat)
    memory, batches = np.memmap(flat, dtype=np.uint16, mode="r"), sum(map(len, pieces)) // BATCH
    loader = _loader(folder, manifest)
    rng = np.random.default_rng(0)
    arms: dict[str, Callable[[], None]] = {
        "flat memmap, in sequence": lambda: _memmap_scan(memory, batches),
        "our blocks, in sequence, opened and verified": lambda: _block_scan(folder, infos),
        "webdataset's reader, same shards": lambda: _webdataset_scan(folder, infos),
        "flat memmap, random rows": lambda: _memmap_rows(memory, batches, rng),
        "our rows, shuffled (tokens alone)": lambda: _our_rows(loader, batches),
        "our whole batches (targets, documents, positions)": lambda: _our_batches(loader, batches),
    }
    for arm in arms.values():
        arm()
    rates = {name: [batches * BATCH / s / 1e6 for s in seconds] for name, seconds in alternate(arms, rounds).items()}
    for name, values in rates.items():
        spread = interval(values)
        table.add(name, spread.median, "Mtok per CPU s", spread=spread)
    scan, wds, rows = "our blocks, in sequence, opened and verified", "webdataset's reader, same shards", list(arms)[4]
    _ratio(table, "block scan / sequential memmap", rates[scan], rates["flat memmap, in sequence"], 0.9)
    _ratio(table, "block scan / webdataset's reader", rates[scan], rates[wds], 1.5)
    _ratio(table, "shuffled rows / random rows of a memmap", rates[rows], rates["flat memmap, random rows"], 1.0)
    whole = list(arms)[5]
    _ratio(table, "whole batches / random rows of a memmap", rates[whole], rates["flat memmap, random rows"], None)


def _ratio(table: Table, name: str, ours: list[float], theirs: list[float], goal: float | None) -> None:
    spread: Interval = interval([a / b for a, b in zip(ours, theirs)])
    table.add(name, spread.median, "x", goal=goal, sense=">=", spread=spread)


def _memmap_scan(memory: np.memmap, batches: int) -> None:
    for i in range(batches):
        memory[i * BATCH : (i + 1) * BATCH].astype(np.int64)


def _block_scan(folder: Path, infos: list) -> None:
    for info in infos:
        shard = Shard(folder / info.name, info)
        for start in range(0, info.tokens - BATCH + 1, BATCH):
            shard.copy(start, start + BATCH, np.empty(BATCH, dtype=np.int64))


def _webdataset_scan(folder: Path, infos: list) -> None:
    import webdataset

    rest = np.empty(0, dtype=np.uint16)
    for sample in webdataset.WebDataset([str(folder / info.name) for info in infos], shardshuffle=False):
        rest = np.concatenate((rest, np.frombuffer(sample["tokens.u16"], dtype=np.uint16)))
        whole = len(rest) // BATCH * BATCH
        for start in range(0, whole, BATCH):
            rest[start : start + BATCH].astype(np.int64)
        rest = rest[whole:]


def _memmap_rows(memory: np.memmap, batches: int, rng: np.random.Generator) -> None:
    for _ in range(batches):
        starts = rng.integers(0, len(memory) - SIZE, ROWS)
        np.stack([memory[start : start + SIZE].astype(np.int64) for start in starts])


def _our_rows(loader: Loader, batches: int) -> None:
    """The order and the reading, as the loader does them, without what makes a batch of rows."""
    rows, shards = loader._order.rows(0, batches * ROWS), loader._shards
    places: Iterator[tuple[int, int]] = zip(rows.shard.tolist(), rows.start.tolist())
    for _ in range(batches):
        tokens = np.empty((ROWS, SIZE), dtype=np.int64)
        for i, (shard, start) in zip(range(ROWS), places):
            shards[shard].copy(start, start + SIZE, tokens[i])


def _our_batches(loader: Loader, batches: int) -> None:
    for _ in loader.steps(0, batches):
        pass


def _loader(folder: Path, manifest: Manifest) -> Loader:
    order = Order(manifest, length=SIZE - 1, seed=0, weights={"python": 1.0})
    shards = ShardSet(manifest, lambda info: folder / info.name)
    return Loader(order, shards, batch_rows=ROWS, micro_rows=ROWS, rank=0, world=1)


def _main_thread(table: Table, folder: Path, manifest: Manifest) -> None:
    """What the training thread spends on getting a batch while the loader's thread makes it."""
    loader, spent = _loader(folder, manifest), []
    for _ in range(600):
        time.sleep(0.001)  # a step; the loader's thread works meanwhile
        began = time.thread_time()
        loader.next()
        spent.append(1e6 * (time.thread_time() - began))
    loader.close()
    total = sum(spent[100:]) / len(spent[100:])
    table.add("main thread, mean per (8, 1025) batch", total, "us", goal=50.0)


def _resume(table: Table, folder: Path, manifest: Manifest) -> None:
    """Time to the first batch, from the start and from nine tenths of an epoch."""
    seconds: dict[float, list[float]] = {0.0: [], 0.9: []}
    for _ in range(15):
        for share in seconds:
            loader = _loader(folder, manifest)
            rows = int(loader._order.epoch_rows(0) * share) // ROWS * ROWS
            began = time.perf_counter()
            loader.seek(rows)
            loader.next()
            seconds[share].append(time.perf_counter() - began)
            loader.close()
    spread = interval([b / a for a, b in zip(seconds[0.0], seconds[0.9])])
    table.add("first batch at 90 % of an epoch / at its start", spread.median, "x", spread=spread)
