"""One `srun` within a job's allocation: started, listened to, ended."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from configs.errors import LeviathanError
from launcher import slurm

BUSY_S = 30.0
"""Steps overlap: of its own job's nodes Slurm has no reason to call one busy for so long."""

_TOLD = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+)")
_EXITED = re.compile(r"Exited with exit code (\d+)")
_WAITS = re.compile(r"srun: Job \d+ step creation (?:temporarily|still) disabled, retrying \((.+)\)")
_BEGINS = "srun: Step created for "
_BUSY = "Requested nodes are busy"
_SIGNALS = {signal.strsignal(number): int(number) for number in signal.Signals}
# what is over its limit of memory the kernel kills, and Slurm has a word of its own for that
_SIGNALS["Out Of Memory"] = int(signal.SIGKILL)
_END_S, _LAST_WORDS_S, _POLL_S, _LINES = 20.0, 5.0, 0.2, 50


class NodesTakenError(slurm.AllocationLostError):
    """Slurm lets a job start nothing on its own nodes. Only another allocation mends that.

    It happens where a node died, came back, and told only when the job ran there again that its earlier start is over:
    Slurm takes that for the end of the new one.
    """


class Step:
    """`srun` with words of its own, of which whatever goes wrong is told.

    tell: called with each line of an error that says nothing of a task.
    """

    def __init__(
        self, job: str, words: Sequence[str], environment: Mapping[str, str], tell: Callable[[str], None] | None = None
    ) -> None:
        self._job, self._tell = job, tell
        self.codes: dict[int, int] = {}
        """Exit codes of the tasks that ended badly, as far as it has told."""
        self.said: deque[str] = deque(maxlen=_LINES)
        """The last lines that it printed."""
        self._waits_since: float | None = None
        # one task that ends must not take the others with it: they may be saving. The supervisor judges.
        # Slurm may never learn that a step ended on a node that died and came back: it must not keep out the next one
        self._process = subprocess.Popen(
            ["srun", "--kill-on-bad-exit=0", "--overlap", "--open-mode=append", *words], env=dict(environment),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._listener = threading.Thread(target=self._listen, daemon=True, name="srun")
        self._listener.start()

    def poll(self) -> int | None:
        """Its exit code; None while it runs. Raises NodesTakenError where it waits in vain."""
        code = self._process.poll()
        if code is not None:
            self._listener.join(_LAST_WORDS_S)
        elif (since := self._waits_since) is not None and time.monotonic() - since > BUSY_S:
            raise NodesTakenError(
                f"Slurm lets job {self._job} start nothing on its own nodes, and has not for {BUSY_S:.0f} s ({_BUSY});"
                " give the nodes back and ask for others"
            )
        return code

    def wait(self, seconds: float) -> int | None:
        """Its exit code; None where it has not ended by then. Raises NodesTakenError."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < end:
            time.sleep(_POLL_S)
        return code

    def send(self, number: int) -> None:
        """Send it a signal."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def end(self) -> None:
        """Kill it and whatever it started, unless it has ended."""
        if self._process.poll() is not None:
            return
        with contextlib.suppress(LeviathanError):
            slurm.kill_steps(self._job)
        try:
            # one that waits for nodes has started nothing
            self._process.wait(_END_S if self._waits_since is None else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _listen(self) -> None:
        """Take note of what it tells: of tasks that end badly, and of what keeps it from its work."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            self.said.append(line.strip())
            codes = codes_told(line)
            self.codes |= codes
            if self._tell is not None and line.startswith("srun: error:") and not codes:
                self._tell(line.strip())
            waits = waits_for_its_own(line)
            if waits is False:
                self._waits_since = None
            elif waits and self._waits_since is None:
                self._waits_since = time.monotonic()


def waits_for_its_own(line: str) -> bool | None:
    """Whether srun waits for nodes that are its job's already; None where a line says nothing of it."""
    found = _WAITS.match(line.strip())
    if found is None:
        return False if line.startswith(_BEGINS) else None
    return found.group(1) == _BUSY


def codes_told(line: str) -> dict[int, int]:
    """Exit codes of tasks in a line of srun's, such as `srun: error: n2: tasks 1-2: Killed`."""
    found = _TOLD.match(line.strip())
    if found is None:
        return {}
    _, tasks, how = found.groups()
    exited = _EXITED.match(how)
    if exited is not None:
        code = int(exited.group(1))
    else:
        name = how.removesuffix(" (core dumped)")
        if name not in _SIGNALS:
            return {}
        code = -_SIGNALS[name]
    return dict.fromkeys(_numbers(tasks.split(",")), code)


def _numbers(spans: Sequence[str]) -> Iterable[int]:
    for span in spans:
        first, _, last = span.partition("-")
        yield from range(int(first), int(last or first) + 1)
