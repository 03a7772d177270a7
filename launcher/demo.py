"""`make demo`: text to a trained ensemble on this machine, a rank killed on the way, the proof that it cost nothing.

Every part is the command a user would type; between them this only tells what happens. Four modules are trained alone
and joined; the control joins the same modules and trains them with nothing happening to it: every loss and every byte
of the final state are compared.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.rule import Rule

from configs.errors import LeviathanError
from launcher.prepare import resolve
from pretrain.config import total_steps
from pretrain.run_folder import RunFolder, read_lines

OUT = Path("demo-out")
PROMPT = "def "
PICTURE = Path("relevance.png")
LATER = 7
"""Steps beyond those that a module alone is trained: only the joint run comes so far, and not to a checkpoint."""
CONFIG = "demo"


class DemoFailedError(LeviathanError):
    """A part of the demo did not do what it shows."""


def main() -> int:
    """Run all parts; return the exit code."""
    screen = Console(highlight=False)
    began = time.monotonic()
    OUT.mkdir(exist_ok=True)
    os.chdir(OUT)
    shutil.rmtree("runs", ignore_errors=True)
    config, _ = resolve([CONFIG], [])
    steps, modules = total_steps(config), config.model.ensemble.modules
    kill_at = config.modules.steps + LATER
    try:
        _part(screen, "1. four kinds of text become shards", "data", "build", CONFIG)
        _part(screen, f"2. four modules alone, then joined; at step {kill_at} of that rank 1 is killed (SIGKILL)",
              "ensemble", CONFIG, env={"LEVIATHAN_FAULT": f"step.before_update:1:{kill_at - 1}"})  # fmt: skip
        _part(screen, "3. the control: the same modules joined, with nothing happening", "train", CONFIG,
              "run.name=control", "log.wandb=off", *(f"--from={name}=demo-{name}" for name in modules))  # fmt: skip
        killed = RunFolder(Path("runs/demo"))
        _prove(screen, killed, RunFolder(Path("runs/control")), steps)
        _part(screen, "4. how good it is on text it never saw, by module", "eval", "demo", "--rows", "64")
        _draw(killed)
        text = _part(screen, "5. what it writes", "generate", "demo", "--prompt", PROMPT, "--tokens", "300",
                     "--temperature", "0.8", "--seed", "1", keep=True)  # fmt: skip
        killed.event("sample", "what it writes", prompt=PROMPT, text=text.removeprefix(PROMPT), step=steps)
        _part(screen, "6. the report", "report", "demo", "--out", "report.html")
    except LeviathanError as error:
        screen.print(f"[bold red]{error}[/bold red]")
        return error.exit_code
    screen.print(Rule())
    minutes = (time.monotonic() - began) / 60
    screen.print(
        f"done in {minutes:.1f} minutes. Look at [bold]{Path.cwd() / 'report.html'}[/bold] and [bold]{PICTURE}[/bold]"
    )
    return 0


def _part(screen: Console, title: str, *words: str, env: dict[str, str] | None = None, keep: bool = False) -> str:
    """Run one command, as a user would type it; with `keep`, return what it printed once it is printed."""
    screen.print()
    screen.print(Rule(title, align="left"))
    screen.print(f"[dim]$ leviathan {' '.join(words)}[/dim]")
    sys.stdout.flush()
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *words], env=os.environ | (env or {}), text=True, check=False,
        stdout=subprocess.PIPE if keep else None,
    )  # fmt: skip
    if keep:
        print(done.stdout, end="", flush=True)
    if done.returncode:
        raise DemoFailedError(
            f"`leviathan {' '.join(words)}` ended with {done.returncode}; `leviathan doctor` may say why"
        )
    return done.stdout or ""


def _prove(screen: Console, killed: RunFolder, control: RunFolder, steps: int) -> None:
    """Compare the killed run with the control, to the last bit, and say it."""
    kinds = [record["event"] for record in killed.history()]
    if "fault" not in kinds or "restart" not in kinds:
        raise DemoFailedError("no rank died: there is nothing to prove (see runs/demo/events.jsonl)")
    a, b = ({step: row["loss"].hex() for step, row in run.steps().items()} for run in (killed, control))
    if len(a) != steps or a != b:
        first = next((step for step in range(1, steps + 1) if a.get(step) is None or a.get(step) != b.get(step)), None)
        raise DemoFailedError(f"the losses differ from the control's, first at step {first}")
    states = [_final_state(run, steps) for run in (killed, control)]
    if states[0] != states[1]:
        raise DemoFailedError("the final state differs from the control's although no loss does")
    restart = next(record for record in killed.history() if record["event"] == "restart")
    proof = (
        f"proved: rank 1 was killed, the run went on from step {restart['step']} by itself and did {restart['redo']}"
        f" steps again; all {steps} losses equal the control's to the last bit (step {steps}: {a[steps]}), and so does"
        " every byte of the final parameters and moments"
    )
    killed.event("proof", proof)
    screen.print()
    screen.print(f"[bold green]{proof}[/bold green]")


def _draw(run: RunFolder) -> None:
    """Relevance of each module to each kind of text, as the newest evaluation has it."""
    from pretrain.ensemble.relevance import judged
    from pretrain.plots import relevance_png

    *_, newest = read_lines(run.evals)
    PICTURE.write_bytes(relevance_png(judged(newest)))


def _final_state(run: RunFolder, steps: int) -> list[str]:
    from pretrain.checkpoint_files import newest_readable

    return [note["sha256"] for note in newest_readable(run, steps).facts["files"]]


if __name__ == "__main__":
    sys.exit(main())
