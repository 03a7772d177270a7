"""`leviathan submit`: a run folder made ready, the code kept in it, a script that anybody can read, and the queue."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console as Terminal

from configs.errors import ConfigError, UsageError
from data_pipeline.files import write_whole
from launcher import slurm
from launcher.config import LaunchConfig, SlurmConfig, one_word
from launcher.jobs import InQueueError, check_not_queued
from launcher.prepare import Prepared, prepare, resolve, run_folder
from launcher.snapshot import ROOT, code_name, keep_code
from launcher.submit_ray import fill, write_script
from launcher.sweep import runs_of, split
from pretrain.run_folder import RunFolder

_EARLY_S = 60
"""Slurm sends the signal before a time limit up to so much earlier than it was asked to."""


@dataclass(frozen=True)
class Asked:
    """What the command line says besides the configuration.

    after: jobs that must be done before. without: modules of an ensemble to leave out.
    """

    nodes: int | None
    ranks: int | None
    branch: Sequence[str]
    allow: Sequence[str]
    after: Sequence[str] = ()
    without: Sequence[str] = ()


def submit_slurm(files: Sequence[str], words: Sequence[str], asked: Asked, *, dry_run: bool) -> None:
    """Submit a run, or one for each value of a sweep, or print the scripts.

    Raises ConfigError where the run waits or runs already; a sweep passes over such a one.
    """
    words, sweeps = split(words)
    if not sweeps:
        _submit(files, words, asked, dry_run=dry_run)
        return
    terminal = Terminal(highlight=False)
    for chosen in runs_of(files, words, sweeps):
        try:
            _submit(files, [*words, *chosen], asked, dry_run=dry_run)
        except InQueueError as error:
            terminal.print(str(error), soft_wrap=True)


def _submit(files: Sequence[str], words: Sequence[str], asked: Asked, *, dry_run: bool) -> None:
    os.umask(0o077)  # a run is its owner's alone
    strange = [job for job in asked.after if not job.isdigit()]
    if strange:
        raise UsageError(f"--after {strange[0]!r} is no job; give the number that sbatch or `leviathan submit` printed")
    words = [*words, *_cluster_words(files, words, asked)]
    config, launch = resolve(files, words)
    if len(config.model.ensemble.modules) > 1 and not asked.branch:
        if asked.after or asked.allow:
            raise UsageError("an ensemble is a graph of jobs by itself, without --after and --allow; leave them out")
        from launcher.ensemble_on_slurm import submit_ensemble

        submit_ensemble(files, words, asked.without, dry_run=dry_run)
        return
    if asked.without:
        raise UsageError("--without leaves modules out of an ensemble, and this run joins none; leave it out")
    if dry_run:
        folder = run_folder(config, files)
        sys.stdout.write(render(folder, launch, folder.path / code_name()))
        return
    slurm.check_present()
    terminal = Terminal(highlight=False)
    check_not_queued(run_folder(config, files))
    run = prepare(files, words, ranks=None, branch=asked.branch, allow=asked.allow)
    number = queue(run, asked.after)
    terminal.print(f"run [bold]{run.folder.name}[/bold] is Slurm job [bold]{number}[/bold], in {run.folder.path}")
    terminal.print(
        f"follow it with leviathan status {run.folder.name} | leviathan logs {run.folder.name} -f", soft_wrap=True
    )


def queue(run: Prepared, after: Sequence[str] = ()) -> str:
    """Write the script of a run that is ready into its folder, and submit it; return the job's number."""
    script = run.folder.path / "job.sbatch"
    write_whole(script, render(run.folder, run.launch, keep_code(run.folder.path)).encode())
    if run.launch.slurm.ray:
        write_script(run, run.launch.slurm.python)
    number = slurm.submit(str(script), waiting_for(after))
    run.folder.set_facts(job={"slurm": number, "submitted": time.time()}, verb="submit slurm")
    run.folder.event("submit", f"submitted as Slurm job {number}", job=number)
    return number


def waiting_for(jobs: Sequence[str]) -> list[str]:
    """Options of sbatch that let a job wait until others have ended well."""
    return [f"--dependency=afterok:{':'.join(jobs)}", "--kill-on-invalid-dep=yes"] if jobs else []


