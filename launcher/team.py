"""The ranks of a run, wherever they are: what a supervisor needs to start, watch, ask and end them."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod

from launcher.config import LaunchConfig
from launcher.screen import cores
from pretrain.health import Beat
from pretrain.run_folder import RunFolder


class Team(ABC):
    """All ranks of one attempt after the other. Exit codes are those of processes: -n for a death by signal n."""

    def __init__(self, folder: RunFolder, launch: LaunchConfig) -> None:
        self.folder, self.launch, self.world = folder, launch, launch.ranks

    @property
    @abstractmethod
    def place(self) -> str:
        """Where the ranks are, for people."""

    @property
    def start_of_job(self) -> tuple[str, int] | None:
        """The job that a cluster started, and which of its starts this is; None where nobody starts it again."""
        return None

    def missing(self) -> str | None:
        """What has to be there before ranks can start again, and is not, in a sentence; None where all is there."""
        return None

    def patience(self, number: int) -> float:
        """Seconds that ranks have to save in after a signal has asked them to leave."""
        return self.launch.grace_s

    @abstractmethod
    def start(self, attempt: int, fence: int) -> None:
        """Start every rank; what an earlier attempt left behind says nothing of them."""

    @abstractmethod
    def ended(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended."""

    @abstractmethod
    def beats(self) -> dict[int, Beat | None]:
        """The last sign of life of every rank; None before the first."""

    @abstractmethod
    def frozen(self) -> set[int]:
        """Ranks that somebody has stopped (SIGSTOP), as far as that can be known."""

    @abstractmethod
    def host(self, number: int) -> str:
        """The host of a rank."""

    @abstractmethod
    def who(self, number: int) -> str:
        """A rank for people: its number, process and host."""

    @abstractmethod
    def send(self, number: int) -> None:
        """Send a signal to every rank that lives."""

    @abstractmethod
    def end(self) -> None:
        """Kill what is left of the ranks, and what they left behind."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing of the team itself behind."""


def common_environment(world: int, attempt: int, fence: int) -> dict[str, str]:
    """What every rank is told by its environment, wherever it is."""
    return {
        "WORLD_SIZE": str(world),
        "LEVIATHAN_ATTEMPT": str(attempt),
        "LEVIATHAN_FENCE": str(fence),
        "LEVIATHAN_NONCE": secrets.token_hex(16),
        "PYTHONUNBUFFERED": "1",
    }


def forget_exits(folder: RunFolder, world: int) -> None:
    """Remove the notes of why ranks ended."""
    for number in range(world):
        folder.exit_of(number).unlink(missing_ok=True)


def threads_of(ranks_here: int) -> dict[str, str]:
    """The cores of this process dealt to the ranks that share them."""
    return {"OMP_NUM_THREADS": str(max(1, cores() // ranks_here))}
