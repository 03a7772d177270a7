"""`python -m benchmarks data --build`: text to shards, by one process, by two, and by a Ray cluster of the same cores.

Wall time, for the arms are processes, so the machine must be idle; its load is printed. Before the clock runs, every
worker has done a task beside all the others, and has built shards; how long that took is printed and not counted. The
arms take turns, the order turned round each time, and all of them make the same bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from benchmarks.common import Table, interval
from data_pipeline.build import build
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.corpora import plan, read
from data_pipeline.documents import Slice
from data_pipeline.duplicates import repeated
from data_pipeline.on_ray import ray_executor
from data_pipeline.pool import executor_of

WORKERS = 2
SHARD_MIB = 16
"""Small, so that no worker has to wait long for the last slice: about 8 MiB of text a shard, 50 slices of 400 MiB. A
build's own shards are 256 MiB unless it is told otherwise."""
_FILE_BYTES = 32 << 20
_MEET_S = 180.0
_HASHES = 2_000_000
Arm = Callable[[], AbstractContextManager[Executor]]
ONE, TWO, RAY = "one process", "two processes", "Ray"
ARMS: dict[str, tuple[int, int, Arm]] = {
    ONE: (1, 1, lambda: executor_of(1)),
    TWO: (WORKERS, 2 * WORKERS, lambda: executor_of(WORKERS)),
    RAY: (WORKERS, 2 * WORKERS, lambda: ray_executor("local", WORKERS)),
}
"""How many workers there are, how many tasks are under way, and who works."""


def run_build(mib: float, rounds: int) -> Table:
    """Build `mib` of text with every arm in turn, and return the table.

    Processes are compared before there is a Ray cluster, whose own processes would take their share of the cores.
    """
    table = Table(f"building shards from {mib:.0f} MiB of text, byte tokenizer, duplicates kept, wall time")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_text(folder / "little", 8 * SHARD_MIB << 20)
        _write_text(folder / "text", int(mib * (1 << 20)))
        for arms, over, goal in (((ONE, TWO), ONE, 1.8), ((TWO, RAY), TWO, 0.9)):
            with contextlib.ExitStack() as stack:
                seconds, started, executors = _alternate(folder, arms, rounds, stack)
                beside = " (beside a Ray cluster)" if RAY in arms else ""
                for arm in arms:
                    rate = interval([mib / took for took in seconds[arm]])
                    note = f"(start-up {started[arm]:.1f} s, not counted)"
                    table.add(arm + (beside if arm == TWO else ""), rate.median, "MiB/s", spread=rate, note=note)
                ratio = interval([b / a for a, b in zip(seconds[arms[1]], seconds[over])])
                table.add(f"{arms[1]} / {over}", ratio.median, "x", goal=goal, sense=">=", spread=ratio)
                if RAY in arms:
                    reading = _read_both_ways(folder / "text", executors[RAY], rounds)
    for way, times in reading.items():
        rate = interval([mib / took for took in times])
        table.add(f"reading alone, {way}", rate.median, "MiB/s", spread=rate)
    table.add("memory to find duplicates, a document", _bytes_a_document(), "B", note="(where the build was begun)")
    return table


def _alternate(
    folder: Path, arms: Sequence[str], rounds: int, stack: contextlib.ExitStack
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, Executor]]:
    """Seconds of every arm's builds, in turns; how long each took to start, and what it is."""
    executors, started, made = dict[str, Executor](), dict[str, float](), set[str]()
    for arm in arms:
        workers, in_flight, executor = ARMS[arm]
        began = time.perf_counter()
        executors[arm] = stack.enter_context(executor())
        meet(executors[arm], folder / f"meet {arm} beside {arms[0]}", workers)
        _timed(folder / "little", folder / f"little {arm} beside {arms[0]}", in_flight, executors[arm])
        started[arm] = time.perf_counter() - began
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(rounds):
        for arm in list(arms) if number % 2 == 0 else list(reversed(arms)):
            out = folder / f"{arm} {number} beside {arms[0]}"
            took, fingerprint = _timed(folder / "text", out, ARMS[arm][1], executors[arm])
            seconds[arm].append(took)
            made.add(fingerprint)
    assert len(made) == 1, "all arms must make the same shards"
    return seconds, started, executors