def render(folder: RunFolder, launch: LaunchConfig, code: Path) -> str:
    """The batch script of a run. Raises ConfigError where a path cannot stand in one."""
    asks = launch.slurm
    _check_time(asks)
    module = "launcher.ray_on_slurm" if asks.ray else "launcher.on_slurm"
    each = launch.ranks // launch.nodes
    size = [f"--nodes={launch.nodes}", f"--ntasks-per-node={each}"]
    options = [*_options(folder, launch, "", "slurm", size), f"--signal=B:USR1@{asks.before_limit_s}", *asks.extra]
    return _script(launch, code, options, [module, str(folder.path.resolve())])


def render_verb(folder: RunFolder, launch: LaunchConfig, code: Path, verb: str, words: Sequence[str]) -> str:
    """The batch script of another command of ours for a run, on one node, with the cores that ranks have there.

    verb: what the job and its log are called by. Raises ConfigError as `render` does.
    """
    one = launch.model_copy(update={"slurm": launch.slurm.model_copy(update={
        "cpus_per_rank": launch.ranks // launch.nodes * (launch.slurm.cpus_per_rank or 1),
        "gpus_per_node": launch.slurm.gpus_per_node and 1,
    })})  # fmt: skip
    options = [*_options(folder, one, f"-{verb}", verb, ["--nodes=1", "--ntasks=1"]), *launch.slurm.extra]
    return _script(launch, code, options, ["launcher", *words], launch.slurm.wrapper)


def _script(launch: LaunchConfig, code: Path, options: list[str], words: list[str], wrapper: Sequence[str] = ()) -> str:
    """wrapper: words before Python. A supervisor has none, for it calls Slurm's own commands."""
    asks = launch.slurm
    whole = [*wrapper, asks.python or sys.executable, "-P", "-m", *words]
    values = {"options": options, "code": str(code.resolve()), "words": whole}
    return fill(ROOT / "slurm" / "job.sbatch", "launch.slurm.env_file", asks.env_file, values)


def _options(folder: RunFolder, launch: LaunchConfig, suffix: str, log: str, size: Sequence[str]) -> list[str]:
    """Of sbatch, as they stand in every script. suffix: of the job's name; log: what its log begins with; size: how
    many nodes and tasks."""
    asks = launch.slurm
    try:
        place = one_word(str(folder.path.resolve()), "the path").replace("%", "%%")
        name = one_word(folder.name, "the name")
    except ValueError as error:
        raise ConfigError(f"run {folder.name}: {error}; choose another run.name or run.dir") from None
    chosen = {
        "partition": asks.partition, "account": asks.account, "qos": asks.qos, "reservation": asks.reservation,
        "constraint": asks.constraint, "time": asks.time, "gpus-per-node": asks.gpus_per_node,
        "cpus-per-task": asks.cpus_per_rank, "mem": asks.mem,
    }  # fmt: skip
    return [
        f"--job-name={name}{suffix}",
        *size,
        *(f"--{option}={value}" for option, value in chosen.items() if value is not None),
        f"--output={place}/{log}-%j.log",
        "--open-mode=append",
        "--requeue",
    ]


def _check_time(asks: SlurmConfig) -> None:
    """Raises ConfigError where a job would be told to save before it has begun."""
    if asks.time is None:
        return
    days, _, clock = asks.time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:  # D-HH[:MM[:SS]]
        seconds = int(days) * 86400 + sum(part * unit for part, unit in zip(parts, (3600, 60, 1)))
    elif len(parts) == 3:
        seconds = parts[0] * 3600 + parts[1] * 60 + parts[2]
    else:  # MM[:SS]
        seconds = parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)
    if seconds <= asks.before_limit_s + _EARLY_S:
        raise ConfigError(
            f"launch.slurm.time {asks.time} leaves no time to train: a run saves launch.slurm.before_limit_s"
            f" {asks.before_limit_s} s before the limit, and Slurm says so up to {_EARLY_S} s early; set a longer time"
        )


def _cluster_words(files: Sequence[str], words: Sequence[str], asked: Asked) -> list[str]:
    """Nodes and ranks as the command line asks for them: a rank for each GPU, or node, where nothing is said."""
    values = {"nodes": asked.nodes, "ranks": asked.ranks}
    said = {match.group(1) for word in words if (match := re.match(r"launch\.(ranks|nodes)=", word))}
    chosen = [f"launch.{name}={value}" for name, value in values.items() if value is not None]
    if asked.ranks is None and "ranks" not in said and asked.nodes is not None:
        _, launch = resolve(files, [*words, "launch.nodes=1"])
        if launch.slurm.gpus_per_node is not None or launch.ranks == 1:
            chosen.append(f"launch.ranks={asked.nodes * (launch.slurm.gpus_per_node or 1)}")
    return chosen
