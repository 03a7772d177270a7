"""The supervisor of a run: start its ranks, watch over them, start them again when one dies, tell all that happens.

It imports no torch. Where the ranks are is their team's business (launcher/team.py). `python -m launcher.supervise
FOLDER` supervises a run on this machine that is ready to start, and dies with its parent.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from configs.errors import CANNOT_GO_ON, DONE, INTERRUPTED, PREEMPTED, CannotGoOnError, LeviathanError
from configs.load import load
from launcher.config import LaunchConfig
from launcher.on_local import LocalTeam
from launcher.restart import Attempt, decide
from launcher.runs import attempts_before, newest_row
from launcher.team import Team
from launcher.watch import describe, first_cause, hang, longest_silent
from pretrain.health import Beat
from pretrain.lease import Lease
from pretrain.run import die_with_parent
from pretrain.run_folder import RunFolder, counted

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that ask a run to save and leave."""

_POLL_S = 0.05
_SETTLE_S = 0.5
_REPEAT_S = 5.0
_ASSEMBLE_S = 1.0


@dataclass
class _End:
    """How an attempt ended: the code that decides, and one sentence."""

    code: int
    cause: str
    facts: dict[str, object] = field(default_factory=dict)


class Supervisor:
    """All attempts of one run."""

    def __init__(self, team: Team, poll_console: Callable[[], None] = lambda: None) -> None:
        self._team, self._folder, self._launch = team, team.folder, team.launch
        self._poll_console = poll_console
        self._asked_at = 0.0
        self._at_once = False
        self.asked: int | None = None
        """The signal that asked the run to leave, if one did."""

    def run(self) -> int:
        """Run to the end; return the exit code. Raises ConfigError while another process has the run folder."""
        lease = Lease(self._folder.path, self._team.start_of_job)
        fence = lease.take()
        self.listen()
        try:
            return self._attempts(fence, lease)
        finally:
            self._team.end()
            self._poll_console()
            self._team.close()
            lease.release()

    def _attempts(self, fence: int, lease: Lease) -> int:
        history: list[Attempt] = []
        number = attempts_before(self._folder)
        while True:
            began = self._newest_step()
            self._folder.attempt = number
            ranks = counted(self._team.world, "rank")
            self._folder.event("launch", f"attempt {number}: starting {ranks} on {self._team.place}")
            self._team.start(number, fence)
            end = self._watch()
            self._team.end()
            self._poll_console()
            if lease.lost():
                # what happens here from now on is no part of the run's history
                print(f"{self._folder.name} was taken over by a later start; this one ends", file=sys.stderr)
                return CANNOT_GO_ON
            if end.code == DONE:
                return DONE
            history.append(Attempt(began, self._newest_step(), end.code, end.cause))
            if end.code not in (PREEMPTED, INTERRUPTED):
                self._folder.event("fault", end.cause, **end.facts)
            decision = decide(history, self._launch.max_restarts)
            if self.asked is not None or decision.action == "give_up":
                code = self._asked_code() if self.asked is not None else decision.code
                self._folder.event("stop", f"stopped: {decision.reason}", code=code, step=self._newest_step())
                return code
            self._tell_restart(len(history), end)
            if not self._pause(decision.wait_s) or not self._assemble():
                return self._asked_code()
            number += 1

    def _watch(self) -> _End:
        """Until all ranks have ended, one has died, one hangs, or patience after a request to stop is over."""
        looked = told = asked = 0.0
        started = time.monotonic()
        while True:
            codes = self._team.ended()
            if any(code != DONE for code in codes.values()):
                return self._cause_of_death()
            if len(codes) == self._team.world:
                return _End(DONE, "done")
            now = time.monotonic()
            patience = self._team.patience(self.asked) if self.asked is not None else math.inf
            if self._at_once or now - self._asked_at > patience:
                waited = f"after {patience:.0f} s" if not self._at_once else "at once"
                return _End(self._asked_code(), f"stopped {waited} without saving; the last checkpoint is valid")
            if self.asked is not None and now - asked > _REPEAT_S:
                asked = now  # a rank that only just began may not have listened yet
                self._team.send(self.asked)
            if now - looked > 0.5:
                looked = now
                hung = self._find_hang(started)
                if hung is not None:
                    return hung
            if now - told > 0.25:
                told = now
                self._poll_console()
            time.sleep(_POLL_S)

    def _cause_of_death(self) -> _End:
        """Who died first of what: a killed rank makes its peers fail too, so deaths by signal go before exit codes."""
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline and len(self._team.ended()) < self._team.world:
            time.sleep(_POLL_S)
        dead = {number: code for number, code in sorted(self._team.ended().items()) if code != DONE}
        first = first_cause(dead)
        code = dead[first] if dead[first] > 0 else 128 - dead[first]
        # by a signal to this process, or by a request in the run folder that rank 0 saw
        if code in (PREEMPTED, INTERRUPTED):
            return _End(code, "stopped as asked")
        if self.asked is not None and code == 128 + self.asked:  # it had not yet begun to listen
            return _End(self._asked_code(), "stopped as asked, before it began")
        beat = self._team.beats().get(first)
        cause = describe(self._folder, first, self._team.who(first), dead[first], beat)
        return _End(code, cause, self._facts(first, beat))

    def _facts(self, number: int, beat: Beat | None) -> dict[str, object]:
        # a beacon's word is up to a second old, and steps may be shorter
        row = newest_row(self._folder)
        step = max(beat.step if beat else 0, row["step"] if row else 0)
        return {"rank": number, "host": self._team.host(number), "step": step}

    def _find_hang(self, started: float) -> _End | None:
        """The rank without a sign of life for longer than it may be; stacks of all are stored first."""
        over = self._team.ended()
        beats = {number: beat for number, beat in self._team.beats().items() if number not in over}
        frozen = self._team.frozen() & set(beats)
        oldest = longest_silent(beats, frozen, time.monotonic() - started, self._launch)
        if oldest is None:
            return None
        # a stopped process hangs by itself; the others only wait for it
        number = min(frozen, default=oldest.rank)
        beat = beats[number]
        self._team.send(signal.SIGUSR2)
        time.sleep(_SETTLE_S)
        cause = hang(self._team.who(number), oldest.age_s, beat, self._folder)
        return _End(128 + signal.SIGKILL, cause, self._facts(number, beat))

    def listen(self) -> None:
        """Take requests to stop from now on."""
        for number in REQUESTS:
            signal.signal(number, self._on_signal)
        # whoever started this process may have held them back until somebody listens
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass the request on; a second Ctrl-C ends everything at once."""
        if number == signal.SIGINT and self.asked == signal.SIGINT:
            self._at_once = True
        if self.asked is None:
            self.asked, self._asked_at = number, time.monotonic()
            most = self._team.patience(number)
            budget = f"{signal.Signals(number).name}: finishing the step and saving (at most {most:.0f} s)"
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            self._folder.event("signal", budget + again, signal=signal.Signals(number).name)
        self._team.send(number)

    def _asked_code(self) -> int:
        return INTERRUPTED if self.asked == signal.SIGINT else PREEMPTED

    def _pause(self, seconds: float) -> bool:
        """Wait before a restart; False when asked to stop meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.asked is None:
            self._poll_console()
            time.sleep(_POLL_S)
        return self.asked is None

    def _assemble(self) -> bool:
        """Wait until all that ranks need is there; False when asked to stop meanwhile. Raises CannotGoOnError."""
        end, told = time.monotonic() + self._launch.start_s, False
        while self.asked is None and (missing := self._team.missing()) is not None:
            if time.monotonic() > end:
                raise CannotGoOnError(
                    f"{missing}, and has not for {self._launch.start_s:.0f} s; mend it, or start the run elsewhere"
                )
            if not told:
                self._folder.event("warning", f"{missing}; the run waits until it does, or is started elsewhere")
                told = True
            self._poll_console()
            time.sleep(_ASSEMBLE_S)
        return self.asked is None

    def _tell_restart(self, number: int, end: _End) -> None:
        step, most = self._newest_step(), self._launch.max_restarts
        redo = max(0, int(str(end.facts.get("step", step))) - step)
        origin = f"from step {step}, {redo} steps to redo" if step else "from the beginning: nothing was saved yet"
        self._folder.event(
            "restart", f"restart {number}/{most if most is not None else '∞'} {origin}", step=step, redo=redo
        )

    def _newest_step(self) -> int:
        """The step of the newest committed checkpoint; 0 where there is none."""
        return max(self._folder.committed_steps(), default=0)


def main(arguments: list[str]) -> int:
    """Run to the end; return the exit code. What happens is told in the run folder."""
    die_with_parent()
    os.umask(0o077)  # a run is its owner's alone
    folder = RunFolder(Path(arguments[0]))
    try:
        return Supervisor(LocalTeam(folder, load(LaunchConfig, [folder.launch]))).run()
    except LeviathanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