def _timed(text: Path, out: Path, in_flight: int, executor: Executor) -> tuple[float, str]:
    """Seconds of a build, and the fingerprint of what it made."""
    source = SourceConfig(path=str(text))
    data = DataConfig(dir=str(out), sources={"text": source}, duplicates="keep", heldout=0.0, shard_mib=SHARD_MIB)
    # what earlier builds wrote must not be on its way to the disk while this one is measured
    os.sync()
    began = time.perf_counter()
    made = build(data, out, workers=in_flight, executor=executor)
    took = time.perf_counter() - began
    for path in out.glob("*.tar"):
        path.unlink()
    return took, made.fingerprint


def _read_both_ways(text: Path, executor: Executor, rounds: int) -> dict[str, list[float]]:
    """Seconds to read all text on the cluster, in slices: by our tasks, and by Ray Data. The first round warms up."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    slices = plan("text", SourceConfig(path=str(text)), SHARD_MIB << 19).slices

    def tasks() -> int:
        return sum(future.result() for future in [executor.submit(_characters, part) for part in slices])

    def ray_data() -> int:
        rows = ray.data.read_json([str(path) for path in sorted(text.iterdir())]).repartition(len(slices))
        counts = rows.map_batches(lambda batch: {"count": np.array([sum(map(len, batch["text"]))])}).take_all()
        return sum(int(row["count"]) for row in counts)

    seconds: dict[str, list[float]] = {"our tasks": [], "Ray Data, repartitioned": []}
    for number in range(rounds + 1):
        found, ways = [], list(zip(seconds, (tasks, ray_data)))
        for way, action in ways if number % 2 == 0 else reversed(ways):
            began = time.perf_counter()
            found.append(action())
            if number:
                seconds[way].append(time.perf_counter() - began)
        assert found[0] == found[1], "both must read the same text"
    return seconds


def _characters(part: Slice) -> int:
    return sum(len(document.text) for document in read(part))


def meet(executor: Executor, folder: Path, workers: int) -> None:
    """Return when so many workers have been at work at the same time."""
    folder.mkdir()
    for future in [executor.submit(_wait_for_others, str(folder), workers) for _ in range(workers)]:
        future.result()


def _wait_for_others(folder: str, workers: int) -> None:
    Path(folder, str(os.getpid())).touch()
    deadline = time.monotonic() + _MEET_S
    while len(os.listdir(folder)) < workers:
        assert time.monotonic() < deadline, f"{workers} workers did not start within {_MEET_S:.0f} s"
        time.sleep(0.01)


def _bytes_a_document() -> float:
    """The most memory that finding exact duplicates takes, with one document in ten there before."""
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**64, (_HASHES, 2), dtype=np.uint64)
    hashes[::10] = hashes[1::10]
    tracemalloc.start()
    repeated([part.copy() for part in np.array_split(hashes, 100)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / _HASHES


def _write_text(folder: Path, size: int) -> None:
    """So much text as files of JSON lines: Python's own library, as often as it takes."""
    folder.mkdir()
    documents = [d.text for part in plan("text", SourceConfig(path="stdlib"), _FILE_BYTES).slices for d in read(part)]
    written, number, lines, held = 0, 0, list[str](), 0
    for text in itertools.cycle(documents):
        lines.append(json.dumps({"text": text}))
        held += len(text)
        if held >= _FILE_BYTES or written + held >= size:
            (folder / f"{number:05d}.jsonl").write_text("\n".join(lines) + "\n")
            written, number, lines, held = written + held, number + 1, [], 0
        if written >= size:
            return
