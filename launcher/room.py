"""A run that waits for room on its cluster: says so, and can be asked to stop although it has no rank to hear that."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pretrain.run_folder import RunFolder

TOLD_AFTER_S = 30.0
LOOK_S = 1.0


class Waiting(threading.Thread):
    """Watches the history of a run from now on, until it is told that this is over.

    wanted: what there must be room for, in words. leave: ends the run; called where somebody asks for that meanwhile.
    """

    def __init__(self, folder: RunFolder, wanted: str, leave: Callable[[], None]) -> None:
        super().__init__(daemon=True, name="waiting")
        self._folder, self._wanted, self._leave = folder, wanted, leave
        self._began, self._over = time.time(), threading.Event()

    def run(self) -> None:
        """Look once a second."""
        told: float | None = None
        while not self._over.wait(LOOK_S):
            since = self.since()
            if since is None:
                continue
            if self._folder.stop_request.exists():
                self._leave()
                return
            if since != told and time.time() - since > TOLD_AFTER_S:
                told = since
                self._folder.event(
                    "warning", f"the cluster has no room for {self._wanted}; the run waits until there is, or until"
                    " `leviathan stop` ends it",
                )  # fmt: skip

    def since(self) -> float | None:
        """When the run began to wait, in seconds since the epoch; None while ranks are at work."""
        for event in reversed(self._folder.history()):
            if event["time"] < self._began:
                break
            if event["event"] in ("launch", "restart"):
                return None if event["event"] == "launch" else float(event["time"])
        return self._began

    def close(self) -> None:
        """Look no more."""
        self._over.set()
