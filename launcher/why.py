"""`leviathan why RUN`: one sentence that says why a run stopped, or that it goes on or is done, and what to do."""

from __future__ import annotations

import time

from configs.errors import CANNOT_GO_ON, DATA_INVALID, INTERRUPTED, PREEMPTED, USAGE, WRONG_CONFIG
from launcher.jobs import log_of
from launcher.ray_jobs import UNKNOWN
from launcher.runs import State, exit_notes, state_of, tail_text
from launcher.screen import harmless, make_terminal
from launcher.status import event_line, place
from pretrain.amounts import duration
from pretrain.run_folder import Record

LOG_LINES = 30


def show_why(run: str, verbose: bool) -> None:
    """Print the sentence; `verbose` adds the last events and the end of the guilty rank's log."""
    state = state_of(run)
    terminal = make_terminal()
    terminal.print(harmless(why(state)), soft_wrap=True)
    if not verbose:
        return
    terminal.print("\nlast events", style="bold")
    for event in state.history[-12:]:
        terminal.print(event_line(event), soft_wrap=True)
    rank = guilty_rank(state)
    path = state.folder.log_of(rank)
    lines = tail_text(path, 1 << 16).splitlines()[-LOG_LINES:]
    terminal.print(f"\nend of {path}", style="bold", soft_wrap=True)
    terminal.print(harmless("\n".join(lines)) or "(it is empty)", soft_wrap=True)


def why(state: State) -> str:
    """The sentence."""
    name = state.folder.name
    if state.owner is not None:
        return _running(state)
    if state.job is not None and state.job.state == UNKNOWN:
        return f"nobody knows whether {name} still waits in a queue: {state.job}"
    if state.what == "waiting":
        return f"{name} waits in the queue ({state.job}); nothing to do but wait, or `leviathan stop {name}`"
    if state.what == "never began" and state.job is not None:
        return (
            f"{name} never began: its job ended before it could ({state.job}); see {log_of(state.folder)}, then submit"
            " it again"
        )
    if state.what == "never began":
        return f"{name} never began: its folder was prepared {_ago(state)}, and nothing started; run `leviathan train`"
    if state.ending is None:
        return _killed(state)
    if state.what == "done":
        return (
            f"{name} is done: it was trained to step {state.ending['step']:,} {_ago(state)}; look at it with"
            f" `leviathan report {name}` or `leviathan eval {name}`"
        )
    code = int(state.ending.get("code", CANNOT_GO_ON))
    if code in (PREEMPTED, INTERRUPTED):
        return _asked(state, code)
    return _failed(state, code)


def guilty_rank(state: State) -> int:
    """The rank that failed first, as far as anybody knows."""
    for event in reversed(state.history):
        if event["event"] == "fault" and isinstance(event.get("rank"), int):
            return int(event["rank"])
    notes = exit_notes(state)
    return int(notes[0]["rank"]) if notes else 0


def _running(state: State) -> str:
    assert state.owner is not None
    total = f" of {state.total:,}" if state.total else ""
    quiet = time.time() - state.active
    silence = f", its last sign of life {duration(quiet)} ago" if quiet > 60 else ""
    return (
        f"{state.folder.name} is running ({place(state.owner)}), at step {state.step:,}{total}{silence}; nothing to do"
        f" but watch: `leviathan status {state.folder.name}`"
    )


def _killed(state: State) -> str:
    """No word of an end and nobody there: the supervisor itself was killed."""
    notes = exit_notes(state)
    said = f"; rank {notes[0]['rank']} had ended with: {_sentence(notes[0]['message'])}" if notes else ""
    return (
        f"{state.folder.name} lost its supervisor without a word {_ago(state)}, at step {state.step:,} (killed with"
        f" SIGKILL, out of memory, or the machine went down){said}; {_again(state)}"
    )


def _asked(state: State, code: int) -> str:
    name = state.folder.name
    signals = [event for event in _last_attempt(state) if event["event"] == "signal"]
    sent = signals[0].get("signal", "a signal") if signals else None
    left = next((event for event in reversed(_last_attempt(state)) if "left after step" in event["message"]), None)
    if code == PREEMPTED:
        how = f"was preempted ({sent or 'SIGTERM'})"
    else:
        how = "was interrupted with Ctrl-C" if sent == "SIGINT" else "was stopped by `leviathan stop`"
    if left is not None:
        return f"{name} {how} {_ago(state)} and left after step {left['step']:,} (exit {code}); {_again(state)}"
    return f"{name} {how} {_ago(state)} and did not finish saving in time (exit {code}); {_again(state)}"


def _failed(state: State, code: int) -> str:
    assert state.ending is not None
    cause = _sentence(str(state.ending["message"])).removeprefix("stopped: ")
    kinds = {
        USAGE: "was called wrongly",
        WRONG_CONFIG: "stopped because its configuration does not fit",
        DATA_INVALID: "stopped because its data or a checkpoint is not valid",
    }
    begin = f"{state.folder.name} {kinds.get(code, 'gave up')} {_ago(state)} at step {state.step:,} (exit {code})"
    return f"{begin}: {cause}{_advice(state, code, cause)}"


def _advice(state: State, code: int, cause: str) -> str:
    """What to do, where the cause does not say it itself."""
    name = state.folder.name
    if code in (USAGE, WRONG_CONFIG, DATA_INVALID):
        return ""
    if "checkpoints could not be written" in cause:
        failed = [event for event in state.history if event["event"] == "save_failed"]
        return f"; the last one: {_sentence(str(failed[-1]['message']))}" if failed else ""
    if "not finite" in cause or "lost the lease" in cause:
        return ""
    if "SIGKILL" in cause:
        return (
            f"; give each rank less to hold (train.micro_rows, engine.zero, engine.activation_checkpointing); "
            f"{_again(state)}"
        )
    if "no progress for" in cause:
        return f" (`leviathan logs {name} --rank {guilty_rank(state)}` shows this rank's); {_again(state)}"
    return f"; `leviathan why {name} --verbose` shows the end of its log"


def _last_attempt(state: State) -> list[Record]:
    """The events since the run was last started by somebody, restarts by its supervisor included."""
    starts = [n for n, event in enumerate(state.history) if event["event"] == "launch"]
    return state.history[starts[-1] :] if starts else []


def _again(state: State) -> str:
    """What goes on with the run, from where, and what is lost."""
    goes_on = f"the same `leviathan {state.folder.facts().get('verb', 'train')}` command goes on"
    if not state.saved:
        return f"{goes_on} from the beginning, since nothing was saved"
    redo = state.step - state.saved
    return f"{goes_on} from step {state.saved:,}" + (f", doing {redo:,} steps again" if redo > 0 else "")


def _ago(state: State) -> str:
    return f"{duration(max(0.0, time.time() - state.active))} ago"


def _sentence(message: str) -> str:
    """A message in one line, to stand in the middle of a sentence."""
    return "; ".join(line.strip() for line in message.strip().splitlines())
