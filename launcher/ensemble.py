"""`leviathan ensemble`: each module trained alone, then all joined and trained together, in one command.

    RUN-seed, if there is one: a single model that every module's models begin from
    RUN-MODULE of each module, runs like any other
    RUN, which begins with their checkpoints

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
from data_pipeline.inspect_shards import is_built
from launcher.branch import Origin
from launcher.config import LaunchConfig
from launcher.prepare import (
    Prepared,
    changes_since,
    check_clusters,
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
from pretrain.ensemble.alone import module_run, seed_run, without_modules
from pretrain.ensemble.config import FIRST, SECOND
from pretrain.run_folder import RunFolder

DATA = "data.yaml"
"""In the folder of the joint run: what its shards are made of."""


@dataclass(frozen=True)
class Plan:
    """The runs of an ensemble.

    config, folder: of the joint run. alone: of every module's run, by module. seed: of the seed's run.
    """

    config: RunConfig
    launch: LaunchConfig
    folder: RunFolder
    alone: dict[str, RunConfig]
    seed: RunConfig | None

    def phase(self, number: int) -> str:
        """`phase 2 of 3`; the joint run is the last, modules are the last but one."""
        phases = 3 if self.seed is not None else 2
        return f"[bold]phase {number % phases + 1} of {phases}[/bold]"


def folder_of(config: RunConfig) -> RunFolder:
    """Where a run that has a name lies."""
    return RunFolder(Path(config.run.dir).expanduser() / str(config.run.name))


def verbs(plan: Plan) -> dict[str, list[str]]:
    """What is to be done on a cluster before and after all runs, as words of the command: shards, where there are none
    yet, and how good all joined are on held-out text."""
    folder, rows = plan.folder.path.resolve(), plan.config.eval.rows
    built = {} if is_built(plan.config.data) else {"data": ["data", "build", str(folder / DATA)]}
    return built | {"eval": ["eval", str(folder), "--rows", "all" if rows is None else str(rows)]}


def train_ensemble(files: Sequence[str], words: Sequence[str], *, ranks: int | None, without: Sequence[str]) -> int:
    """Train an ensemble on this machine, from wherever it is; return the exit code. without: modules to leave out."""
    os.umask(0o077)  # a run is its owner's alone
    plan = plan_ensemble(files, words, ranks, without)
    terminal = Terminal(highlight=False)
    with Supervisors(terminal) as supervisors:
        code = DONE
        for phase in (_train_seed, _train_modules, _train_joined):
            code = phase(plan, supervisors, terminal) if code == DONE else code
    if code == DONE:
        _show_table(plan)
    return code


def plan_ensemble(files: Sequence[str], words: Sequence[str], ranks: int | None, without: Sequence[str]) -> Plan:
    """Every run of an ensemble. ranks: of each run, instead of launch.ranks. without: modules to leave out.

    Raises UsageError where a configuration has no modules, ConfigError where they do not fit together.
    """
    config, launch = resolve(files, words)
    if not config.model.ensemble.modules:
        raise UsageError(
            "this configuration has no modules; name some under model.ensemble.modules, or use `leviathan train`"
        )
    if config.model.ensemble.fusion == "btx" and not config.modules.seed_steps:
        raise ConfigError("fusion btx averages models, which must have begun from one seed; set modules.seed_steps")
    if ranks is not None:
        launch = launch.model_copy(update={"ranks": ranks})
    check_rows(config, launch.ranks)
    # named before modules are left out: those that are left keep their runs
    folder = run_folder(config, files)
    check_clusters(config, folder)
    named = {
        "run": config.run.model_copy(update={"name": folder.name}),
        "log": config.log.model_copy(update={"wandb_group": config.log.wandb_group or folder.name}),
    }
    config = without_modules(config.model_copy(update=named), without)
    alone = {name: module_run(config, name) for name in config.model.ensemble.modules}
    return Plan(config, launch, folder, alone, seed_run(config) if config.modules.seed_steps else None)


# ---- the seed


def _train_seed(plan: Plan, supervisors: Supervisors, terminal: Terminal) -> int:
    """Train the model that modules begin from, while some have not begun."""
    if plan.seed is None or has_begun(plan.folder) or all(has_begun(folder_of(run)) for run in plan.alone.values()):
        return DONE
    folder = folder_of(plan.seed)
    if is_done(folder, plan.seed):
        terminal.print(
            f"{plan.phase(0)}: done before, step {total_steps(plan.seed):,} of {folder.name}", soft_wrap=True
        )
        return DONE
    terminal.print(f"{plan.phase(0)}: the seed of all modules: run {folder.name} in {folder.path}", soft_wrap=True)
    run = make_ready(plan.seed, plan.launch, folder, verb="ensemble")
    code = supervisors.train([run]).get(folder.name, supervisors.asked or DONE)
    if code != DONE:
        _tell_failure(folder, "the seed", "", code, terminal)
    return code


def from_seed(plan: Plan, module: str) -> Origin | None:
    """What a module begins from: its first model from the seed's end, its second from its half.

    From one checkpoint the two would begin equal, and only their couplings would ever tell them apart.
    """
    if plan.seed is None or has_begun(folder_of(plan.alone[module])):
        return None
    run, steps = str(folder_of(plan.seed).path.resolve()), total_steps(plan.seed)
    of_each = {FIRST: steps, SECOND: steps // 2}
    return {"models": {f"{module}.{which}": {"run": run, "step": step} for which, step in of_each.items()}}


# ---- modules alone


def _train_modules(plan: Plan, supervisors: Supervisors, terminal: Terminal) -> int:
    """Train every module that is not yet trained."""
    if has_begun(plan.folder):
        if "modules" not in plan.folder.facts().get("from", {}):
            raise ConfigError(
                f"run {plan.folder.name} has begun without modules trained alone; go on with `leviathan train`, or give"
                " the ensemble another run.name"
            )
        terminal.print(f"{plan.phase(-2)}: done before, its modules are joined in {plan.folder.name}", soft_wrap=True)
        return DONE
    terminal.print(f"{plan.phase(-2)}: {len(plan.alone)} modules, each alone", soft_wrap=True)
    side_by_side = _places(plan)
    modules = {folder_of(config).name: name for name, config in plan.alone.items()}
    numbers = {
        run: f"module {number} of {len(modules)}, {name}" for number, (run, name) in enumerate(modules.items(), 1)
    }
    waiting = []
    for run, name in modules.items():
        folder, config = folder_of(plan.alone[name]), plan.alone[name]
        if is_done(folder, config):
            terminal.print(
                f"{numbers[run]}: done before, step {max(folder.committed_steps()):,} of {run}", soft_wrap=True
            )
        else:
            config, origin = _with_threads(config, plan, side_by_side), from_seed(plan, name)
            waiting.append(make_ready(config, plan.launch, folder, origin=origin, verb="ensemble"))

    def begins(run: Prepared) -> None:
        terminal.print(
            f"[bold]{numbers[run.folder.name]}[/bold]: run {run.folder.name} in {run.folder.path}", soft_wrap=True
        )

    codes = supervisors.train(waiting, side_by_side, begins)
    bad = {run: code for run, code in codes.items() if code != DONE}
    for run, code in bad.items():
        name = modules[run]
        instead = f", or go on with the others: --without {name}"
        _tell_failure(folder_of(plan.alone[name]), f"the module {name}", instead, code, terminal)
    return next(iter(bad.values()), supervisors.asked or DONE)


def is_done(folder: RunFolder, config: RunConfig) -> bool:
    """Whether a run has done all its steps. Raises ConfigError where it has, but was another one."""
    if max(folder.committed_steps(), default=0) < total_steps(config):
        return False
    changes_since(folder, own_mixers(config, folder)[0])
    return True


def _places(plan: Plan) -> int:
    """How many modules are trained at the same time: as many as are asked for and have devices of their own."""
    wanted = min(plan.config.modules.side_by_side, len(plan.alone))
    if wanted == 1 or plan.config.engine.device == "cpu":
        return wanted
    import torch

    devices = torch.cuda.device_count()
    return max(1, min(wanted, devices // plan.launch.ranks)) if devices else wanted


def _with_threads(config: RunConfig, plan: Plan, side_by_side: int) -> RunConfig:
    """The configuration with the cores dealt to all ranks that run at the same time."""
    if side_by_side == 1 or config.engine.threads is not None:
        return config
    threads = max(1, (os.cpu_count() or 1) // (side_by_side * plan.launch.ranks))
    return config.model_copy(update={"engine": config.engine.model_copy(update={"threads": threads})})


def _tell_failure(folder: RunFolder, what: str, instead: str, code: int, terminal: Terminal) -> None:
    if code in FOR_GOOD:
        message = f"{what} failed (run {folder.name}, exit {code}): {cause_of_end(folder)}"
        print(f"error: {message}; then give the same command again{instead}", file=sys.stderr)
    else:
        terminal.print(
            f"stopped in {folder.name} (exit {code}); the same command goes on from its last checkpoint", soft_wrap=True
        )


# ---- all together


def from_modules(plan: Plan) -> Origin | None:
    """What the joint run begins from: every module's last state."""
    if has_begun(plan.folder):
        return None
    last = {name: (folder_of(config), total_steps(config)) for name, config in plan.alone.items()}
    return {"modules": {name: {"run": str(f.path.resolve()), "step": step} for name, (f, step) in last.items()}}


def _train_joined(plan: Plan, supervisors: Supervisors, terminal: Terminal) -> int:
    """Train the joint run, which begins with the modules' checkpoints."""
    if is_done(plan.folder, plan.config):
        terminal.print(
            f"{plan.phase(-1)}: done before, step {total_steps(plan.config):,} of {plan.folder.name}", soft_wrap=True
        )
        return DONE
    run = make_ready(plan.config, plan.launch, plan.folder, origin=from_modules(plan), verb="ensemble")
    terminal.print(
        f"{plan.phase(-1)}: {', '.join(plan.alone)} joined: run {plan.folder.name} in {plan.folder.path}",
        soft_wrap=True,
    )
    code = supervisors.train([run]).get(plan.folder.name, supervisors.asked or DONE)
    tell_end(terminal, plan.folder, code)
    return code


def _show_table(plan: Plan) -> None:
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
