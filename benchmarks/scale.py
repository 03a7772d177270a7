"""What a very large data set costs a rank: a manifest of a million shards, 100 trillion tokens, and the first batch.

The manifest is synthetic, written and read as every manifest is; each reading is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.common import Table, interval
from data_pipeline import manifest as manifests
from data_pipeline.manifest import HEADER, SCHEMA, TABLE, Manifest, TokenizerInfo

SOURCES, WINDOW, LENGTH, BATCH = ("code", "web"), 64, 4096, 1024
LOAD_S, MEMORY_GIB, FIRST_S = 10.0, 2.0, 1.0
_READ = """
import json, resource, sys, time
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
print(json.dumps({"load": loaded - began, "order": ready - loaded, "first": first - ready, "far": there - first,
                  "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)}))
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)


def run(options: argparse.Namespace) -> Table:
    """Write the manifest, read it several times, and return the table."""
    tokens = 100_000_000
    table = Table(f"a manifest of {options.shards:,} shards, {options.shards * tokens / 1e12:,.0f} trillion tokens")
    with tempfile.TemporaryDirectory() as name:
        began = time.perf_counter()
        header, rows = manifests.encode(_synthetic(options.shards, tokens))
        (Path(name) / HEADER).write_bytes(header)
        (Path(name) / TABLE).write_bytes(rows)
        table.add("to write it", time.perf_counter() - began, "s", note=f"({len(rows) / (1 << 20):.0f} MiB)")
        found = [_read(Path(name)) for _ in range(options.rounds)]
    for what, key, unit, goal in (
        ("load and verify", "load", "s", LOAD_S),
        ("the order of all rows", "order", "s", None),
        (f"first batch of {BATCH:,} rows", "first", "s", FIRST_S),
        ("a batch ten billion rows later", "far", "s", FIRST_S),
        ("memory of the process", "gib", "GiB", MEMORY_GIB),
    ):
        spread = interval([one[key] for one in found])
        table.add(what, spread.median, unit, goal=goal, spread=spread)
    return table


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
