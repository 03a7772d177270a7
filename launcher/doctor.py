"""`leviathan doctor`: is this machine fit to train, and if not, what to do. Everything is measured, nothing changed.

As `python -m launcher.doctor`, with a launcher's environment, it is one rank of the all-reduce that is measured.
"""

from __future__ import annotations

import importlib.metadata
import json
import netrc
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from rich.text import Text

from configs.errors import DONE
from data_pipeline.files import human_bytes
from launcher.screen import cores, harmless, make_table, make_terminal, told
from pretrain.amounts import duration

PROJECT = "leviathan-pretrain"
PROBE_S = 60.0
STALE_LOCK_S = 3600.0
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
"""How findings look."""
_GIB = 1 << 30


@dataclass(frozen=True)
class Row:
    """One finding. advice: what to do, empty where all is well."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def examine(folder: Path) -> int:
    """Print how fit this machine is, with runs in `folder`; return the exit code: 0, or 1 where something fails."""
    terminal = make_terminal()
    terminal.print(f"{socket.gethostname()}, {platform.platform()}, in {folder}\n", soft_wrap=True)
    began, rows = time.monotonic(), list[Row]()
    with terminal.status("") as spinner:
        for name, test in tests(folder):
            spinner.update(told(f"testing {name}"))
            rows += test()
    table = make_table("", "what", "found")
    for row in rows:
        table.add_row(Text(row.state, style=STYLES[row.state]), row.name, harmless(row.found))
    terminal.print(table)
    advised = [row for row in rows if row.advice]
    if advised:
        terminal.print()
    for row in advised:
        line = Text(f"{row.state} ", style=STYLES[row.state])
        terminal.print(line.append(f"{row.name}: {harmless(row.advice)}", style="default"), soft_wrap=True)
    failed, took = sum(row.state == "fail" for row in rows), duration(time.monotonic() - began)
    warned = sum(row.state == "warn" for row in rows)
    verdict = f"\n{failed} failed, {warned} with a warning, {len(rows) - failed - warned} fine ({took})"
    terminal.print(told(verdict, STYLES["fail" if failed else "warn" if warned else "ok"]))
    return 1 if failed else DONE


def tests(folder: Path) -> list[tuple[str, Callable[[], list[Row]]]]:
    """All tests in order, by what they look at."""
    return [
        ("versions", versions), ("processors", processors), ("memory", memory), ("disk", lambda: disk(folder)),
        ("shared memory", shared_memory), ("clock", clock), ("GPUs", gpus), ("host name", host_name),
        ("all-reduce of 2 ranks", all_reduce), ("compilers", compilers), ("locks", locks), ("W&B", wandb_key),
    ]  # fmt: skip


# ---- software


def versions() -> list[Row]:
    """Python and every package that the project needs."""
    try:
        wanted = importlib.metadata.requires(PROJECT) or []
        python = importlib.metadata.metadata(PROJECT)["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        advice = "install it: pip install -e . in its folder"
        return [Row("packages", "fail", f"{PROJECT} is not installed", advice)]
    here = platform.python_version()
    fits = fits_version(here, python)
    rows = [Row("Python", "ok" if fits else "fail", here, "" if fits else f"it must be {python}; use another Python")]
    good = []
    for name, limits in _requirements(wanted):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            rows.append(Row(name, "fail", "not installed", f"pip install '{name}{limits}'"))
            continue
        if fits_version(found, limits):
            good.append(f"{name} {found}")
        else:
            rows.append(Row(name, "fail", f"{found}, not {limits}", f"pip install '{name}{limits}'"))
    return [*rows, Row("packages", "ok", ", ".join(good))]


def _requirements(lines: list[str]) -> Iterator[tuple[str, str]]:
    """(name, limits) of what is always needed; `extra` packages are left out."""
    for line in lines:
        requirement, _, marker = line.partition(";")
        found = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*(.*)", requirement.strip())
        if found is not None and "extra" not in marker:
            yield found[1], found[2].strip(" ()")


def fits_version(found: str, limits: str) -> bool:
    """Whether a version is within limits such as `>=0.19.8,<0.20`; pre-releases count as their release."""
    for limit in filter(None, limits.replace(" ", "").split(",")):
        sign, number = re.match(r"([<>=!~]+)(.*)", limit).groups()  # type: ignore[union-attr]
        here, there = _numbers(found), _numbers(number)
        if (sign == ">=" and here < there) or (sign == "<" and here >= there) or (sign == "==" and here != there):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as (2, 13), without zeros at the end, so that 2.13 equals 2.13.0."""
    numbers = [int(part) for part in re.findall(r"\d+", re.match(r"[0-9.]*", version)[0])]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


