"""`leviathan ensemble`: each module trained alone, then all joined and trained together, in one command.

    phase 1   RUN-MODULE of each module, runs like any other      phase 2   RUN, which begins with their checkpoints

What is done is seen from the run folders alone, so the command goes on wherever it was ended.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console as Terminal

from configs.errors import DONE, ConfigError, DataError, UsageError
from launcher.config import LaunchConfig
from launcher.prepare import (
    Prepared,
    changes_since,
    check_rows,
    has_begun,
    make_ready,
    own_mixers,
    resolve,
    run_folder,
)
from launcher.runs import tail
from launcher.several import Supervisors
from launcher.train import FOR_GOOD, cause_of_end, tell_end
from pretrain.config import RunConfig, total_steps
from pretrain.ensemble.alone import module_run, without_modules
from pretrain.run_folder import RunFolder


@dataclass(frozen=True)
class _Plan:
    """config, folder: of the joint run. alone: of every module's run, by module."""

    config: RunConfig
    launch: LaunchConfig
    folder: RunFolder
    alone: dict[str, RunConfig]

    def folder_of(self, module: str) -> RunFolder:
        return RunFolder(Path(self.config.run.dir).expanduser() / str(self.alone[module].run.name))


def train_ensemble(files: Sequence[str], words: Sequence[str], *, ranks: int | None, without: Sequence[str]) -> int:
    """Train an ensemble on this machine, from wherever it is; return the exit code. without: modules to leave out."""
    os.umask(0o077)  # a run is its owner's alone
    plan = _plan(files, words, ranks, without)
    terminal = Terminal(highlight=False)
    with Supervisors(terminal) as supervisors:
        code = _phase_1(plan, supervisors, terminal)
        if code == DONE:
            code = _phase_2(plan, supervisors, terminal)
    if code == DONE:
        _show_table(plan)
    return code


def _plan(files: Sequence[str], words: Sequence[str], ranks: int | None, without: Sequence[str]) -> _Plan:
    config, launch = resolve(files, words)
    modules = config.model.ensemble.modules
    if not modules:
        raise UsageError(
            "this configuration has no modules; name some under model.ensemble.modules, or use `leviathan train`"
        )
    if ranks is not None:
        launch = launch.model_copy(update={"ranks": ranks})
    check_rows(config, launch.ranks)
    # named before modules are left out: those that are left keep their runs
    folder = run_folder(config, files)
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": folder.name})})
    config = without_modules(config, without)
    return _Plan(config, launch, folder, {name: module_run(config, name) for name in config.model.ensemble.modules})


# ---- modules alone


def _phase_1(plan: _Plan, supervisors: Supervisors, terminal: Terminal) -> int:
    """Train every module that is not yet trained."""
    if has_begun(plan.folder):
        if "modules" not in plan.folder.facts().get("from", {}):
            raise ConfigError(
                f"run {plan.folder.name} has begun without modules trained alone; go on with `leviathan train`, or give"
                " the ensemble another run.name"
            )
        terminal.print(f"phase 1 of 2: done before, its modules are joined in {plan.folder.name}")
        return DONE
    terminal.print(f"[bold]phase 1 of 2[/bold]: {len(plan.alone)} modules, each alone")
    side_by_side = _places(plan)
    modules = {plan.folder_of(name).name: name for name in plan.alone}
    numbers = {
        run: f"module {number} of {len(modules)}, {name}" for number, (run, name) in enumerate(modules.items(), 1)
    }
    waiting = []
    for run, name in modules.items():
        folder, config = plan.folder_of(name), plan.alone[name]
        if _is_done(folder, config):
            terminal.print(f"{numbers[run]}: done before, step {max(folder.committed_steps()):,} of {run}")
        else:
            waiting.append(make_ready(_with_threads(config, plan, side_by_side), plan.launch, folder, verb="ensemble"))

    def begins(run: Prepared) -> None:
        terminal.print(f"[bold]{numbers[run.folder.name]}[/bold]: run {run.folder.name} in {run.folder.path}")

    codes = supervisors.train(waiting, side_by_side, begins)
    bad = {run: code for run, code in codes.items() if code != DONE}
    for run, code in bad.items():
        _tell_failure(plan.folder_of(modules[run]), modules[run], code, terminal)
    return next(iter(bad.values()), supervisors.asked or DONE)


def _is_done(folder: RunFolder, config: RunConfig) -> bool:
    """Whether a run has done all its steps. Raises ConfigError where it has, but was another one."""
    if max(folder.committed_steps(), default=0) < total_steps(config):
        return False
    changes_since(folder, own_mixers(config, folder)[0])
    return True


def _places(plan: _Plan) -> int:
    """How many modules are trained at the same time: as many as are asked for and have devices of their own."""
    wanted = min(plan.config.modules.side_by_side, len(plan.alone))
    if wanted == 1 or plan.config.engine.device == "cpu":
        return wanted
    import torch

    devices = torch.cuda.device_count()
    return max(1, min(wanted, devices // plan.launch.ranks)) if devices else wanted


def _with_threads(config: RunConfig, plan: _Plan, side_by_side: int) -> RunConfig:
    """The configuration with the cores dealt to all ranks that run at the same time."""
    if side_by_side == 1 or config.engine.threads is not None:
        return config
    threads = max(1, (os.cpu_count() or 1) // (side_by_side * plan.launch.ranks))
    return config.model_copy(update={"engine": config.engine.model_copy(update={"threads": threads})})


def _tell_failure(folder: RunFolder, module: str, code: int, terminal: Terminal) -> None:
    if code in FOR_GOOD:
        message = (
            f"the module {module} failed (run {folder.name}, exit {code}): {cause_of_end(folder)}; then give the same"
            f" command again, or go on with the others: --without {module}"
        )
        print(f"error: {message}", file=sys.stderr)
    else:
        terminal.print(f"stopped in {folder.name} (exit {code}); the same command goes on from its last checkpoint")


# ---- all together


def _phase_2(plan: _Plan, supervisors: Supervisors, terminal: Terminal) -> int:
    """Train the joint run, which begins with the modules' checkpoints."""
    if _is_done(plan.folder, plan.config):
        terminal.print(f"phase 2 of 2: done before, step {total_steps(plan.config):,} of {plan.folder.name}")
        return DONE
    origin = []
    if not has_begun(plan.folder):
        newest = {name: max(plan.folder_of(name).committed_steps()) for name in plan.alone}
        origin = [f"{name}={plan.folder_of(name).path}@{step}" for name, step in newest.items()]
    run = make_ready(plan.config, plan.launch, plan.folder, branch=origin, verb="ensemble")
    joined = ", ".join(plan.alone)
    terminal.print(f"[bold]phase 2 of 2[/bold]: {joined} joined: run {plan.folder.name} in {plan.folder.path}")
    code = supervisors.train([run]).get(plan.folder.name, supervisors.asked or DONE)
    tell_end(terminal, plan.folder, code)
    return code


def _show_table(plan: _Plan) -> None:
    """Loss and relevance of each module on each source: as the run evaluated itself, or measured now."""
    from launcher.texts import evaluate_run, show_modules

    record = next(iter(tail(plan.folder.evals)[-1:]), None)
    if record is not None and record["step"] == total_steps(plan.config):
        show_modules(plan.folder.name, record)
        return
    try:
        evaluate_run(str(plan.folder.path), step=None, rows=plan.config.eval.rows, device="auto")
    except DataError as error:
        print(f"no table of modules: {error}")
