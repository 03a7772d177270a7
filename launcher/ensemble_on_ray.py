"""An ensemble as one Ray job: shards, the seed, if there is one, all modules side by side, all joined, an evaluation.

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

from configs.errors import DONE
from configs.load import to_yaml
from data_pipeline.files import write_whole
from data_pipeline.inspect_shards import is_built
from launcher.branch import Origin
from launcher.ensemble import DATA, Plan, folder_of, from_modules, from_seed, is_done, plan_ensemble, verbs
from launcher.jobs import check_not_queued, queued
from launcher.on_ray import DriverProcess, asked_code, code_of_job
from launcher.prepare import has_begun, make_ready
from launcher.ray_jobs import SCRIPT, RayJob, RayJobs
from launcher.restart import Attempt, decide
from launcher.submit_ray import queue, write_script
from launcher.supervise import REQUESTS
from launcher.watch import signal_name
from pretrain.config import RunConfig
from pretrain.run_folder import RunFolder

GRAPH, VERBS = "graph.json", "verbs.json"
_POLL_S, _TRIES = 0.5, 3


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
    if not is_built(plan.config.data):
        write_whole(plan.folder.path / DATA, to_yaml(plan.config).encode())
    write_whole(plan.folder.path / VERBS, json.dumps(verbs(plan)).encode())
    number, new = queue(plan.folder, jobs, "launcher.ensemble_on_ray", runs)
    whose = "" if new else ", submitted by somebody else a moment ago"
    terminal.print(f"ensemble [bold]{plan.folder.name}[/bold]: {len(runs)} runs, Ray job [bold]{number}[/bold]{whose}")
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
    check_not_queued(folder)
    run = make_ready(config, plan.launch, folder, origin=origin)
    write_script(run)
    terminal.print(f"{what}: run {folder.name}", soft_wrap=True)
    return [folder]


# ---- in the job


class _Life:
    """One run, driven to its end. code: how it ended, once it has."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._driver: DriverProcess | None = None
        self._history: list[Attempt] = []
        self._began, self._not_before = 0, 0.0
        self.code: int | None = None

    def look(self, asked: int | None) -> None:
        """Start its driver, pass a request on, or take note of an end. asked: the signal that asked all to leave."""
        if self.code is not None:
            return
        if self._driver is None:
            self._start(asked)
            return
        code = self._driver.ended(asked)
        if code is None:
            return
        self._driver = None
        if code >= 0 or asked is not None:  # a driver that ends by itself has tried all there is
            self.code = code_of_job(code, asked)
        else:
            self._mend(code)

    def _start(self, asked: int | None) -> None:
        """Start the driver, unless somebody has asked for the end of the run, or of all, before."""
        if asked is not None or self._run.stop_request.exists():
            self.code = asked_code(asked)
        elif time.monotonic() >= self._not_before:
            self._began = _saved(self._run)
            print(f"driving {self._run.name}", flush=True)
            self._driver = DriverProcess(self._run, {})

    def _mend(self, code: int) -> None:
        """Let a driver that was killed be started again, or give the run up."""
        run, cause = self._run, f"the driver of {self._run.name} died: {signal_name(-code)}"
        run.event("fault", cause)
        self._history.append(Attempt(self._began, _saved(run), code_of_job(code, None), cause))
        decision = decide(self._history)
        self._not_before = time.monotonic() + decision.wait_s
        if decision.action == "give_up":
            run.event("stop", f"stopped: {decision.reason}", code=decision.code, step=_saved(run))
            self.code = decision.code


class _Drivers:
    """The drivers of runs, side by side."""

    def __init__(self) -> None:
        self._asked: int | None = None
        for number in REQUESTS:
            signal.signal(number, self._on_signal)

    def drive(self, runs: Sequence[RunFolder]) -> int:
        """Drive all of them to their end; return the exit code of the first that did not end well."""
        lives = [_Life(run) for run in runs]
        while any(life.code is None for life in lives):
            for life in lives:
                life.look(self._asked)
            time.sleep(_POLL_S)
        return next((life.code for life in lives if life.code), DONE)

    def call(self, folder: RunFolder, words: Sequence[str]) -> int:
        """Another command of ours, to its end; return its exit code. Killed, it is tried again, and goes on."""
        for _ in range(_TRIES):
            code = self._call(folder, words)
            if code >= 0 or self._asked is not None:
                break
            folder.event("fault", f"leviathan {' '.join(words[:2])} died: {signal_name(-code)}")
        return asked_code(self._asked) if code < 0 and self._asked is not None else code_of_job(code, None)

    def _call(self, folder: RunFolder, words: Sequence[str]) -> int:
        """Its exit code; negative, a signal. A request to leave kills it."""
        print(f"leviathan {' '.join(words)}", flush=True)
        process = subprocess.Popen(
            ["bash", str(folder.path / SCRIPT), "launcher", *words], stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            while process.poll() is None and self._asked is None:
                time.sleep(_POLL_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return process.returncode

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._asked or number


def main(arguments: list[str]) -> int:
    """Drive all runs of a graph; return the exit code of the job."""
    os.umask(0o077)  # a run is its owner's alone
    folder = RunFolder(Path(arguments[0]))
    phases = json.loads((folder.path / GRAPH).read_bytes())
    verbs_of = json.loads((folder.path / VERBS).read_bytes()) if (folder.path / VERBS).exists() else {}
    drivers, code = _Drivers(), DONE
    if "data" in verbs_of:
        cluster = ["--on", "ray", "--address", os.environ.get("RAY_ADDRESS", "auto")]
        code = drivers.call(folder, [*verbs_of["data"], *cluster])
        if code != DONE:
            folder.event("stop", f"stopped: its shards could not be built (exit {code})", code=code, step=0)
    for phase in phases:
        code = code or drivers.drive([RunFolder(Path(path)) for path in phase])
    return code or (drivers.call(folder, verbs_of["eval"]) if "eval" in verbs_of else DONE)


def _saved(folder: RunFolder) -> int:
    return max(folder.committed_steps(), default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