# ---- the machine


def processors() -> list[Row]:
    """How many cores this process may use, and what they reach."""
    import torch

    from pretrain.cost import measured_flops

    count, quota = cores(), _cgroup("cpu.max")
    rate = measured_flops(torch.device("cpu"), torch.float32, seconds=1.0)
    found = f"{count} cores, {rate / 1e9:,.0f} GFLOP/s in fp32 matrix products ({rate / count / 1e9:,.0f} a core)"
    share = quota.split() if quota else []
    if len(share) == 2 and share[0] != "max" and int(share[0]) / int(share[1]) < count:
        allowed = int(share[0]) / int(share[1])
        return [Row("processors", "warn", found, f"a quota allows {allowed:.1f} cores; set engine.threads to fit it")]
    if rate / count < 3e9:
        advice = "that is slow for a core of today: look for other work on this machine (`top`)"
        return [Row("processors", "warn", found, advice)]
    return [Row("processors", "ok", found)]


def memory() -> list[Row]:
    """Memory there is, memory that is free, and a limit on this process."""
    facts, limit = psutil.virtual_memory(), _cgroup("memory.max")
    total = min(facts.total, int(limit)) if limit and limit.isdigit() else facts.total
    found = f"{human_bytes(total)}, {human_bytes(min(facts.available, total))} available"
    if facts.available < 2 * _GIB:
        return [Row("memory", "warn", found, "a rank needs half a GB before it holds any model; end other processes")]
    return [Row("memory", "ok", found)]


def disk(folder: Path) -> list[Row]:
    """Room, the time until a write is safe, and the rate of a large one."""
    free = shutil.disk_usage(folder).free
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            small = statistics.median(_write(file.fileno(), 4096) for _ in range(20))
            large = _write(file.fileno(), 32 << 20)
    except OSError as error:
        advice = "runs and checkpoints are written here; go to another folder, or set run.dir"
        return [Row("disk", "fail", f"{folder} cannot be written ({error.strerror})", advice)]
    found = f"{human_bytes(free)} free, fsync {1000 * small:.1f} ms, {human_bytes((32 << 20) / large)}/s durably"
    if free < 5 * _GIB:
        return [Row("disk", "warn", found, "little room for checkpoints; `leviathan check` says what a run needs")]
    if small > 0.1:
        return [Row("disk", "warn", found, "saving waits for this disk; put run.dir on a faster one")]
    return [Row("disk", "ok", found)]


def _write(handle: int, size: int) -> float:
    """Seconds until `size` bytes are safe."""
    content = os.urandom(1 << 12) * (size >> 12)
    began = time.perf_counter()
    os.write(handle, content)
    os.fsync(handle)
    return time.perf_counter() - began


def shared_memory() -> list[Row]:
    """/dev/shm, through which ranks of one machine and Ray pass data."""
    place = Path("/dev/shm")
    if not place.is_dir() or not os.access(place, os.W_OK):
        return [Row("/dev/shm", "fail", "missing or not writable", "mount it: a tmpfs, in a container --shm-size=8g")]
    free = shutil.disk_usage(place).free
    if free < _GIB:
        return [Row("/dev/shm", "warn", f"{human_bytes(free)} free", "NCCL and Ray want more: --shm-size=8g")]
    return [Row("/dev/shm", "ok", f"{human_bytes(free)} free")]


def clock() -> list[Row]:
    """Whether time goes forward, and both clocks agree how fast."""
    wall, steady = time.time(), time.monotonic()
    last, backwards = steady, 0
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        now = time.monotonic()
        backwards += now < last
        last = now
    drift = abs((time.time() - wall) - (time.monotonic() - steady))
    found = f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, monotonic clock steady, {1000 * drift:.1f} ms apart after 0.3 s"
    if backwards:
        return [Row("clock", "fail", "the monotonic clock went backwards", "no timeout can be trusted; change machine")]
    if drift > 0.05:
        return [Row("clock", "warn", found, "the wall clock is being set; dates in events.jsonl will jump")]
    if wall < 1.7e9:
        return [Row("clock", "warn", found, "the date lies in the past; https and W&B will refuse it: set the clock")]
    return [Row("clock", "ok", found)]


def gpus() -> list[Row]:
    """What torch sees, and whether there is more than it sees."""
    import torch

    if torch.cuda.is_available():
        facts = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        names = ", ".join(f"{fact.name} ({human_bytes(fact.total_memory)})" for fact in facts)
        return [Row("GPUs", "ok", f"{len(facts)}: {names}; CUDA {torch.version.cuda}")]
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        advice = f"torch {torch.__version__} does not see it: install torch for CUDA, check the driver with nvidia-smi"
        return [Row("GPUs", "warn", "there is an NVIDIA driver, and torch sees no GPU", advice)]
    return [Row("GPUs", "ok", "none; runs use the CPU (engine.device auto)")]


