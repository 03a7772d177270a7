"""`leviathan status | logs | stop`: which runs there are and how they are, what a rank printed, a polite request."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rich.console import Console as Terminal
from rich.table import Table
from rich.text import Text

from configs.errors import INTERRUPTED, LeviathanError, UsageError
from data_pipeline.files import human_bytes
from launcher.branch import shown
from launcher.jobs import take_away
from launcher.runs import Owner, State, owners, read_state, state_of, tail
from launcher.screen import PLAIN_EVERY_S, harmless, make_facts, make_table, make_terminal, one_line, told
from pretrain.amounts import duration, short_number
from pretrain.run_folder import Record, RunFolder, counted, step_name

STYLES = {
    "running": "bold green",
    "waiting": "cyan",
    "done": "green",
    "stopped": "yellow",
    "failed": "bold red",
    "killed": "bold red",
}
_POLL_S = 0.25
_SHOWN_EVENTS = 8


def show_all(runs: Path) -> None:
    """Print a table of every run under `runs`, the one that told something last at the top."""
    folders = [RunFolder(path.parent) for path in runs.glob("*/run.json")]
    terminal = make_terminal()
    if not folders:
        terminal.print(f"no runs in {runs}/; start one with `leviathan train CONFIG`")
        return
    owned = owners(folders)
    states = [read_state(folder, owned.get(str(folder.path))) for folder in folders]
    table = make_table("run", "state", ">step", ">loss", ">tokens/s", ">left", ">last sign", "last event")
    for state in sorted(states, key=lambda state: -state.active):
        row = state.row or {}
        table.add_row(
            Text(harmless(state.folder.name), style="bold"), _what(state), _progress(state), _loss(row),
            short_number(row["tokens_per_s"]) if row else "–",
            "–" if state.left_s is None else duration(state.left_s),
            f"{duration(time.time() - state.active)} ago", told(_last_event(state), "dim"),
        )  # fmt: skip
    for column in table.columns:
        column.no_wrap = True
    # what is too long is cut in the last column only
    table.expand, table.columns[-1].ratio, table.columns[-1].overflow = True, 1, "ellipsis"
    terminal.print(table)


def show_one(run: str, runs: Path = Path("runs")) -> None:
    """Print all that is known of one run, by its name under `runs` or by its folder."""
    state = state_of(run, runs)
    terminal = make_terminal()
    terminal.print(_details(state))
    events = [event for event in state.history if event["event"] != "sample"][-_SHOWN_EVENTS:]
    if events:
        terminal.print("\nlast events", style="bold")
    for event in events:
        terminal.print(event_line(event), soft_wrap=True)
    if state.what in ("failed", "killed"):
        terminal.print(f"\n`leviathan why {state.folder.name}` says why it ended and what to do", soft_wrap=True)


def event_line(event: Record) -> Text:
    """An event as a line for people."""
    at = time.strftime("%m-%d %H:%M:%S", time.localtime(event["time"]))
    line = Text(f"{at}  ", style="dim")
    return line.append(f"{event['event']:<11} ", "bold").append(one_line(str(event.get("message", "")), 400))


def show_log(run: str, rank: int, *, lines: int, follow: bool) -> None:
    """Print the last `lines` lines of a rank (0: all), and with `follow` what it prints until the run ends."""
    folder = RunFolder.find(run)
    path = folder.log_of(rank)
    if not path.exists():
        known = sorted(int(p.stem[5:]) for p in folder.logs.glob("rank_*.log"))
        there = f"it has ranks {known[0]} to {known[-1]}" if known else "none of its ranks has started"
        raise UsageError(f"{folder.name} has no log of rank {rank}; {there}")
    terminal = make_terminal()
    with open(path, "rb") as file:
        text = file.read()
        shown = text.splitlines(keepends=True)[-lines:] if lines else [text]
        _print_raw(terminal, b"".join(shown))
        if follow:
            _follow(folder, file, terminal)


def stop(run: str, timeout_s: float) -> None:
    """Ask a running run to finish its step, save and leave; wait until it has, at most `timeout_s`.

    Raises UsageError where it does not run, LeviathanError where it is still running after that time.
    """
    state = state_of(run)
    name, folder = state.folder.name, state.folder
    if state.what == "waiting" and state.job is not None:
        take_away(folder)
        folder.event(
            "stop", f"stopped: {name} was taken from the queue ({state.job})", code=INTERRUPTED, step=state.saved
        )
        make_terminal().print(f"took {name} from the queue ({state.job})", soft_wrap=True)
        return
    if state.owner is None:
        raise UsageError(f"{name} is not running ({_short_ending(state)}), so there is nothing to stop")
    terminal = make_terminal()
    folder.stop_request.touch(mode=0o600)
    terminal.print(f"asked {name} ({place(state.owner)}) to finish its step, save and leave", soft_wrap=True)
    began = time.monotonic()
    with terminal.status("") as spinner:
        told_at = began
        while (state := state_of(run)).owner is not None:
            waited = time.monotonic() - began
            if waited > timeout_s:
                raise LeviathanError(
                    f"{name} is still at step {state.step:,} after {duration(waited)}, and the request stays; wait, or"
                    f" end it at once with `kill {state.owner.pid}` on {state.owner.host}"
                )
            spinner.update(told(f"waiting, {duration(waited)}; it is at step {state.step:,}"))
            if not terminal.is_terminal and time.monotonic() - told_at >= PLAIN_EVERY_S:
                told_at = time.monotonic()
                terminal.print(f"waiting, {duration(waited)}; it is at step {state.step:,}", soft_wrap=True)
            time.sleep(_POLL_S)
    saved = f"saved {step_name(state.saved)}" if state.saved else "it had not saved anything yet"
    what = "is done" if state.what == "done" else "has left"
    terminal.print(f"{name} {what} after step {state.step:,} ({duration(time.monotonic() - began)}); {saved}")


def place(owner: Owner) -> str:
    """`process 4711 here` or `process 4711 on node-3`."""
    return f"process {owner.pid} {'here' if owner.here else 'on ' + harmless(owner.host)}"


def _what(state: State) -> Text:
    style = STYLES.get(state.what, "dim")
    if state.owner is not None and not state.owner.here:
        return Text(f"running on {harmless(state.owner.host)}", style=style)
    code = state.ending.get("code") if state.ending is not None else None
    return Text(f"{state.what} ({code})" if state.what == "failed" and code else state.what, style=style)


def _progress(state: State) -> str:
    return f"{state.step:,}/{state.total:,}" if state.total is not None else f"{state.step:,}"


def _loss(row: Record) -> str:
    if not row:
        return "–"
    return "skipped" if row["skipped"] else f"{row['loss']:.4f}"


def _last_event(state: State) -> str:
    if not state.history:
        return ""
    event = state.history[-1]
    return one_line(f"{event['event']}: {event.get('message', '')}", 200)


def _short_ending(state: State) -> str:
    words = {"done": "it is done", "killed": "its supervisor was killed", "never began": "it never began"}
    return words.get(state.what, f"it {state.what} {duration(time.time() - state.active)} ago")


def _details(state: State) -> Table:
    """Names and values of all that is known."""
    folder, row, facts = state.folder, state.row, state.folder.facts()
    table = make_facts(title=f"{folder.name} in {folder.path}")
    where = f", {place(state.owner)} since {_date(state.owner.since)}" if state.owner is not None else ""
    where = f" ({state.job})" if state.job is not None else where
    table.add_row("state", _what(state).append(where, style="default"))
    share = f" ({state.step / state.total:.0%})" if state.total else ""
    left = "" if state.left_s is None else f", left {duration(state.left_s)}"
    table.add_row("step", f"{_progress(state)}{share}{left}")
    if row is not None:
        table.add_row("loss", f"{_loss(row)}, learning rate {row['lr']:.2e}")
        mfu = f", MFU {row['mfu']:.1%}" if row.get("mfu") is not None else ""
        seen = f"{short_number(row['tokens'])} tokens seen, {short_number(row['tokens_per_s'])} a second"
        table.add_row("speed", f"{seen}, {row['step_s']:.3g} s a step{mfu}, {row['memory_mib']:,.0f} MiB")
    for record in tail(folder.evals)[-1:]:
        bits = f", {record['bits_per_byte']:.4f} bits per byte" if record.get("bits_per_byte") is not None else ""
        table.add_row("held-out", f"loss {record['loss']:.4f}{bits} at step {record['step']:,}")
    table.add_row("checkpoints", _checkpoints(folder))
    if "parameters" in facts:
        table.add_row(
            "model", f"{short_number(facts['parameters'])} parameters on {counted(facts.get('ranks', 1), 'rank')}"
        )
    commit = (facts.get("code") or {}).get("commit")
    if commit:
        table.add_row("code", commit[:12] + (" with changes (code.patch)" if facts["code"].get("dirty") else ""))
    if "from" in facts:
        table.add_row("began from", harmless(shown(facts["from"])))
    table.add_row("created", f"{_date(facts['created'])}, last sign of life {_date(state.active)}")
    return table


def _checkpoints(folder: RunFolder) -> str:
    steps = folder.committed_steps()
    if not steps:
        return "none yet"
    files = (folder.checkpoints / step_name(steps[0])).glob("*")
    size = human_bytes(sum(path.stat().st_size for path in files))
    older = f"; before it {', '.join(f'{step:,}' for step in steps[1:6])}" if steps[1:] else ""
    more = f" and {len(steps) - 6} more" if len(steps) > 6 else ""
    return f"step {steps[0]:,} ({size}){older}{more}"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _print_raw(terminal: Terminal, text: bytes) -> None:
    """What a rank printed, with nothing in it that could steer the terminal."""
    if text:
        terminal.out(harmless(text.decode("utf-8", "replace").replace("\r\n", "\n")), end="", highlight=False)


def _follow(folder: RunFolder, file: BinaryIO, terminal: Terminal) -> None:
    """What comes after the end of a file, until nobody has the run any more."""
    for text in _growth(folder, file):
        _print_raw(terminal, text)


def _growth(folder: RunFolder, file: BinaryIO) -> Iterator[bytes]:
    looked, lives = time.monotonic(), bool(owners([folder]))
    while True:
        text = file.read()
        if text:
            yield text
        elif not lives:
            return
        if time.monotonic() - looked > 1.0:
            looked, lives = time.monotonic(), bool(owners([folder]))
        time.sleep(_POLL_S)
