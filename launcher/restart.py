"""Whether to start a run again: one pure function of its history and of how it ended. No other place decides this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from configs.errors import CANNOT_GO_ON, FINAL, PREEMPTED

NO_PROGRESS_LIMIT = 3


@dataclass(frozen=True)
class Attempt:
    """One life of a run.

    began: newest checkpoint when it started (0: none). committed: newest when it ended. code: its exit code, 128 + n
    for signal n. cause: one sentence.
    """

    began: int
    committed: int
    code: int
    cause: str


@dataclass(frozen=True)
class Decision:
    """retry: start again after wait_s. give_up: end with `code`. reason: one sentence."""

    action: Literal["retry", "give_up"]
    reason: str
    wait_s: float = 0.0
    code: int = CANNOT_GO_ON


def decide(history: Sequence[Attempt], max_restarts: int | None = None) -> Decision:
    """What to do after the last attempt of `history`, which did not end well.

    A run goes on as long as its checkpoints advance. Codes that no restart can mend end it at once; so do
    NO_PROGRESS_LIMIT attempts in a row without a new checkpoint. Waits grow only while there is no progress.
    """
    last = history[-1]
    if last.code in FINAL or last.code == PREEMPTED:
        return Decision("give_up", last.cause, code=last.code)
    stuck = 0
    for attempt in reversed(history):
        if attempt.committed > attempt.began:
            break
        stuck += 1
    if stuck >= NO_PROGRESS_LIMIT:
        return Decision(
            "give_up",
            f"{stuck} attempts in a row ended without a new checkpoint after step {last.committed}; the last one:"
            f" {last.cause}",
        )
    if max_restarts is not None and len(history) > max_restarts:
        return Decision("give_up", f"launch.max_restarts is {max_restarts}, and the run failed once more: {last.cause}")
    return Decision("retry", last.cause, wait_s=0.0 if stuck == 0 else float(2 ** (stuck - 1)))
