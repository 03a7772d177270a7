"""`python -m benchmarks data --build`: text to shards, by one process, by two, and by a Ray cluster of the same cores.

Wall time, since the arms are processes; what each takes to start is measured apart. Every arm makes the same bytes.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.common import Table, interval
from data_pipeline.build import build
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.corpora import plan, read
from data_pipeline.on_ray import ray_executor
from data_pipeline.pool import executor_of

WORKERS = 2
_FILE_BYTES = 4 << 20
Arm = Callable[[], AbstractContextManager[Executor]]
ARMS: dict[str, tuple[int, Arm]] = {
    "one process": (1, lambda: executor_of(1)),
    "two processes": (WORKERS, lambda: executor_of(WORKERS)),
    "Ray": (2 * WORKERS, lambda: ray_executor("local", WORKERS)),
}
"""How many tasks are under way, and who works."""


def run_build(mib: float, rounds: int) -> Table:
    """Build `mib` of text with every arm in turn, and return the table."""
    table = Table(f"building shards from {mib:.0f} MiB of text, byte tokenizer, duplicates kept, wall time")
    with tempfile.TemporaryDirectory() as name:
        _write_text(Path(name) / "text", int(mib * (1 << 20)))
        source = SourceConfig(path=str(Path(name) / "text"))
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        started: dict[str, list[float]] = {arm: [] for arm in ARMS}
        made: set[str] = set()
        for number in range(rounds):
            for arm, (in_flight, executor) in ARMS.items():
                out = Path(name) / f"{arm}-{number}".replace(" ", "_")
                data = DataConfig(dir=str(out), sources={"text": source}, duplicates="keep", heldout=0.0, shard_mib=16)
                began = time.perf_counter()
                with executor() as workers:
                    for future in [workers.submit(_nothing) for _ in range(4 * WORKERS)]:
                        future.result()
                    started[arm].append(time.perf_counter() - began)
                    began = time.perf_counter()
                    made.add(build(data, out, workers=in_flight, executor=workers).fingerprint)
                    seconds[arm].append(time.perf_counter() - began)
        assert len(made) == 1, "all arms must make the same shards"
    for arm, times in seconds.items():
        rate = interval([mib / took for took in times])
        table.add(arm, rate.median, "MiB/s", spread=rate, note=f"(start-up {min(started[arm]):.1f} s, not counted)")
    for arm, other, goal in (("two processes", "one process", 1.8), ("Ray", "two processes", 0.9)):
        ratio = interval([b / a for a, b in zip(seconds[arm], seconds[other])])
        table.add(f"{arm} / {other}", ratio.median, "x", goal=goal, sense=">=", spread=ratio)
    return table


def _nothing() -> None:
    """Makes a worker start, and import what it needs."""
    import data_pipeline.tasks  # noqa: F401


def _write_text(folder: Path, size: int) -> None:
    """So much text as files of JSON lines: Python's own library, as often as it takes."""
    folder.mkdir()
    documents = [d.text for part in plan("text", SourceConfig(path="stdlib"), _FILE_BYTES).slices for d in read(part)]
    written, number, lines, held = 0, 0, list[str](), 0
    while written < size:
        for text in documents:
            lines.append(json.dumps({"text": text}))
            held += len(text)
            if held >= _FILE_BYTES or written + held >= size:
                (folder / f"{number:05d}.jsonl").write_text("\n".join(lines) + "\n")
                written, number, lines, held = written + held, number + 1, [], 0
            if written >= size:
                return
