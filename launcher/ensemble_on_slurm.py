"""An ensemble as a graph of Slurm jobs: shards, the seed, if there is one, all modules side by side, all joined, and
how good that is.

Each run is a job of its own, on nodes of its own, and is mended alone (launcher/on_slurm.py); what comes after it waits
by Slurm's dependencies. What each begins from is known when it is submitted: the last step of those before it. The same
command again submits what is neither done nor in the queue.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich.console import Console as Terminal

from configs.load import to_yaml
from data_pipeline.files import write_whole
from launcher import slurm
from launcher.branch import Origin
from launcher.ensemble import DATA, Plan, folder_of, from_modules, from_seed, is_done, plan_ensemble, verbs
from launcher.jobs import queued
from launcher.prepare import has_begun, make_ready
from launcher.snapshot import code_name, keep_code
from launcher.submit import queue, render, render_verb, waiting_for
from pretrain.config import RunConfig
from pretrain.run_folder import RunFolder


def submit_ensemble(files: Sequence[str], words: Sequence[str], without: Sequence[str], *, dry_run: bool) -> None:
    """Submit every run that is not done, or print their scripts. without: modules to leave out."""
    os.umask(0o077)  # a run is its owner's alone
    plan = plan_ensemble(files, words, None, without)
    if dry_run:
        for folder in _folders(plan):
            sys.stdout.write(render(folder, plan.launch, folder.path / code_name()))
        for verb, words in verbs(plan).items():
            sys.stdout.write(render_verb(plan.folder, plan.launch, plan.folder.path / code_name(), verb, words))
        return
    slurm.check_present()
    terminal = Terminal(highlight=False)
    terminal.print(f"ensemble [bold]{plan.folder.name}[/bold]: {len(_folders(plan))} jobs of {plan.launch.nodes} nodes")
    modules: list[str] = []
    if not has_begun(plan.folder):
        before = _seed(plan, _verb(plan, "data", [], terminal), terminal)
        for name, config in plan.alone.items():
            number = _part(f"the module {name}", config, plan, from_seed(plan, name), before, terminal)
            modules += [] if number is None else [number]
    joined = _part("all joined", plan.config, plan, from_modules(plan), modules, terminal)
    if joined is not None:
        _verb(plan, "eval", [joined], terminal)
    terminal.print("follow them with leviathan status", soft_wrap=True)


def _folders(plan: Plan) -> list[RunFolder]:
    seed = [] if plan.seed is None else [folder_of(plan.seed)]
    return [*seed, *map(folder_of, plan.alone.values()), plan.folder]


def _seed(plan: Plan, after: Sequence[str], terminal: Terminal) -> Sequence[str]:
    """The job that modules wait for, if there is one."""
    if plan.seed is None or all(has_begun(folder_of(run)) for run in plan.alone.values()):
        return after
    number = _part("the seed of all modules", plan.seed, plan, None, after, terminal)
    return after if number is None else [number]


def _verb(plan: Plan, verb: str, after: Sequence[str], terminal: Terminal) -> list[str]:
    """The job of one of our other commands; none where there is nothing to do, or it is in the queue before."""
    words, note = verbs(plan).get(verb), plan.folder.path / f"{verb}.job"
    if words is None:
        return []
    before = slurm.job(note.read_text()) if note.exists() else None
    if before is not None and not before.over:
        terminal.print(f"{verb}: {before}", soft_wrap=True)
        return [before.number]
    plan.folder.make()
    if verb == "data":
        write_whole(plan.folder.path / DATA, to_yaml(plan.config).encode())
    script = plan.folder.path / f"{verb}.sbatch"
    write_whole(script, render_verb(plan.folder, plan.launch, keep_code(plan.folder.path), verb, words).encode())
    number = slurm.submit(str(script), waiting_for(after))
    write_whole(note, number.encode())
    waits = f", after {', '.join(after)}" if after else ""
    terminal.print(f"{verb}: leviathan {' '.join(words)} is Slurm job {number}{waits}", soft_wrap=True)
    return [number]


def _part(
    what: str, config: RunConfig, plan: Plan, origin: Origin | None, after: Sequence[str], terminal: Terminal
) -> str | None:
    """The job of one run: in the queue before, or submitted now; None where the run is done."""
    folder = folder_of(config)
    job = queued(folder)
    if job is not None:
        terminal.print(f"{what}: run {folder.name} is {job}", soft_wrap=True)
        return job.number
    if is_done(folder, config):
        terminal.print(f"{what}: done before, run {folder.name}", soft_wrap=True)
        return None
    number = queue(make_ready(config, plan.launch, folder, origin=origin), after)
    waits = f", after {', '.join(after)}" if after else ""
    terminal.print(f"{what}: run {folder.name} is Slurm job {number}{waits}", soft_wrap=True)
    return number
