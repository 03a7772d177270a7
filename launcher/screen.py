"""What all verbs share on the screen: tables, progress with rate and time left, and text that cannot steer a terminal.

On a terminal progress is a bar that moves; elsewhere (a log, a pipe) it is a plain line now and then.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from data_pipeline.files import human_bytes
from pretrain.amounts import duration

PLAIN_EVERY_S = 5.0
PLAIN_WIDTH = 120

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def make_terminal() -> Terminal:
    """Where a verb writes: as wide as the terminal, or wide enough for its tables where there is none."""
    # no markup: names and messages of others are shown as they are, brackets and all
    terminal = Terminal(highlight=False, markup=False, emoji=False)
    if not terminal.is_terminal and "COLUMNS" not in os.environ:
        terminal = Terminal(highlight=False, markup=False, emoji=False, width=PLAIN_WIDTH)
    return terminal


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def harmless(text: str) -> str:
    """Text from a file or a model, with what could steer a terminal or turn its direction shown as an escape."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str, width: int) -> str:
    """The first `width` characters of a text, line ends and tabs shown as spaces."""
    flat = harmless(" ".join(text.split()))
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def make_table(*columns: str, title: str | None = None) -> Table:
    """An empty table. A column whose name begins with `>` holds numbers and stands to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return table


def make_facts(title: str | None = None) -> Table:
    """An empty two-column list of names and what they are."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def told(message: str, style: str = "") -> Text:
    """Text for the terminal, in which brackets mean nothing."""
    return Text(harmless(message), style=style)


class Bar:
    """The progress of one piece of work, in bytes or in what `show` tells; use it in `with`."""

    def __init__(
        self, terminal: Terminal, what: str, *, show: Callable[[float], str] = human_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """what: a word or two. show: a quantity as text; a rate is that a second."""
        self._terminal, self._what, self._show, self._clock = terminal, what, show, clock
        self._began = self._told_at = clock()
        self._last: tuple[float, float, float] | None = None
        self._live: Progress | None = None
        if terminal.is_terminal:
            parts = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[at]}"),
            )
            self._live = Progress(*parts, console=terminal, transient=True)
            self._task = self._live.add_task(what, total=None, at="")
            self._live.start()

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(finished=kind is None)

    def update(self, done: float, total: float, kept: float = 0.0) -> None:
        """Tell how far it is; `kept` of `done` was there before, which says nothing of the speed."""
        self._last = (done, total, kept)
        if self._live is not None:
            self._live.update(self._task, completed=done, total=total, at=self._figures())
        elif self._clock() - self._told_at >= PLAIN_EVERY_S:
            self._told_at = self._clock()
            self._terminal.print(f"{self._what}  {done / max(total, 1e-9):.0%}  {self._figures()}", soft_wrap=True)

    def close(self, finished: bool = True) -> None:
        """Leave one line that says what was done, how fast."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if not finished or self._last is None:
            return
        done, _, kept = self._last
        took = self._clock() - self._began
        rate = f", {self._show((done - kept) / took)}/s" if took > 0 and done > kept else ""
        before = f", {self._show(kept)} of it done before" if kept else ""
        self._terminal.print(f"{self._what}: {self._show(done)} in {duration(took)}{rate}{before}", soft_wrap=True)

    def _figures(self) -> str:
        """`31.4 MB of 74.9 MB  12.3 MB/s  left 5.2 s`."""
        assert self._last is not None
        done, total, kept = self._last
        text = f"{self._show(done)} of {self._show(total)}"
        took = self._clock() - self._began
        if done <= kept or took <= 0:
            return text
        rate = (done - kept) / took
        return f"{text}  {self._show(rate)}/s  left {duration((total - done) / rate)}"
