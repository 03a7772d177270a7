"""The `leviathan` command: verbs only. Each imports what it needs when it is called, so that `--help` is instant."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from configs.errors import INTERRUPTED, ConfigError, LeviathanError, UsageError
from launcher.cli_data import data
from launcher.cli_words import Run, Words, split, verbs

app = typer.Typer(
    add_completion=False,
    invoke_without_command=True,
    help="Pretrain attention alternatives: proved causal, compared fairly, resumed to the bit.",
    epilog="Begin with: leviathan data build demo; leviathan check demo; leviathan ensemble demo",
    pretty_exceptions_enable=False,
)
submit = typer.Typer(invoke_without_command=True, help="Give a run to a cluster's queue.")
mixers = typer.Typer(invoke_without_command=True, help="List all token mixers; certify them; begin one of your own.")

PREPARE, TRAIN, USE = "Before a run", "Runs", "Trained models"
Ranks = Annotated[int | None, typer.Option(min=1, help="Processes, one a device; instead of launch.ranks.")]
Branch = Annotated[
    list[str] | None,
    typer.Option("--from", help="RUN or RUN@STEP to begin a new run from; of an ensemble MODULE=RUN for each."),
]
Allow = Annotated[list[str] | None, typer.Option(help="A key that may differ from the run's beginning.")]
Without = Annotated[list[str] | None, typer.Option(metavar="MODULE", help="Of an ensemble: leave it out.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the job's script; submit and write nothing.")]
StepOf = Annotated[int | None, typer.Option(help="The checkpoint of this step; left out: the newest that is whole.")]


submit.callback()(verbs)


@app.callback()
def leviathan(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Answer what is asked without a verb."""
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"leviathan {version_of('leviathan-pretrain')}")
        raise typer.Exit
    verbs(context)


@app.command(rich_help_panel=PREPARE)
def doctor(
    words: Annotated[list[str] | None, typer.Argument(metavar="CONFIG | KEY=VALUE", help="As for a job.")] = None,
    nodes: Annotated[bool, typer.Option("--nodes", help="Test every node of the Slurm job that this is in.")] = False,
) -> None:
    """Test this machine: versions, processors, memory, disk, clock, network between ranks; say what to do."""
    if nodes:
        from launcher.doctor_nodes import examine_nodes

        raise typer.Exit(examine_nodes(*split(words or [])))
    if words:
        raise UsageError(f"a configuration is looked at with --nodes alone; leave {words[0]!r} out")
    from launcher.doctor import examine

    raise typer.Exit(examine(Path.cwd()))


app.add_typer(data, name="data", rich_help_panel=PREPARE)


@app.command(rich_help_panel=PREPARE)
def check(words: Words, ranks: Ranks = None) -> None:
    """Build everything without memory and say what a run would be, cost and need; trains and writes nothing."""
    from launcher.check import check_run

    files, values = split(words)
    check_run(files, values, ranks)


app.add_typer(mixers, name="mixers", rich_help_panel=PREPARE)


@mixers.callback()
def mixers_list(context: typer.Context) -> None:
    """List all token mixers: equation, source, cost, state, and what each promises."""
    if context.invoked_subcommand is None:
        from launcher.mixers import list_mixers

        list_mixers()


@mixers.command("check")
def mixers_check(
    mixer: Annotated[str | None, typer.Argument(metavar="NAME | FILE", help="A mixer, or a .py file of yours.")] = None,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Its options where they differ: corr=iir.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every mixer that comes along, a row each.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: a list of verdicts.")] = False,
) -> None:
    """Certify a mixer: try every promise, and exit 1 if one is broken."""
    if (mixer is None) != every:
        raise UsageError("`leviathan mixers check` takes one NAME or FILE, or --all; give one of them")
    from launcher.mixers import check_all, check_mixer

    if mixer is None:
        check_all(as_json=as_json)
    else:
        check_mixer(mixer, options or (), as_json=as_json)


@mixers.command("new")
def mixers_new(name: Annotated[str, typer.Argument(metavar="NAME", help="For example my_mixer.")]) -> None:
    """Write NAME.py, a small mixer that works, and NAME.yaml, which trains it; then edit."""
    from launcher.mixers import new_mixer

    new_mixer(name)


@app.command(rich_help_panel=TRAIN)
def train(
    words: Words,
    ranks: Ranks = None,
    branch: Branch = None,
    allow: Allow = None,
) -> None:
    """Train here, under a supervisor; go on where the run was, if it was begun before."""
    from launcher.train import train_here

    files, values = split(words)
    raise typer.Exit(train_here(files, values, ranks=ranks, branch=branch or [], allow=allow or []))


@app.command(rich_help_panel=TRAIN)
def ensemble(
    words: Words,
    ranks: Ranks = None,
    without: Without = None,
) -> None:
    """Train each module of an ensemble alone, then all of them joined; go on wherever that was."""
    from launcher.ensemble import train_ensemble

    files, values = split(words)
    raise typer.Exit(train_ensemble(files, values, ranks=ranks, without=without or []))


app.add_typer(submit, name="submit", rich_help_panel=TRAIN)


