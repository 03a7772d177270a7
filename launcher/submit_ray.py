"""`leviathan submit ray`: a run folder made ready, the code kept in it, and a job of a Ray cluster that drives it.

A job's number is the run's, so that submitting twice, even at the same moment, gives one job.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console as Terminal

from configs.errors import ConfigError, LeviathanError, UsageError
from data_pipeline.files import write_whole
from launcher import kuberay
from launcher.config import LaunchConfig, RayConfig
from launcher.console import Console
from launcher.jobs import check_not_queued, queued
from launcher.kuberay import Worker
from launcher.prepare import Prepared, most_ranks, prepare, resolve, run_folder
from launcher.ray_jobs import SCRIPT, RayJob, RayJobs
from launcher.snapshot import code_name, keep_code
from launcher.train import tell_end
from pretrain.config import total_steps
from pretrain.run_folder import RunFolder

TEMPLATES = Path(__file__).parent / "templates"
FORWARDED = ("LEVIATHAN_FAULT", "WANDB_MODE", "WANDB_BASE_URL")
"""Variables of who submits that a job gets. None of them is a secret: what is belongs into launch.ray.env_file."""
_POLL_S, _ASK_S = 0.25, 2.0
_STRANGE = re.compile(r"[\0\ud800-\udfff]")
_NAME_LENGTH = 100
"""Ray makes names of files out of a job's number."""


def submit_ray(
    files: Sequence[str], words: Sequence[str], address: str | None, branch: Sequence[str], allow: Sequence[str],
    without: Sequence[str], *, mode: str,
) -> int:  # fmt: skip
    """Submit a run, or attach to its job where there is one; return the exit code.

    mode: `submit`; `print` prints the script, and writes and submits nothing;
    `kuberay` makes the run folder ready and prints the manifest of a RayJob.
    """
    os.umask(0o077)  # a run is its owner's alone
    config, launch = resolve(files, words)
    most_ranks(config, launch.ray.min_ranks or launch.ranks)
    folder, joins = run_folder(config, files), len(config.model.ensemble.modules) > 1 and not branch
    if without and not joins:
        raise UsageError("--without leaves modules out of an ensemble, and this run joins none; leave it out")
    if joins and allow:
        raise UsageError("an ensemble is a graph of runs by itself, without --allow; leave it out")
    if joins and mode == "kuberay":
        raise UsageError("an ensemble is a graph of runs, and a RayJob is one; submit it to a cluster with --address")
    if mode == "print":
        sys.stdout.write(script_of(folder, launch.ray, folder.path / code_name()))
        return 0
    if mode == "kuberay":
        # what is wrong with it is told before anything is written
        manifest = _manifest(folder, launch)
        write_script(prepare(files, words, ranks=None, branch=branch, allow=allow))
        sys.stdout.write(manifest)
        return 0
    if address is None:
        raise UsageError("submit ray needs the dashboard of a cluster; give --address, such as http://10.0.0.1:8265")
    jobs, terminal = RayJobs(address), Terminal(highlight=False)
    jobs.check()
    if joins:
        from launcher.ensemble_on_ray import submit_ensemble

        return submit_ensemble(files, words, without, jobs)
    job = queued(folder)
    if isinstance(job, RayJob):
        terminal.print(f"run [bold]{folder.name}[/bold] is {job} already; following it, Ctrl-C leaves it alone")
        return follow(folder, total_steps(config), jobs, job.number, terminal)
    check_not_queued(folder)
    run = prepare(files, words, ranks=None, branch=branch, allow=allow)
    write_script(run)
    number, new = queue(run.folder, jobs, "launcher.on_ray", [run.folder])
    what = "is" if new else "was submitted by somebody else a moment ago as"
    terminal.print(f"run [bold]{folder.name}[/bold] {what} Ray job [bold]{number}[/bold], in {folder.path}")
    terminal.print(f"follow it with leviathan status {folder.name} | leviathan logs {folder.name} -f", soft_wrap=True)
    if not new:
        return follow(folder, total_steps(config), jobs, number, terminal)
    return 0


def queue(folder: RunFolder, jobs: RayJobs, module: str, runs: Sequence[RunFolder]) -> tuple[str, bool]:
    """Submit the job that drives a run folder; return its number and whether it is new. runs: all that it drives."""
    path = folder.path.resolve()
    line = f"exec {shlex.join(['bash', str(path / SCRIPT), module, str(path)])}"
    for nth in itertools.count(len(_numbers(folder)) + 1):
        number = job_number(folder, nth)
        new = jobs.submit(number, line)
        job = None if new else jobs.job(number)
        if job is None or not job.over:
            break
        # else a submission that nobody lived to write down, and that is over
    for run in runs:
        facts = {"ray": number, "address": jobs.address, "submitted": time.time(), "shared": len(runs) > 1}
        run.set_facts(job=facts, verb="submit ray")
        if number not in _numbers(run):
            run.event("submit", f"submitted as Ray job {number}", job=number)
    return number, new


