"""`leviathan train`: prepare a run folder, supervise the run, say how it ended and what comes next."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich.console import Console as Terminal

from configs.errors import CANNOT_GO_ON, DATA_INVALID, DONE, INTERRUPTED, PREEMPTED, USAGE, WRONG_CONFIG
from launcher.console import Console
from launcher.on_local import LocalTeam
from launcher.prepare import prepare
from launcher.supervise import Supervisor
from pretrain.config import total_steps
from pretrain.run_folder import RunFolder

FOR_GOOD = (USAGE, DATA_INVALID, CANNOT_GO_ON, WRONG_CONFIG)
"""Exit codes of a run that nobody should start again before something was changed."""


def train_here(
    files: Sequence[str], words: Sequence[str], *, ranks: int | None, branch: Sequence[str], allow: Sequence[str]
) -> int:
    """Train on this machine; return the exit code."""
    os.umask(0o077)  # a run is its owner's alone
    prepared = prepare(files, words, ranks=ranks, branch=branch, allow=allow)
    terminal = Terminal(highlight=False)
    terminal.print(f"run [bold]{prepared.folder.name}[/bold] in {prepared.folder.path}")
    console = Console(prepared.folder, total_steps(prepared.config))
    try:
        code = Supervisor(LocalTeam(prepared.folder, prepared.launch), console.poll).run()
    finally:
        console.close()
    tell_end(terminal, prepared.folder, code)
    return code


def tell_end(terminal: Terminal, folder: RunFolder, code: int) -> None:
    """Say how a run has ended, and what comes next."""
    if code in FOR_GOOD:
        # what a rank found is told where mistakes of the command line are told
        print(f"error: {cause_of_end(folder)}", file=sys.stderr)
    terminal.print(_ending(folder, code), soft_wrap=True)


def cause_of_end(folder: RunFolder) -> str:
    """Why a run ended that cannot go on."""
    stops = [event["message"] for event in folder.history() if event["event"] == "stop"]
    return stops[-1].removeprefix("stopped: ") if stops else "it never began"


def _ending(folder: RunFolder, code: int) -> str:
    name = folder.name
    if code == DONE:
        return f"done. Next: leviathan eval {name} | leviathan generate {name} --prompt … | leviathan report {name}"
    if code in (PREEMPTED, INTERRUPTED):
        return f"stopped (exit {code}); the same command goes on from the last checkpoint"
    return f"ended with exit code {code}; `leviathan why {name}` says why and what to do"