@submit.command("slurm")
def submit_slurm(
    words: Words,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines; instead of launch.nodes.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Of all nodes; else one a GPU, or launch.ranks.")] = None,
    branch: Branch = None,
    allow: Allow = None,
    after: Annotated[list[str] | None, typer.Option(metavar="JOB", help="A job that must be done before.")] = None,
    without: Without = None,
    dry_run: DryRun = False,
) -> None:
    """Train in a Slurm job, queued again before its time is over; sweep.KEY=A,B,C is a job for each value."""
    from launcher.submit import Asked
    from launcher.submit import submit_slurm as submit_run

    files, values = split(words)
    asked = Asked(nodes, ranks, branch or [], allow or [], after or [], without or [])
    submit_run(files, values, asked, dry_run=dry_run)


@submit.command("ray")
def submit_ray(
    words: Words,
    address: Annotated[
        str | None, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Of its dashboard: http://10.0.0.1:8265.")
    ] = None,
    ranks: Ranks = None,
    branch: Branch = None,
    allow: Allow = None,
    without: Without = None,
    dry_run: DryRun = False,
    kuberay: Annotated[bool, typer.Option("--kuberay", help="Print a RayJob for Kubernetes; submit nothing.")] = False,
) -> None:
    """Train in a job of a Ray cluster, which mends what nodes and workers it loses; again: attach to that job."""
    from launcher.submit_ray import submit_ray as submit_run

    if dry_run and kuberay:
        raise UsageError("--dry-run and --kuberay exclude each other; give one of them")
    files, values = split(words)
    values += [] if ranks is None else [f"launch.ranks={ranks}"]
    mode = "print" if dry_run else "kuberay" if kuberay else "submit"
    lists = (branch or [], allow or [], without or [])
    raise typer.Exit(submit_run(files, values, address, *lists, mode=mode))


@app.command(rich_help_panel=TRAIN)
def status(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="One run in detail; left out: all runs.")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Folder of all runs.")] = Path("runs"),
) -> None:
    """Show which runs there are, where they run, how far they are and how they ended."""
    from launcher.status import show_all, show_one

    if run is None:
        show_all(folder)
    else:
        show_one(run, folder)


@app.command(rich_help_panel=TRAIN)
def logs(
    run: Run,
    rank: Annotated[int, typer.Option(min=0, help="Whose output.")] = 0,
    lines: Annotated[int, typer.Option(min=0, help="The last so many lines; 0: all.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
) -> None:
    """Print what a rank printed."""
    from launcher.status import show_log

    show_log(run, rank, lines=lines, follow=follow)


@app.command(rich_help_panel=TRAIN)
def stop(
    run: Run, timeout: Annotated[float, typer.Option(min=0, help="The longest to wait, in seconds.")] = 600.0
) -> None:
    """Ask a run to finish its step, save and leave, and wait until it has."""
    from launcher.status import stop as stop_run

    stop_run(run, timeout)


@app.command(rich_help_panel=TRAIN)
def why(
    run: Run,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also events and the end of a log.")] = False,
) -> None:
    """Say in one sentence why a run stopped and what to do."""
    from launcher.why import show_why

    show_why(run, verbose)


@app.command("eval", rich_help_panel=USE)
def evaluate(
    run: Run,
    step: StepOf = None,
    rows: Annotated[str, typer.Option(metavar="N|all", help="Held-out rows of each source.")] = "256",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    without: Without = None,
) -> None:
    """Measure loss, perplexity and bits per byte on held-out text, by source, context, and module of an ensemble."""
    if rows != "all" and not (rows.isdigit() and int(rows)):
        raise UsageError(f"--rows {rows} is no number of rows; write for example 256, or all")
    from launcher.texts import evaluate_run

    most = None if rows == "all" else int(rows)
    evaluate_run(run, step=step, rows=most, device=device, without=without or [])


@app.command(rich_help_panel=USE)
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="How the text begins.")],
    tokens: Annotated[int, typer.Option(help="The most tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; 1 draws as the model says.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw among so many of the likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest that hold this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed draws the same text.")] = 0,
    step: StepOf = None,
) -> None:
    """Write text that goes on from a prompt, as it comes; nothing is recorded."""
    from launcher.texts import write_text
    from pretrain.generate import Sampling

    write_text(run, prompt, step=step, tokens=tokens, sampling=Sampling(temperature, top_k, top_p, seed))


@app.command(rich_help_panel=USE)
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="One run, or several to compare.")],
    out: Annotated[Path | None, typer.Option(help="The file; left out: report.html in the folder of the run.")] = None,
) -> None:
    """Write one HTML page with curves, history, evaluations and samples."""
    from launcher.texts import report_runs

    report_runs(runs, out)


def main() -> None:
    """Run the command line; one line for a mistake of the user's, a traceback only for ours."""
    try:
        code = app(standalone_mode=False, prog_name="leviathan")
    except LeviathanError as error:
        _tell(str(error))
        code = error.exit_code
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        verb = context.command_path if context is not None else "leviathan"
        _tell(f"{' '.join(error.format_message().split()).rstrip('.')}; see `{verb} --help`")
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except PermissionError as error:
        _tell(f"{error.filename}: {error.strerror}; change its permissions, or choose another place")
        code = ConfigError.exit_code
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _tell(f"{error.filename or 'this machine'}: {error.strerror}; free some, or choose another place")
        code = ConfigError.exit_code
    _leave(code or 0)


def _leave(code: int) -> NoReturn:
    """End this process at once: everything of ours is closed, and the threads of C++ libraries (torch, Arrow) now and
    then abort while the interpreter is torn down, which would turn any exit code into that of a crash."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _tell(message: str) -> None:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
