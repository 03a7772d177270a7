"""A live view of a run for people: what it does now, and everything that happens to it.

It reads the run folder only, so it can stand in the supervisor, on another machine that sees the folder, or be missing.
On a terminal the newest figures stay at the bottom and events scroll above; elsewhere there is a line now and then.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console as Terminal
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pretrain.amounts import duration, short_number
from pretrain.run_folder import Record, RunFolder

PLAIN_EVERY_S = 10.0
REDRAW_EVERY_S = 1.0
RATE_WINDOW_S = 120.0
STYLES = {
    "fault": "bold red", "save_failed": "bold red", "invalid_checkpoint": "bold red", "fallback": "yellow",
    "skip": "yellow", "warning": "yellow", "signal": "yellow", "stop": "yellow", "change": "yellow",
    "restart": "bold green", "resume": "bold green", "join": "bold green", "done": "bold green", "checkpoint": "dim",
    "held-out": "cyan",
}  # fmt: skip
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]+")


class Tail:
    """What is new in a file of JSON lines since the last look; a line that is still being written waits."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def new(self) -> list[Record]:
        """The lines that came, oldest first; one that is no JSON is passed over."""
        return [record for line in self._lines() if (record := _parsed(line)) is not None]

    def newest(self) -> Record | None:
        """The last of the lines that came, at the cost of one, or None."""
        return next((record for line in reversed(self._lines()) if (record := _parsed(line)) is not None), None)

    def _lines(self) -> list[bytes]:
        try:
            size = os.stat(self._path).st_size
            if size == self._offset:
                return []
            with open(self._path, "rb", buffering=0) as file:
                # a file that has shrunk is another one
                self._offset = min(self._offset, size) if size >= self._offset else 0
                file.seek(self._offset)
                text = file.read(size - self._offset)
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.splitlines()


