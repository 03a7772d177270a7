"""The simulation held to this machine: constants that are measured here, and real runs of 1, 2 and 4 ranks.

No constant is fitted on a supervised run. They come from one rank without a supervisor and from two of them
(benchmarks/simulate_probe.py), from a snapshot written to memory and to the disk, and from processes that do nothing.
The cores that other work on this machine took while a run was measured are taken from the simulated machine as well.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.simulate_run import Job, Machine
from launcher.network import free_port
from launcher.prepare import prepare
from pretrain.engine import Fragment
from pretrain.run_folder import RunFolder
from pretrain.snapshot import Snapshot

LENGTH, ROWS, STEPS, SAVE_EVERY, WARM = 256, 4, 24, 10, 2
PATIENCE_S = 240.0
_CONFIG = """
run: {{name: here, dir: {folder}/runs}}
data: {{dir: {folder}/shards, shard_mib: 1, sources: {{stdlib: {{path: stdlib, limit_mib: 8}}}}}}
model: {{width: 256, depth: 4, length: {length}, mixers: [{{name: attention}}]}}
train: {{steps: {steps}, batch_rows: {rows}}}
engine: {{device: cpu, threads: 1}}
checkpoint: {{every: {every}}}
log: {{peak_tflops: 0.05}}
"""


@dataclass(frozen=True)
class Measured:
    """A real run: seconds to its first step, of a step, that a save blocks, until it is durable. cores: that were left
    to it, until the first step and after it. from_disk: bytes that all ranks got from the disk before the first step,
    where none of the data was in memory."""

    first_s: float
    step_s: float
    blocked_s: float
    durable_s: float
    cores: tuple[float, float]
    from_disk: float


def configure(folder: Path) -> Path:
    """A configuration for this machine, its shards built; return the file."""
    path = folder / "here.yaml"
    path.write_text(_CONFIG.format(folder=folder, length=LENGTH, steps=STEPS, rows=ROWS, every=SAVE_EVERY))
    _launcher("data", "build", str(path))
    return path


def job(ranks: int, facts: dict[str, Any]) -> Job:
    """What is run here on so many ranks, as the simulation sees it."""
    shards = len(list(Path(facts["shards"]).glob("*.tar")))
    return Job(
        ranks=ranks, shards=shards, rows=ROWS, row_bytes=2.0 * LENGTH, window=float(shards << 20), sources=1,
        state_bytes=facts["alone"]["state_bytes"], steps=STEPS, save_at=SAVE_EVERY,
    )  # fmt: skip


def measure(config: Path) -> dict[str, Any]:
    """Everything that the constants of this machine are made from."""
    folder = config.parent
    alone, two = (_probe(config, ranks) for ranks in (1, 2))
    return {
        "alone": alone, "two": two, "shards": str(folder / "shards"), "spawn_s": _spawn_s(),
        **_saving(folder, int(alone["state_bytes"])), **_looking(folder),
    }  # fmt: skip


def machine(facts: dict[str, Any], cores: float, ranks: int) -> Machine:
    """This machine with so many cores left to a run."""
    alone, two = facts["alone"], facts["two"]
    step = statistics.median(alone["step_cpu"])
    calls = two["collectives"]
    gathers = [calls[name] for name in ("all_gather_into_tensor", "all_gather") if name in calls]
    return Machine(
        name="this machine", ranks_per_node=ranks, cores=cores, spawn_s=facts["spawn_s"], fan_out_s=0.0,
        start_core_s=alone["start_cpu"], start_bytes=0.0, start_looks=0.0,
        ready_core_s=alone["ready_cpu"],
        meet_core_s=max(0.0, two["ready_cpu"] - alone["ready_cpu"]), shard_core_s=0.0, shard_bytes=0.0,
        looks=1 / facts["look_s"], look_s=facts["look_s"], makes=1 / facts["make_s"], make_s=facts["make_s"],
        read=4e9, node_read=4e9, write=facts["write"], node_write=facts["write"] * ranks,
        step_s=step, first_step_s=alone["first_cpu"], on_cores=True,
        jitter=tuple(cpu / step for cpu in alone["step_cpu"]),
        reduces=_each(*calls["all_reduce"]), gathers=tuple(size for call in gathers for size in _each(*call)),
        hop_s=two["latency_s"], far_hop_s=0.0, near=1e12, far=1e12, byte_core_s=two["byte_cpu"],
        copy=facts["copy"], save_core_s=facts["save_core_s"],
    )  # fmt: skip


def real_run(config: Path, ranks: int) -> Measured:
    """Train under the supervisor, as anybody would, and read what the run folder tells."""
    name = f"real-{ranks}-{time.time_ns()}"
    words = [sys.executable, "-m", "launcher", "train", str(config), f"train.batch_rows={ROWS * ranks}",
             f"run.name={name}", "--ranks", str(ranks)]  # fmt: skip
    forget(config.parent / "shards")
    process = psutil.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_environment())
    load = _Load(process)
    try:
        if process.wait(timeout=PATIENCE_S):
            raise RuntimeError(f"a run of {ranks} ranks ended with {process.returncode}: {process.stderr.read()!r}")
    finally:
        load.stop()
        if process.poll() is None:
            process.kill()
    folder = RunFolder(config.parent / "runs" / name)
    return _read(folder, load)


def _read(folder: RunFolder, load: _Load) -> Measured:
    history, rows = folder.history(), list(folder.steps().values())
    launched = next(event["time"] for event in history if event["event"] == "launch")
    saves = [event for event in history if event["event"] == "checkpoint" and event["step"] < STEPS]
    blocked = [rows[at]["time"] - rows[at - 1]["time"] - rows[at]["step_s"] for at in (e["step"] for e in saves)]
    first, last = rows[0]["time"], rows[-1]["time"]
    return Measured(
        first_s=first - launched,
        step_s=statistics.median(row["step_s"] for row in rows[WARM:]),
        blocked_s=statistics.median(blocked),
        durable_s=statistics.median(event["seconds"] for event in saves),
        cores=(load.cores_left(launched, first), load.cores_left(first, last)),
        from_disk=load.from_disk(first),
    )


def forget(folder: Path) -> None:
    """Have the kernel keep nothing of a folder's files in memory."""
    for path in (each for each in folder.iterdir() if each.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _Load:
    """Watches how much of the cores a process and its children use, and how much all others do."""

    def __init__(self, process: psutil.Process) -> None:
        self._process, self._seen = process, [(time.time(), _busy(), 0.0, 0.0)]
        self._of: dict[int, float] = {}
        self._read: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="load")
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._over.set()
        self._thread.join()

    def cores_left(self, begin: float, end: float) -> float:
        """Cores of this machine that others left, on average between two times."""
        near = [min(self._seen, key=lambda seen: abs(seen[0] - at)) for at in (begin, end)]
        (t0, all0, own0, _), (t1, all1, own1, _) = near
        others = max(0.0, (all1 - all0) - (own1 - own0)) / max(t1 - t0, 1e-9)
        cores = psutil.cpu_count() or 1
        return max(0.25 * cores, cores - others)

    def from_disk(self, until: float) -> float:
        """Bytes that the process and its children got from disks before some time."""
        return max(seen[3] for seen in self._seen if seen[0] <= until + 0.2)

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            try:
                for each in [self._process, *self._process.children(recursive=True)]:
                    times = each.cpu_times()
                    self._of[each.pid] = times.user + times.system
                    self._read[each.pid] = float(each.io_counters().read_bytes)
            except psutil.Error:
                continue
            self._seen.append((time.time(), _busy(), sum(self._of.values()), sum(self._read.values())))


