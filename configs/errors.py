"""What can go wrong because of the user's files, machine or words, and the exit code each kind ends with.

Every message is one sentence that says what is wrong, what was found, and what to do. The command line prints it
without a traceback; anything else that is raised is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from typing import ClassVar

DONE = 0
USAGE = 2
DATA_INVALID = 65
CANNOT_GO_ON = 70
PREEMPTED = 75
WRONG_CONFIG = 78
INTERRUPTED = 130

FINAL = frozenset({DONE, USAGE, DATA_INVALID, CANNOT_GO_ON, WRONG_CONFIG, INTERRUPTED})
"""Exit codes after which nobody may start the run again by themselves."""


class LeviathanError(Exception):
    """A mistake or a fault that we can explain; `exit_code` is what the process ends with."""

    exit_code: ClassVar[int] = 1


class UsageError(LeviathanError):
    """The command was called with words that make no sense together."""

    exit_code = USAGE


class ConfigError(LeviathanError):
    """The configuration is wrong, or does not fit the machine or the run folder."""

    exit_code = WRONG_CONFIG


class DataError(LeviathanError):
    """Shards, tokenizer or checkpoint are missing, damaged or do not belong together."""

    exit_code = DATA_INVALID


class CannotGoOnError(LeviathanError):
    """The run diverged, or failed in the same way again and again."""

    exit_code = CANNOT_GO_ON
