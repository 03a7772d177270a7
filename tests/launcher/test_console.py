"""The live view: what it says on a terminal and off it, what it survives, what it costs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as Terminal

from launcher.console import REDRAW_EVERY_S, Console
from pretrain.run_folder import Record, RunFolder, append_line


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "a-run")
    made.make()
    return made


def screen(*, terminal: bool = False) -> Terminal:
    colours = "standard" if terminal else None
    return Terminal(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False, color_system=colours)


def said(terminal: Terminal) -> str:
    assert isinstance(terminal.file, io.StringIO)
    return terminal.file.getvalue()


def row(step: int, at: float, attempt: int = 0, **other: Any) -> Record:
    made = {
        "step": step, "attempt": attempt, "time": at, "loss": 3.25, "lr": 6e-4, "grad_norm": 0.5, "skipped": False,
        "tokens": step * 1000, "tokens_per_s": 103_000.0, "step_s": 0.5, "data_s": 0.001, "mfu": 0.391,
        "memory_mib": 2150.0, "source_loss": {},
    }  # fmt: skip
    return made | other


def test_off_a_terminal_there_is_a_plain_line_about_every_ten_seconds(folder: RunFolder, clock: Clock) -> None:
    terminal = screen()
    console = Console(folder, 100, terminal=terminal, clock=clock)
    for step in range(1, 61):
        clock.now += 0.5
        append_line(folder.metrics, row(step, clock.now))
        console.poll()
    lines = said(terminal).splitlines()
    assert len(lines) == 3
    assert lines[-1].startswith("step 60/100 (60%)  loss 3.2500  grad 0.5  lr 6.00e-04  tokens/s 103k  MFU 39.1%")
    assert lines[-1].endswith("memory 2.1 GiB  left 20 s")
    assert "\x1b" not in said(terminal)


def test_every_event_and_evaluation_is_told_at_once(folder: RunFolder, clock: Clock) -> None:
    terminal = screen()
    console = Console(folder, 100, terminal=terminal, clock=clock)
    folder.event("fault", "rank 1 on node-1 was killed")
    figures = {"loss": 3.0, "perplexity": 20.0, "bits_per_byte": 1.25, "tokens": 10}
    append_line(
        folder.evals, {"step": 50, "attempt": 0, "time": clock.now, "sources": {}, "by_position": [], **figures}
    )
    folder.event("sample", "", prompt="Once", text="upon\na time")
    console.poll()
    text = said(terminal)
    assert "fault      rank 1 on node-1 was killed" in text
    assert "held-out   step 50: loss 3.0000, 1.2500 bits per byte" in text
    assert "Once → upon a time" in text
    console.poll()
    assert said(terminal) == text


def test_faults_and_recoveries_stand_out_on_a_terminal(folder: RunFolder, clock: Clock) -> None:
    terminal = screen(terminal=True)
    with Console(folder, 100, terminal=terminal, clock=clock) as console:
        for kind in ("fault", "resume", "launch"):
            folder.event(kind, f"about {kind}")
        console.poll()
    text = said(terminal)
    assert "\x1b[1;31mabout fault" in text
    assert "\x1b[1;32mabout resume" in text
    assert "\x1b[1mlaunch     \x1b[0mabout launch\n" in text


def test_a_terminal_shows_progress_the_attempt_and_what_is_unusual(folder: RunFolder, clock: Clock) -> None:
    terminal = screen(terminal=True)
    with Console(folder, 100, terminal=terminal, clock=clock) as console:
        clock.now += REDRAW_EVERY_S
        console.poll()
        assert "starting, 1.0 s" in said(terminal)
        append_line(folder.metrics, row(40, clock.now, data_s=0.2))
        console.poll()
        assert "40/100  40%" in said(terminal)
        assert "waits for data" in said(terminal)
        append_line(folder.metrics, row(21, clock.now, attempt=1, skipped=True, grad_norm=None, mfu=None))
        console.poll()
    assert "a-run, attempt 2" in said(terminal)
    assert "skipped" in said(terminal)
    assert said(terminal).rstrip().splitlines()[-1].endswith("left ?")


def test_a_line_that_is_still_being_written_waits_and_damage_is_passed_over(folder: RunFolder, clock: Clock) -> None:
    terminal = screen()
    console = Console(folder, 100, terminal=terminal, clock=clock)
    line = json.dumps({"time": clock.now, "attempt": 0, "event": "resume", "message": "goes on"})
    with open(folder.events, "a", buffering=1) as file:
        file.write('{"torn\n' + line[:20])
        file.flush()
        console.poll()
        assert said(terminal) == ""
        file.write(line[20:] + "\n")
    console.poll()
    assert said(terminal).count("goes on") == 1


def test_a_file_that_was_replaced_is_read_from_its_start(folder: RunFolder, clock: Clock) -> None:
    folder.event("start", "of old, and long enough to be longer than what comes")
    terminal = screen()
    console = Console(folder, 100, terminal=terminal, clock=clock)
    folder.events.unlink()
    console.poll()
    folder.event("start", "of new")
    console.poll()
    assert "of new" in said(terminal)
    assert "of old" not in said(terminal)


def test_text_of_a_run_cannot_steer_the_terminal(folder: RunFolder, clock: Clock) -> None:
    terminal = screen()
    console = Console(folder, 100, terminal=terminal, clock=clock)
    folder.event("fault", "\x1b[2J\x1b]0;owned\x07 [bold red]x[/] \u202e")
    console.poll()
    assert "\x1b" not in said(terminal)
    assert "[bold red]x[/]" in said(terminal)


def test_four_polls_a_second_cost_less_than_two_percent_of_a_core(folder: RunFolder, clock: Clock) -> None:
    console = Console(folder, 10_000, terminal=screen(terminal=True), clock=clock)
    costs = []
    for poll in range(100):
        for step in range(10):
            append_line(folder.metrics, row(10 * poll + step + 1, clock.now))
        clock.now += 0.25
        began = time.process_time()
        console.poll()
        costs.append(time.process_time() - began)
    console.close()
    assert 4 * sum(costs) / len(costs) < 0.02


def test_the_view_needs_no_torch() -> None:
    program = "import sys, launcher.console; print({'torch', 'matplotlib', 'wandb', 'ray'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
