"""Before a job starts: every node measures itself and all together, and the odd one is named.

`python -m launcher.preflight FOLDER` is one process on each node, with a launcher's environment; it leaves what it
found in FOLDER/preflight. `judge` reads all of that, in whoever started them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from configs.errors import DONE, ConfigError
from data_pipeline.files import human_bytes, write_whole
from launcher.screen import cores
from launcher.snapshot import code_name
from pretrain.beacon import Beacon
from pretrain.run_folder import RunFolder

MUST_AGREE = {
    "code": "code", "config": "configuration", "python": "Python", "torch": "torch", "deepspeed": "deepspeed",
    "gpus": "GPUs",
}  # fmt: skip
"""What has to be the same on all nodes, by what people call it."""
SLOW, MEMORY_GIB, SHM_GIB, CLOCK_S = 0.6, 1.0, 1.0, 2.0
"""A node is slow below so much of the median's speed; memory that must be free, and shared memory that had better be;
how far clocks may be apart."""
TOGETHER_S, WAIT_S = 120.0, 60
"""How long a node waits for others; how long those that are left have once the first has ended."""
ENDED = "ended while nodes spoke with each other"
LEFT_ALONE = re.compile(
    r"connection (closed|reset) by peer|broken pipe|got 0 bytes|server has shut down", re.IGNORECASE
)
"""What a node says to which another did not speak any more: that one had a reason of its own."""
LOG = "preflight"
_LARGE = 4 << 20
_MEASURED = {"cores", "flops", "memory_free", "disk_free", "shm_free", "fsync_s"}

Report = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """Something about one node. stops: no run is to start there."""

    host: str
    message: str
    stops: bool


def folder_of(run: RunFolder) -> Path:
    """Where nodes leave what they found."""
    return run.path / "preflight"


def log_of(run: RunFolder, number: int) -> Path:
    """What a node printed meanwhile."""
    return run.logs / f"{LOG}_{number:05d}.log"


def collect(run: RunFolder, hosts: Sequence[str]) -> tuple[list[Report], list[Finding]]:
    """What all nodes found, and those that found nothing."""
    reports, silent = [], []
    for number, host in enumerate(hosts):
        try:
            report = json.loads((folder_of(run) / f"{number:05d}.json").read_bytes())
        except (OSError, ValueError):
            message = "did not report: it cannot start Python, see the run folder, or reach the other nodes"
            silent.append(Finding(host, f"{message}{_last_words(log_of(run, number))}", True))
            continue
        if set(report) >= set(MUST_AGREE) | _MEASURED:
            reports.append(report | {"node": host})
        else:
            silent.append(Finding(host, f"has other code ({report.get('code')}), which reports other things", True))
    return reports, silent


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        return ""
    said = [line.strip() for line in lines if line.strip()]
    return f"; it said: {said[-1][:200]}" if said else ""


def settle(run: RunFolder, reports: Sequence[Report], findings: Sequence[Finding], cure: str) -> None:
    """Tell what all nodes found. Raises ConfigError where one is not fit; cure: what to do about it then."""
    for finding in findings:
        run.event("warning", f"node {finding.host} {finding.message}", host=finding.host)
    stops = [f"node {finding.host} {finding.message}" for finding in findings if finding.stops]
    if stops:
        raise ConfigError(f"{'; '.join(stops)}; {cure}")
    run.event("preflight", summary(reports), nodes=reports)


def kept_waiting(run: RunFolder) -> bool:
    """Whether nodes were ended for having waited too long after another had left."""
    now = folder_of(run) / "end"
    now.touch()
    newest = max((path.stat().st_mtime for path in folder_of(run).glob("*.json")), default=0.0)
    return now.stat().st_mtime - newest > WAIT_S / 2


def judge(reports: Sequence[Report], silent: bool = False, waited: bool = False) -> list[Finding]:
    """What is wrong with which node. silent: some did not report. waited: some were ended while they waited."""
    findings = []
    for key, what in MUST_AGREE.items():
        values = Counter(str(report[key]) for report in reports)
        usual, count = values.most_common(1)[0] if values else ("", 0)
        for report in reports:
            if str(report[key]) != usual:
                others = f"the other {count}" if count > 1 else reports[0]["node"]
                findings.append(Finding(report["node"], f"has {what} {report[key]}, {others} {usual}", True))
    for report in reports:
        node, free = report["node"], report["memory_free"]
        if free < MEMORY_GIB * (1 << 30):
            findings.append(Finding(node, f"has only {human_bytes(free)} of memory free", True))
        if report["shm_free"] < SHM_GIB * (1 << 30):
            message = f"has only {human_bytes(report['shm_free'])} free in /dev/shm; NCCL and Ray want more"
            findings.append(Finding(node, message, False))
    findings += [] if silent else _lost(reports, waited)
    findings += _slower(reports, "flops", "matrix products", "FLOP/s", slow_is_less=True)
    findings += _slower(reports, "fsync_s", "a durable write", "s", slow_is_less=False)
    for report in reports:
        if abs(report.get("clock_s", 0.0)) > CLOCK_S:
            message = f"its clock is {report['clock_s']:+.1f} s off the others'; dates in logs will mislead"
            findings.append(Finding(report["node"], message, False))
    return findings


def _lost(reports: Sequence[Report], waited: bool) -> list[Finding]:
    """Nodes that are to blame for others having waited in vain, or having been left."""
    ended = [report for report in reports if report.get("error") == ENDED]
    failed = [report for report in reports if report.get("error") not in (None, ENDED)]
    began = [report for report in failed if not LEFT_ALONE.search(report["error"])] or failed
    lost = (began or ended) if waited else (ended or began)
    return [Finding(report["node"], report["error"], True) for report in lost]


def unheard(host: str, by: str) -> Finding:
    """A node whose signs of life do not arrive."""
    return Finding(host, f"cannot send datagrams (UDP) to {by}, which watches over the run; open the firewall", True)


def summary(reports: Sequence[Report]) -> str:
    """All nodes in a sentence."""
    rates = [report["flops"] / 1e9 for report in reports]
    network = speed_between(reports)
    return f"{len(reports)} nodes are fit: {min(rates):,.0f} to {max(rates):,.0f} GFLOP/s{network and ', '}{network}"


def speed_between(reports: Sequence[Report]) -> str:
    """How fast nodes sum tensors; empty where there is one, or they could not."""
    shared = next((report for report in reports if "all_reduce_bytes_per_s" in report), None)
    if shared is None:
        return ""
    rate, latency = human_bytes(shared["all_reduce_bytes_per_s"]), 1e6 * shared["all_reduce_latency_s"]
    return f"all-reduce {rate}/s, latency {latency:,.0f} µs"


def _slower(reports: Sequence[Report], key: str, what: str, unit: str, *, slow_is_less: bool) -> list[Finding]:
    if len(reports) < 3:  # of two, who is the odd one?
        return []
    usual = statistics.median(report[key] for report in reports)
    found = []
    for report in reports:
        share = report[key] / usual if slow_is_less else usual / report[key]
        if share < SLOW:
            message = f"is slow: {what} at {report[key]:.3g} {unit}, the others {usual:.3g}"
            found.append(Finding(report["node"], message, False))
    return found


# ---- on a node


def main(arguments: list[str]) -> int:
    """Measure this node, alone and with the others, and leave a report."""
    run, number = RunFolder(Path(arguments[0])), int(os.environ["RANK"])
    Beacon.from_environment(number, lambda: (time.monotonic(), 0, 0, 0))
    report = alone(run)
    folder_of(run).mkdir(mode=0o700, exist_ok=True)
    # at once, for whoever dies on the way
    _leave_report(run, number, report | {"error": ENDED})
    try:
        report |= together(int(os.environ["WORLD_SIZE"]), number)
    except Exception as error:  # whatever keeps nodes apart is this report's news
        said = (str(error).splitlines() or [type(error).__name__])[0]
        report["error"] = f"cannot speak with the other nodes: {said[:300]}"
    _leave_report(run, number, report)
    return DONE


def _leave_report(run: RunFolder, number: int, report: Report) -> None:
    write_whole(folder_of(run) / f"{number:05d}.json", json.dumps(report).encode())


def alone(run: RunFolder) -> Report:
    """What a node finds by itself. Rates in FLOP/s, sizes in bytes, times in seconds."""
    import torch

    from pretrain.cost import measured_flops

    cuda = torch.cuda.is_available()
    devices = [torch.device("cuda", n) for n in range(torch.cuda.device_count())] if cuda else [torch.device("cpu")]
    dtype = torch.bfloat16 if cuda else torch.float32
    config = hashlib.sha256(run.config.read_bytes() + run.launch.read_bytes()).hexdigest()
    return {
        "host": socket.gethostname(), "code": code_name(), "config": config[:12], "python": platform.python_version(),
        "torch": torch.__version__, "deepspeed": importlib.metadata.version("deepspeed"),
        "gpus": len(devices) if cuda else 0, "cores": cores(),
        # all ranks wait for the slowest
        "flops": min(measured_flops(device, dtype, seconds=0.5) for device in devices),
        "memory_free": psutil.virtual_memory().available, "disk_free": shutil.disk_usage(run.path).free,
        "shm_free": shutil.disk_usage("/dev/shm").free, "fsync_s": _fsync(run.path),
    }  # fmt: skip


def together(world: int, number: int) -> Report:
    """How fast nodes sum tensors, and how far this one's clock is off the others' median."""
    import torch

    from pretrain.engine_deepspeed import start_distributed
    from pretrain.parallel import barrier, finish, sum_over_ranks

    if world == 1:
        return {}
    start_distributed(torch.device("cpu"), TOGETHER_S)
    small, large = torch.ones(1), torch.ones(_LARGE)
    latency = statistics.median(_timed(lambda: sum_over_ranks(small)) for _ in range(50))
    bandwidth = 4 * large.numel() / min(_timed(lambda: sum_over_ranks(large)) for _ in range(5))
    clocks = torch.zeros(world, dtype=torch.float64)
    barrier()
    clocks[number] = time.time()
    sum_over_ranks(clocks)
    finish()
    return {"all_reduce_latency_s": latency, "all_reduce_bytes_per_s": bandwidth,
            "clock_s": float(clocks[number] - clocks.median())}  # fmt: skip


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _fsync(folder: Path) -> float:
    """Seconds until a small write is safe."""

    def write() -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(4096))
            file.flush()
            os.fsync(file.fileno())

    return statistics.median(_timed(write) for _ in range(10))


if __name__ == "__main__":
    from pretrain.run import leave

    leave(main(sys.argv[1:]))
