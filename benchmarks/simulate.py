"""A discrete-event simulation: processes in virtual time that share cores, disks, networks and one another's company.

A process is a generator. It yields what it waits for: seconds, a share of something, or others; it goes on when it
has that.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

Process = Generator["float | Use | Gate | Door", None, None]


class Clock:
    """Virtual time, and what is to happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        """Do something so many seconds later; what is due at one time happens in the order it was asked for."""
        heapq.heappush(self._queue, (self.now + seconds, next(self._number), do))

    def start(self, process: Process) -> None:
        """Begin a process now."""
        self.after(0.0, lambda: self._go_on(process))

    def run(self) -> float:
        """Until nothing is left to happen; return the time."""
        while self._queue:
            self.now, _, do = heapq.heappop(self._queue)
            do()
        return self.now

    def _go_on(self, process: Process) -> None:
        for wanted in process:
            if isinstance(wanted, float):
                self.after(wanted, lambda: self._go_on(process))
                return
            if isinstance(wanted, Use):
                if wanted.work > 0.0:
                    wanted.of.serve(wanted.work, lambda: self._go_on(process))
                    return
            elif not wanted.enter(lambda: self._go_on(process)):
                return


class Shared:
    """Something that all who use it share equally: cores, a disk, a network, a server.

    capacity: work a second, in all. each: work a second that one user gets at most.
    """

    def __init__(self, clock: Clock, capacity: float, each: float = math.inf) -> None:
        self._clock, self._capacity, self._each = clock, capacity, each
        # all users gain equally, so who came when and ends when is told by one number that only grows
        self._gained, self._since = 0.0, 0.0
        self._users: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._planned = 0
        self.served = 0.0
        """Work done so far."""

    def serve(self, work: float, then: Callable[[], None]) -> None:
        """Do something once `work` is done."""
        self._catch_up()
        heapq.heappush(self._users, (self._gained + work, next(self._number), then))
        self.served += work
        self._plan()

    def _rate(self) -> float:
        return min(self._each, self._capacity / len(self._users)) if self._users else 0.0

    def _catch_up(self) -> None:
        self._gained += self._rate() * (self._clock.now - self._since)
        self._since = self._clock.now

    def _plan(self) -> None:
        """Whoever ends next ends then, unless somebody comes before."""
        self._planned += 1
        number = self._planned
        if self._users:
            left = max(0.0, self._users[0][0] - self._gained)
            self._clock.after(left / self._rate(), lambda: self._end(number))

    def _end(self, number: int) -> None:
        if number != self._planned:
            return
        self._catch_up()
        first = self._users[0][0]
        self._gained = max(self._gained, first)
        over = []
        # who began together ends together, however the sums were rounded
        while self._users and self._users[0][0] <= first * (1 + 1e-12):
            over.append(heapq.heappop(self._users)[2])
        self._plan()
        for then in over:
            then()


@dataclass(frozen=True)
class Use:
    """So much work of something."""

    of: Shared
    work: float


class Gate:
    """Opens when so many have come, and lets all of them go on."""

    def __init__(self, clock: Clock, count: int) -> None:
        self._clock, self._missing = clock, count
        self._waiting: list[Callable[[], None]] = []

    def enter(self, then: Callable[[], None]) -> bool:
        """Come; True for the last one, who need not wait."""
        self._missing -= 1
        if self._missing > 0:
            self._waiting.append(then)
            return False
        for waiting in self._waiting:
            self._clock.after(0.0, waiting)
        return True


class Door:
    """Closed until somebody opens it, for good."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._open = clock, False
        self._waiting: list[Callable[[], None]] = []

    def open(self) -> None:
        """Let all go on who wait here, and whoever comes later."""
        self._open = True
        for waiting in self._waiting:
            self._clock.after(0.0, waiting)

    def enter(self, then: Callable[[], None]) -> bool:
        """Come; True where the door is open."""
        if not self._open:
            self._waiting.append(then)
        return self._open


class Rounds:
    """A gate for the same company, round after round."""

    def __init__(self, clock: Clock, count: int) -> None:
        self._clock, self._count = clock, count
        self._gates: dict[int, tuple[Gate, int]] = {}

    def gate(self, number: int) -> Gate:
        """The gate of a round; it is forgotten once all have asked for it."""
        gate, asked = self._gates.setdefault(number, (Gate(self._clock, self._count), 0))
        self._gates[number] = (gate, asked + 1)
        if asked + 1 == self._count:
            del self._gates[number]
        return gate