class Console:
    """Shows one run while it goes on. Call `poll` a few times a second and `close` at the end, or use it in `with`."""

    def __init__(
        self, folder: RunFolder, total_steps: int, *, terminal: Terminal | None = None,
        clock: Callable[[], float] = time.time, beside_others: bool = False,
    ) -> None:  # fmt: skip
        """Begins with what comes after now. terminal: where to write, stdout by default. clock: seconds of now.
        beside_others: whether other runs are shown there too, so that every line must say whose it is."""
        self._label = f"{folder.name}  " if beside_others else ""
        self._name, self._total, self._clock = folder.name, total_steps, clock
        self._terminal = terminal or Terminal(highlight=False)
        self._metrics, self._events, self._evals = map(Tail, (folder.metrics, folder.events, folder.evals))
        self._row: Record | None = None
        self._heldout: Record | None = None
        self._pace: deque[tuple[float, int]] = deque()
        self._began = self._drawn = clock()
        self._live: Live | None = None
        if self._terminal.is_terminal and not beside_others:
            self._live = Live(console=self._terminal, auto_refresh=False, transient=True)
            self._live.start()

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def poll(self) -> None:
        """Show what is new. Costs a few milliseconds when something is, and microseconds when nothing is."""
        now = self._clock()
        for record in self._evals.new():
            self._heldout = record
            self._tell(record["time"], "held-out", _evaluation(record))
        for event in self._events.new():
            self._tell(event["time"], event["event"], _message(event))
        row = self._metrics.newest()
        if row is not None:
            self._take(row)
        due = REDRAW_EVERY_S if self._live else PLAIN_EVERY_S
        if now - self._drawn >= due or (self._live and row is not None):
            self._draw(now)

    def close(self) -> None:
        """Show what came last, as a plain line that stays."""
        self.poll()
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._row is not None:
            self._terminal.print(self._status(), soft_wrap=True)

    def _take(self, row: Record) -> None:
        """Remember the newest row and how fast steps came lately."""
        if self._row is None or row["attempt"] != self._row["attempt"] or row["step"] < self._row["step"]:
            self._pace.clear()
        self._row = row
        self._pace.append((row["time"], row["step"]))
        while row["time"] - self._pace[0][0] > RATE_WINDOW_S and len(self._pace) > 2:
            self._pace.popleft()

    def _tell(self, at: float, kind: str, message: str) -> None:
        line = Text().append(time.strftime("%H:%M:%S ", time.localtime(at)), style="dim")
        style = STYLES.get(kind, "")
        line.append(self._label, style="bold")
        line.append(f"{_clean(kind):<10} ", style=style or "bold")
        line.append(message, style=style)
        self._terminal.print(line, soft_wrap=True)

    def _draw(self, now: float) -> None:
        self._drawn = now
        if self._live is not None:
            self._live.update(self._panel(now), refresh=True)
        elif self._row is not None:
            self._terminal.print(self._status(), soft_wrap=True)

    def _panel(self, now: float) -> Panel:
        row = self._row
        if row is None:
            return Panel(Text(f"starting, {duration(now - self._began)}", style="dim"), title=Text(self._name))
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        place = f"{row['step']:,}/{self._total:,}  {self._share():.0%}  {self._left()}"
        bar.add_row(ProgressBar(total=self._total, completed=row["step"]), place)
        figures = Text()
        for name, value, style in self._figures():
            figures.append(f"{name} ", style="dim")
            figures.append(f"{value}   ", style=style)
        title = self._name if not row["attempt"] else f"{self._name}, attempt {row['attempt'] + 1}"
        return Panel(Group(bar, figures), title=Text(title), border_style="dim")

    def _status(self) -> str:
        """All figures in one plain line."""
        assert self._row is not None
        figures = "  ".join(f"{name} {value}" for name, value, _ in self._figures())
        return (
            f"{self._label}step {self._row['step']:,}/{self._total:,} ({self._share():.0%})  {figures}  {self._left()}"
        )

    def _figures(self) -> list[tuple[str, str, str]]:
        """Name, value and style of what the newest row and evaluation tell."""
        row = self._row
        assert row is not None
        loss = "skipped" if row["skipped"] else f"{row['loss']:.4f}"
        sound = not row["skipped"] and math.isfinite(row["loss"])
        told = [("loss", loss, "bold" if sound else "bold red")]
        if self._heldout is not None:
            told.append(("held-out", f"{self._heldout['loss']:.4f}", ""))
        if row["grad_norm"] is not None:
            told.append(("grad", f"{row['grad_norm']:.3g}", ""))
        told += [("lr", f"{row['lr']:.2e}", ""), ("tokens/s", short_number(row["tokens_per_s"]), "")]
        if row["mfu"] is not None:
            told.append(("MFU", f"{row['mfu']:.1%}", ""))
        # waiting for data is worth a word only when it costs something
        if row["data_s"] > 0.05 * row["step_s"]:
            told.append(("waits for data", f"{row['data_s'] / row['step_s']:.0%}", "yellow"))
        mib = row["memory_mib"]
        told.append(("memory", f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB", ""))
        return told

    def _share(self) -> float:
        return self._row["step"] / self._total if self._row else 0.0

    def _left(self) -> str:
        """Time to the last step at the pace of late, checkpoints and evaluations included."""
        (first_time, first_step), (last_time, last_step) = self._pace[0], self._pace[-1]
        if last_step >= self._total:
            return "done"
        if last_step == first_step:
            return "left ?"
        return "left " + duration((self._total - last_step) * (last_time - first_time) / (last_step - first_step))


def _parsed(line: bytes) -> Record | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _clean(text: str) -> str:
    """Text of a run without anything that could steer the terminal."""
    return CONTROL.sub(" ", text)


def _message(event: Record) -> str:
    if event["event"] == "sample":
        return _clean(f"{event.get('prompt', '')} → {event.get('text', '')}")[:500]
    return _clean(str(event.get("message", "")))


def _evaluation(record: Record) -> str:
    bits = "" if record.get("bits_per_byte") is None else f", {record['bits_per_byte']:.4f} bits per byte"
    sources = ", ".join(f"{_clean(name)} {figures['loss']:.4f}" for name, figures in record["sources"].items())
    of_each = f" ({sources})" if len(record["sources"]) > 1 else ""
    return f"step {record['step']:,}: loss {record['loss']:.4f}{bits}{of_each}"