def _busy() -> float:
    """Seconds of all cores that anybody used, or that the host did not give."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def _each(count: float, size: float) -> tuple[float, ...]:
    """The bytes of each of `count` collectives of a step, `size` in all: one carries nearly all, the rest little."""
    return (size, *(8.0 for _ in range(max(0, round(count) - 1))))


def _probe(config: Path, ranks: int) -> dict[str, Any]:
    """Ranks without a supervisor; what rank 0 prints."""
    name = f"probe-{ranks}-{time.time_ns()}"
    prepared = prepare(
        [config], [f"train.batch_rows={ROWS * ranks}", f"run.name={name}"], ranks=ranks, branch=(), allow=[]
    )
    meeting = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(free_port("127.0.0.1")), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    words = [sys.executable, "-m", "benchmarks.simulate_probe", str(prepared.folder.path)]
    started = [
        subprocess.Popen(
            words, env=_environment() | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    told = [process.communicate(timeout=PATIENCE_S)[0] for process in started]
    return json.loads(told[0].splitlines()[-1])


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def _launcher(*words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "launcher", *words], check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE_S
    )


def _spawn_s() -> float:
    """Seconds that it takes to start a process, for whoever starts it."""
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-c", "pass"])
        seconds.append(time.perf_counter() - began)
        process.wait()
    return statistics.median(seconds)


def _saving(folder: Path, size: int) -> dict[str, float]:
    """A snapshot of another state of this size, copied, written to memory, and written to the disk of `folder`."""
    fragments = [Fragment(f"p{n}", "param", 0, torch.rand(size // 32)) for n in range(8)]
    snapshot = Snapshot(fragments)
    snapshot.take(fragments)
    copies, cores, disk = [], [], []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        for number in range(3):
            began = time.perf_counter()
            snapshot.take(fragments)
            copies.append(time.perf_counter() - began)
            began, cpu = time.perf_counter(), time.process_time()
            snapshot.write(Path(memory) / str(number))
            streamed = time.perf_counter() - began
            cores.append((time.process_time() - cpu) / size)
            began = time.perf_counter()
            snapshot.write(folder / f"snapshot-{number}")
            disk.append(max(1e-3, time.perf_counter() - began - streamed))
    return {
        "copy": size / statistics.median(copies), "save_core_s": statistics.median(cores),
        "write": size / statistics.median(disk),
    }  # fmt: skip


def _looking(folder: Path) -> dict[str, float]:
    """What it takes to look at a file, and to make one that is durable and give it its name."""
    path = folder / "looked-at"
    path.write_bytes(b"x")
    began = time.perf_counter()
    for _ in range(2000):
        path.stat()
    look = (time.perf_counter() - began) / 2000
    began = time.perf_counter()
    for number in range(20):
        with open(folder / f"made-{number}", "wb") as file:
            file.write(b"x")
            os.fsync(file.fileno())
    return {"look_s": look, "make_s": (time.perf_counter() - began) / 20}