def job_number(folder: RunFolder, nth: int) -> str:
    """What the cluster calls the nth job of a run: its name as words of a shell and names of files take it, its id."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", folder.name).lstrip("-.")[:_NAME_LENGTH]
    return f"{name or 'run'}-{folder.facts()['run_id'][:8]}-{nth}"


def _numbers(folder: RunFolder) -> set[str]:
    """The jobs that a run was submitted as."""
    return {str(event.get("job")) for event in folder.history() if event["event"] == "submit"}


def follow(folder: RunFolder, steps: int, jobs: RayJobs, number: str, terminal: Terminal) -> int:
    """Show a run until its job is over; return the run's exit code. Ctrl-C leaves the job alone."""
    console, asked = Console(folder, steps), 0.0
    try:
        while True:
            console.poll()
            if time.monotonic() - asked > _ASK_S:
                asked = time.monotonic()
                job = jobs.job(number)
                if job is None or job.over:
                    break
            time.sleep(_POLL_S)
        console.poll()
    finally:
        console.close()
    code = code_of(folder, job)
    tell_end(terminal, folder, code)
    return code


def code_of(folder: RunFolder, job: RayJob | None) -> int:
    """How a run ended whose job is over. Raises LeviathanError where it never began."""
    last = next((event for event in reversed(folder.history()) if event["event"] in ("done", "stop", "submit")), None)
    if last is None or last["event"] == "submit":
        said = f" ({job.message.splitlines()[0]})" if job is not None and job.message else ""
        raise LeviathanError(f"the job of run {folder.name} ended before the run began{said}; see the job's own log")
    return 0 if last["event"] == "done" else int(last.get("code", 1))


def write_script(run: Prepared, python: str | None = None) -> None:
    """The script that every process of a run begins with, and the code, into the run's folder.

    python: for the nodes, where `launch.ray` names none.
    """
    asks = run.launch.ray
    asks = asks.model_copy(update={"python": asks.python or python})
    script = script_of(run.folder, asks, keep_code(run.folder.path))
    write_whole(run.folder.path / SCRIPT, script.encode())


def script_of(folder: RunFolder, asks: RayConfig, code: Path) -> str:
    """The script of a run. Raises ConfigError where there is no such file as it is to begin with."""
    variables = {name: os.environ[name] for name in FORWARDED if os.environ.get(name)}
    values = {"code": str(code.resolve()), "variables": variables, "python": asks.python or sys.executable}
    return fill(TEMPLATES / SCRIPT, "launch.ray.env_file", asks.env_file, values)


def fill(template: Path, key: str, env_file: str | None, values: Mapping[str, object]) -> str:
    """A script made of a template, whose values stand in it as words of a shell. key: that names env_file.

    Raises ConfigError where there is no such env_file, or where a value is none that a script can hold.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["sh"] = shlex.quote
    path = None
    if env_file is not None:
        try:
            path = Path(env_file).expanduser().resolve()
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"{key}: {env_file!r} is no path ({error}); write another, or leave it empty") from None
        if not path.is_file():
            raise ConfigError(f"{key}: there is no file {path}; write it, or leave env_file empty")
    places = {"cwd": str(Path.cwd()), "env_file": None if path is None else str(path)}
    text = environment.get_template(template.name).render(places | dict(values))
    strange = next((line for line in text.split("\n") if _STRANGE.search(line)), None)
    if strange is not None:
        raise ConfigError(f"no script can hold the line {strange!r}, with a NUL or bytes that are no text; change it")
    return text


def _manifest(folder: RunFolder, launch: LaunchConfig) -> str:
    """The RayJob of a run."""
    import importlib.metadata

    asks, path = launch.ray, folder.path.resolve()
    if asks.image is None:
        raise ConfigError("launch.ray.image is empty; name the container image that holds Python and what it needs")
    name, _, mount = (asks.claim or "").partition(":")
    worker = Worker(
        image=asks.image, cpus=math.ceil(asks.cpus_per_rank), gpus=int(asks.gpus), memory=asks.memory,
        claim=(name, mount) if asks.claim else None,
    )  # fmt: skip
    words = ["bash", str(path / SCRIPT), "launcher.on_ray", str(path)]
    ranks = (launch.ray.min_ranks or launch.ranks, launch.ranks)
    return kuberay.manifest(folder.name, words, ranks, worker, importlib.metadata.version("ray"))