def compilers() -> list[Row]:
    """For information: training needs none, torch.compile and DeepSpeed's own kernels do."""
    there = [name for name in ("gcc", "g++", "clang", "nvcc", "ninja") if shutil.which(name)]
    return [Row("compilers", "ok", f"{', '.join(there) or 'none'} (only engine.compile needs one)")]


def locks() -> list[Row]:
    """Locks of extension builds that were killed: whoever builds the same one waits for ever."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    stale = [path for path in folder.rglob("lock") if time.time() - path.stat().st_mtime > STALE_LOCK_S]
    if stale:
        advice = f"if no build is running, remove it: rm {stale[0]}"
        return [Row("torch_extensions", "warn", f"{len(stale)} locks older than an hour", advice)]
    return [Row("torch_extensions", "ok", "no stale locks")]


def wandb_key() -> list[Row]:
    """Whether there is a key for W&B; it is not shown and not used."""
    if os.environ.get("WANDB_API_KEY"):
        return [Row("W&B key", "ok", "in the environment")]
    try:
        known = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        known = {}
    if any("wandb" in host for host in known):
        return [Row("W&B key", "ok", "in ~/.netrc")]
    return [Row("W&B key", "ok", "none; log.wandb=offline works without, `wandb login` stores one")]


# ---- between processes


def host_name() -> list[Row]:
    """Whether this host finds itself by its name, and whether others could."""
    name = socket.gethostname()
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except OSError:
        advice = "ranks on several nodes and Ray need it: add a line for it to /etc/hosts"
        return [Row("host name", "warn", f"{name} does not resolve", advice)]
    if all(address.startswith("127.") or address == "::1" for address in found):
        advice = "one machine is fine; other nodes cannot reach it by this name: fix /etc/hosts before multi-node runs"
        return [Row("host name", "warn", f"{name} is {', '.join(found)}, the loop-back", advice)]
    return [Row("host name", "ok", f"{name} is {', '.join(found)}")]


def all_reduce(limit_s: float = PROBE_S) -> list[Row]:
    """Two real processes that form a gloo group and sum tensors, as the ranks of a run do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "launcher.doctor"]
    ranks = [
        subprocess.Popen(
            words, env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]  # fmt: skip
    end = time.monotonic() + limit_s
    try:
        outputs = [rank.communicate(timeout=max(0.1, end - time.monotonic())) for rank in ranks]
    except subprocess.TimeoutExpired:
        advice = "ranks cannot reach each other on this machine: check `lo` and the firewall"
        return [Row("2 ranks", "fail", f"no answer within {limit_s:.0f} s", advice)]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if any(rank.returncode for rank in ranks):
        said = next((err for (_, err), rank in zip(outputs, ranks) if rank.returncode), "").strip().splitlines()
        reason = said[-1] if said else f"exit codes {[rank.returncode for rank in ranks]}"
        return [Row("2 ranks", "fail", reason[:300], "see that line; deepspeed and torch must fit each other")]
    measured = json.loads(outputs[0][0].splitlines()[-1])
    found = f"gloo all-reduce {human_bytes(measured['bytes_per_s'])}/s, latency {1e6 * measured['latency_s']:,.0f} µs"
    return [Row("2 ranks", "ok", found)]


def _rank() -> None:
    """One of two ranks: join, sum small and large tensors, tell the best times."""
    import torch

    from pretrain.engine_deepspeed import start_distributed
    from pretrain.parallel import finish, sum_over_ranks
    from pretrain.run import leave

    start_distributed(torch.device("cpu"), PROBE_S)
    small, large = torch.ones(1), torch.ones(2 << 20)
    times: dict[int, list[float]] = {1: [], large.numel(): []}
    for tensor, count in ((small, 100), (large, 10)):
        for _ in range(count):
            began = time.perf_counter()
            sum_over_ranks(tensor)
            times[tensor.numel()].append(time.perf_counter() - began)
    best = {"latency_s": statistics.median(times[1]), "bytes_per_s": 4 * large.numel() / min(times[large.numel()])}
    finish()
    print(json.dumps(best), flush=True)
    leave(DONE)


def _cgroup(name: str) -> str | None:
    """A limit that a container puts on this process."""
    try:
        return Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None


if __name__ == "__main__":
    _rank()
