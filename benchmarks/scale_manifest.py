"""What a very large data set costs a rank: a manifest of a million shards, 100 trillion tokens, and the first batch.

The manifest is synthetic, written and read as every manifest is; each reading is a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.common import Table, interval
from data_pipeline import manifest as manifests
from data_pipeline.manifest import HEADER, SCHEMA, TABLE, Manifest, TokenizerInfo

SOURCES, WINDOW, LENGTH, BATCH = ("code", "web"), 64, 4096, 1024
LOAD_S, MEMORY_GIB, FIRST_S = 10.0, 2.0, 1.0
_READ = """
import json, sys, time
from pathlib import Path
import numpy, pyarrow.parquet
from data_pipeline import manifest as manifests
from data_pipeline.manifest import HEADER, TABLE
from data_pipeline.order import Order
folder, (length, window, batch) = Path(sys.argv[1]), map(int, sys.argv[2:])
began = time.perf_counter()
read = manifests.decode((folder / HEADER).read_bytes(), (folder / TABLE).read_bytes(), str(folder))
loaded = time.perf_counter()
order = Order(read, length=length, seed=0, weights={"code": 1.0, "web": 3.0}, window=window)
ready = time.perf_counter()
order.rows(0, batch)
first = time.perf_counter()
order.rows(10**10, batch)
there = time.perf_counter()
# not ru_maxrss, which begins with the memory of the process that started this one
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps({"load": loaded - began, "order": ready - loaded, "first": first - ready, "far": there - first,
                  "gib": int(peak.split()[1]) / (1 << 20)}))
"""


@dataclass(frozen=True)
class Cost:
    """Of a shard of the manifest: bytes in storage, and seconds until a rank knows its first batch."""

    shard_bytes: float
    shard_s: float


def manifest(table: Table, shards: int, rounds: int) -> Cost:
    """Write the manifest, read it several times, and add the figures."""
    tokens = 100_000_000
    with tempfile.TemporaryDirectory() as name:
        began = time.perf_counter()
        header, rows = manifests.encode(_synthetic(shards, tokens))
        (Path(name) / HEADER).write_bytes(header)
        (Path(name) / TABLE).write_bytes(rows)
        what = f"({len(rows) / (1 << 20):.0f} MiB, {shards * tokens / 1e12:,.0f} trillion tokens)"
        table.add(f"a manifest of {shards:,} shards: to write it", time.perf_counter() - began, "s", note=what)
        found = [_read(Path(name)) for _ in range(rounds)]
    for what, key, unit, goal in (
        ("manifest: load and verify", "load", "s", LOAD_S),
        ("manifest: the order of all rows", "order", "s", None),
        (f"manifest: first batch of {BATCH:,} rows", "first", "s", FIRST_S),
        ("manifest: a batch ten billion rows later", "far", "s", FIRST_S),
        ("manifest: memory of the process at its most", "gib", "GiB", MEMORY_GIB),
    ):
        spread = interval([one[key] for one in found])
        table.add(what, spread.median, unit, goal=goal, spread=spread)
    first = interval([one["load"] + one["order"] + one["first"] for one in found]).median
    return Cost(len(rows) / shards, first / shards)


def _read(folder: Path) -> dict[str, float]:
    words = [sys.executable, "-c", _READ, str(folder), *map(str, (LENGTH, WINDOW, BATCH))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _synthetic(count: int, tokens: int) -> Manifest:
    """Shards as a build would have named and hashed them."""
    rng = np.random.default_rng(0)
    hashes = [rng.bytes(32).hex() for _ in range(count)]
    of = np.arange(count) * len(SOURCES) // count
    columns = {
        "source": [SOURCES[number] for number in of], "split": ["train"] * count,
        "name": [f"{SOURCES[number]}-train-{row:07d}-00.tar" for row, number in enumerate(of)],
        "bytes": np.full(count, 2 * tokens), "sha256": hashes,
        "tokens": tokens + rng.integers(-1000, 1000, count), "documents": rng.integers(10_000, 100_000, count),
        "text_bytes": np.full(count, 4 * tokens), "index_offset": np.full(count, 2 * tokens - 4096),
        "index_sha256": hashes[::-1],
    }  # fmt: skip
    made = pa.table(columns, schema=SCHEMA)
    tokenizer = TokenizerInfo("bytes", "0" * 64, 257)
    return Manifest(tokenizer, made, {name: {} for name in SOURCES}, manifests.fingerprint(tokenizer, made))
