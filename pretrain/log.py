"""What a run tells while it trains. Rank 0 writes; all other ranks keep silent."""

from __future__ import annotations

from typing import Any

from pretrain.engine import StepResult
from pretrain.metrics import JsonlSink, Meter, WandbMirror
from pretrain.run_folder import Record, RunFolder


class Log:
    """Rank 0's voice: a line a step, a line an evaluation, an event for what happens sometimes."""

    def __init__(self, folder: RunFolder, meter: Meter, mirror: WandbMirror | None) -> None:
        self._folder, self._meter, self._mirror = folder, meter, mirror
        self._sink = JsonlSink(folder.metrics)

    def step(self, step: int, result: StepResult, lr: float, step_s: float, data_s: float) -> None:
        """Tell a step's figures; `step` counts from 1."""
        row = self._meter.row(step, result, lr, step_s, data_s)
        self._sink.write(row)
        if self._mirror is not None:
            self._mirror.write(row)

    def evaluation(self, record: Record) -> None:
        """Tell the figures of an evaluation."""
        self._folder.append(self._folder.evals, record)
        if self._mirror is not None:
            self._mirror.write_eval(record)

    def event(self, kind: str, message: str, **facts: Any) -> None:
        """Tell what happened."""
        self._folder.event(kind, message, **facts)

    def close(self) -> None:
        """Have everything written; W&B gets some seconds and no more."""
        try:
            self._sink.close()
        except OSError as problem:
            # why the run ends matters more, and steps after the last checkpoint are done again
            self.event("warning", f"the last lines of metrics.jsonl could not be written ({problem.strerror})")
        if self._mirror is not None:
            self._mirror.close(20.0)


class Silence(Log):
    """Every other rank."""

    def __init__(self) -> None:
        pass

    def step(self, step: int, result: StepResult, lr: float, step_s: float, data_s: float) -> None:
        """Say nothing."""

    def evaluation(self, record: Record) -> None:
        """Say nothing."""

    def event(self, kind: str, message: str, **facts: Any) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Nothing to close."""
