"""An ensemble as one Ray job: the seed, if there is one, then all modules side by side, then all joined.

Every run has a driver of its own (launcher/on_ray.py) and through it placement groups of its own, so each is mended
alone, and those that the cluster has no room for wait. This job's process, `python -m launcher.ensemble_on_ray FOLDER`,
starts the drivers in their order and starts again one that dies. What each run begins from is known when it is
submitted: the last step of those before it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console as Terminal

from configs.errors import DONE, INTERRUPTED
from data_pipeline.files import write_whole
from launcher.branch import Origin
from launcher.ensemble import Plan, folder_of, from_modules, from_seed, is_done, plan_ensemble
from launcher.jobs import queued
from launcher.prepare import has_begun, make_ready
from launcher.ray_jobs import SCRIPT, RayJob, RayJobs
from launcher.restart import Attempt, decide
from launcher.submit_ray import queue, write_script
from pretrain.config import RunConfig
from pretrain.run_folder import RunFolder

GRAPH = "graph.json"
_POLL_S = 0.5
REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def submit_ensemble(files: Sequence[str], words: Sequence[str], without: Sequence[str], jobs: RayJobs) -> int:
    """Submit every run that is not done as one job; return the exit code. without: modules to leave out."""
    plan, terminal = plan_ensemble(files, words, None, without), Terminal(highlight=False)
    job = queued(plan.folder)
    if isinstance(job, RayJob):
        terminal.print(f"ensemble {plan.folder.name} is {job} already; see leviathan status", soft_wrap=True)
        return DONE
    phases = _phases(plan, terminal)
    runs = [run for phase in phases for run in phase]
    if not runs:
        return DONE
    write_whole(plan.folder.path / GRAPH, json.dumps([[str(r.path.resolve()) for r in p] for p in phases]).encode())
    number, _ = queue(plan.folder, jobs, "launcher.ensemble_on_ray", runs)
    terminal.print(f"ensemble [bold]{plan.folder.name}[/bold]: {len(runs)} runs, Ray job [bold]{number}[/bold]")
    terminal.print("follow them with leviathan status", soft_wrap=True)
    return DONE


def _phases(plan: Plan, terminal: Terminal) -> list[list[RunFolder]]:
    """The runs that are left, made ready: those of a phase begin when all of the phase before are done."""
    seed: list[RunFolder] = []
    alone: list[RunFolder] = []
    if not has_begun(plan.folder):
        if plan.seed is not None and not all(has_begun(folder_of(run)) for run in plan.alone.values()):
            seed = _part("the seed of all modules", plan.seed, plan, None, terminal)
        for name, config in plan.alone.items():
            alone += _part(f"the module {name}", config, plan, from_seed(plan, name), terminal)
    joined = _part("all joined", plan.config, plan, from_modules(plan), terminal)
    return [phase for phase in (seed, alone, joined) if phase]


def _part(what: str, config: RunConfig, plan: Plan, origin: Origin | None, terminal: Terminal) -> list[RunFolder]:
    folder = folder_of(config)
    if is_done(folder, config):
        terminal.print(f"{what}: done before, run {folder.name}", soft_wrap=True)
        return []
    run = make_ready(config, plan.launch, folder, origin=origin)
    write_script(run)
    terminal.print(f"{what}: run {folder.name}", soft_wrap=True)
    return [folder]


# ---- in the job


class _Drivers:
    """The drivers of runs, side by side."""

    def __init__(self) -> None:
        self._asked = False
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        for number in REQUESTS:
            signal.signal(number, self._on_signal)

    def drive(self, runs: Sequence[RunFolder]) -> int:
        """Drive all of them to their end; return the first exit code that is not 0."""
        history: dict[str, list[Attempt]] = {run.name: [] for run in runs}
        began: dict[str, int] = {}
        codes: dict[str, int] = {}
        by_name = {run.name: run for run in runs}
        for run in runs:
            codes |= self._start(run, began)
        while self._running:
            for name, process in list(self._running.items()):
                code = process.poll()
                if code is None:
                    continue
                del self._running[name]
                run = by_name[name]
                shown = 128 - code if code < 0 else code
                if code >= 0 or self._asked:  # a driver that ends by itself has tried all there is
                    codes[name] = shown
                    continue
                cause = f"the driver of {name} died: {signal.Signals(-code).name}"
                run.event("fault", cause)
                history[name].append(Attempt(began[name], _saved(run), shown, cause))
                decision = decide(history[name])
                if decision.action == "give_up":
                    run.event("stop", f"stopped: {decision.reason}", code=decision.code, step=_saved(run))
                    codes[name] = decision.code
                else:
                    time.sleep(decision.wait_s)
                    codes |= self._start(run, began)
            time.sleep(_POLL_S)
        return next((code for code in codes.values() if code != DONE), DONE)

    def _start(self, run: RunFolder, began: dict[str, int]) -> dict[str, int]:
        """Start a run's driver, unless somebody has asked for the run's end before; the code of that."""
        if run.stop_request.exists():
            return {run.name: INTERRUPTED}
        began[run.name] = _saved(run)
        words = ["bash", str(run.path / SCRIPT), "launcher.on_ray", str(run.path)]
        print(f"driving {run.name}", flush=True)
        self._running[run.name] = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True,
                                                   env=os.environ | {"LEVIATHAN_PARENT": str(os.getpid())})  # fmt: skip
        return {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        for process in self._running.values():
            process.send_signal(number)


def main(arguments: list[str]) -> int:
    """Drive all runs of a graph; return the exit code of the job."""
    os.umask(0o077)  # a run is its owner's alone
    phases = json.loads((Path(arguments[0]) / GRAPH).read_bytes())
    drivers = _Drivers()
    for phase in phases:
        code = drivers.drive([RunFolder(Path(path)) for path in phase])
        if code != DONE:
            return code
    return DONE


def _saved(folder: RunFolder) -> int:
    return max(folder.committed_steps(), default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
