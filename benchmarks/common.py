"""What every benchmark shares: goals, tables, statistics of paired blocks."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

RESULTS = Path("results.jsonl")


@dataclass(frozen=True)
class Interval:
    """A median and its 95 % interval (order statistics: no assumption about the distribution)."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}] n={self.count}"


FEWEST = 6
"""Of fewer values not even the least and the greatest enclose the median in 95 of 100 samples."""


def interval(values: Sequence[float]) -> Interval:
    """The median of `values`, and those of them between which it lies in 95 of 100 samples of this size, or more."""
    ordered, n = sorted(values), len(values)
    out = left_out(n)
    return Interval(statistics.median(ordered), ordered[out], ordered[n - 1 - out], n)


def left_out(n: int) -> int:
    """How many of n sorted values may be left out at either end: the median lies beyond the others 1 time in 40."""
    if n >= 1000:
        return int(n / 2 - 0.98 * n**0.5) - 1
    # how many values lie below the median is binomial
    out, beyond = 0, 2.0**-n
    while beyond + math.comb(n, out + 1) * 2.0**-n <= 0.025:
        out += 1
        beyond += math.comb(n, out) * 2.0**-n
    return out


@dataclass
class Table:
    """Rows of figures, some with a goal."""

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, name: str, value: float, unit: str, *, goal: float | None = None, sense: Literal["<=", ">="] = "<=",
        spread: Interval | None = None, note: str = "",
    ) -> None:  # fmt: skip
        """A figure; with a goal it is met or missed."""
        met = None if goal is None else (value <= goal if sense == "<=" else value >= goal)
        row = {"name": name, "value": value, "unit": unit, "goal": goal, "sense": sense, "met": met, "note": note}
        if spread is not None:
            row |= {"low": spread.low, "high": spread.high, "n": spread.count}
        self.rows.append(row)

    def finish(self, key: str, command: str) -> int:
        """Print the table, keep it under `key`, and return 1 when a goal was missed. command: what was typed."""
        print(f"\n{self.title}")
        print(f"{machine()}\n")
        width = max(len(row["name"]) for row in self.rows)
        for row in self.rows:
            spread = f" [{row['low']:.4g}, {row['high']:.4g}]" if row.get("n", 0) >= FEWEST else ""
            goal = (
                ""
                if row["goal"] is None
                else f"   goal {row['sense']} {row['goal']:g}: {'met' if row['met'] else 'MISSED'}"
            )
            note = f"   {row['note']}" if row["note"] else ""
            print(f"  {row['name']:{width}}  {row['value']:.4g}{spread} {row['unit']}{goal}{note}")
        record = {
            "key": key, "command": command, "title": self.title, "time": time.time(), "machine": machine(),
            "rows": self.rows,
        }  # fmt: skip
        with open(RESULTS, "a") as file:
            file.write(json.dumps(record) + "\n")
        return int(any(row["met"] is False for row in self.rows))


def machine() -> str:
    """One line about where the figures are from."""
    import torch

    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    load = os.getloadavg()[0]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{model}{gpu}, {os.cpu_count()} cores, load {load:.1f}, Python {platform.python_version()},"
        f" torch {torch.__version__}, {torch.get_num_threads()} thread"
    )


def cpu_seconds(action: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """CPU seconds of this process, all threads, that `action` takes."""
    began = clock()
    action()
    return clock() - began


def alternate(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each arm, `rounds` times, the order turned round each time."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        names = list(arms) if number % 2 == 0 else list(reversed(arms))
        for name in names:
            seconds[name].append(cpu_seconds(arms[name]))
    return seconds
