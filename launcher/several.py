"""Several runs on this machine, one after the other or side by side, each under a supervisor of its own.

A supervisor is a process: it adopts and ends whatever its ranks leave behind, and must not meet another run's. This one
starts them, shows what their run folders tell, and passes on who asks to stop. They die with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console as Terminal

from configs.errors import DONE, INTERRUPTED, PREEMPTED
from launcher.console import Console
from launcher.prepare import Prepared
from launcher.supervise import REQUESTS
from pretrain.config import total_steps

_POLL_S = 0.1


@dataclass(frozen=True)
class _Child:
    """A supervisor at work. place: which of the places side by side it has."""

    run: Prepared
    process: subprocess.Popen[bytes]
    console: Console
    place: int


class Supervisors:
    """Starts runs and waits for them; use it in `with`, so that requests to stop reach them."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._children: list[_Child] = []
        self._asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Supervisors:
        self._before = {number: signal.signal(number, self._on_signal) for number in REQUESTS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            child.process.kill()
            child.process.wait()
            child.console.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> int | None:
        """The exit code to leave with, where somebody asked to stop."""
        return None if self._asked is None else INTERRUPTED if self._asked == signal.SIGINT else PREEMPTED

    def train(
        self, runs: Sequence[Prepared], side_by_side: int = 1, begins: Callable[[Prepared], None] = lambda run: None
    ) -> dict[str, int]:
        """Train runs in their order, at most so many at once; return the exit codes of those that were started.

        After one that is not done, or a request to stop, no other is started. begins: told before each is started.
        """
        waiting, codes = list(runs), dict[str, int]()
        while True:
            if self._asked is not None or any(code != DONE for code in codes.values()):
                waiting.clear()
            while waiting and len(self._children) < side_by_side:
                begins(waiting[0])
                self._start(waiting.pop(0), side_by_side)
            if not self._children:
                return codes
            for child in [child for child in self._children if self._ended(child)]:
                self._children.remove(child)
                codes[child.run.folder.name] = self._code(child.process.returncode)
            time.sleep(_POLL_S)

    def _start(self, run: Prepared, side_by_side: int) -> None:
        place = next(n for n in range(side_by_side) if n not in [child.place for child in self._children])
        environment = os.environ | {"LEVIATHAN_PARENT": str(os.getpid())}
        if side_by_side > 1:
            environment |= _own_devices(place, run.launch.ranks)
        console = Console(run.folder, total_steps(run.config), terminal=self._terminal, beside_others=side_by_side > 1)
        words = [sys.executable, "-m", "launcher.supervise", str(run.folder.path)]
        # held back until the supervisor listens, or a request would kill it without a word
        signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
        try:
            # in a session of its own: what a terminal sends comes to it through this process, once
            process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
            self._children.append(_Child(run, process, console, place))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)

    def _ended(self, child: _Child) -> bool:
        ended = child.process.poll() is not None
        child.console.poll()
        if ended:
            child.console.close()
        return ended

    def _code(self, code: int) -> int:
        if code < 0 and self.asked is not None:
            return self.asked
        return code if code >= 0 else 128 - code

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass a request on; a second Ctrl-C makes supervisors end at once."""
        self._asked = self._asked or number
        for child in self._children:
            if child.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.process.pid, number)


def _own_devices(place: int, ranks: int) -> dict[str, str]:
    """The GPUs of one of several runs side by side, where there are any: `ranks` each, in order."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    span = slice(place * ranks, (place + 1) * ranks)
    names = visible.split(",")[span] if visible else list(map(str, range(span.start, span.stop)))
    return {"CUDA_VISIBLE_DEVICES": ",".join(names)}
