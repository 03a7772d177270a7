"""The whole run, readable from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

from configs.errors import DONE, INTERRUPTED, PREEMPTED, CannotGoOnError
from data_pipeline.loader import Loader
from pretrain.checkpoint import CheckpointStore
from pretrain.engine import Engine, StepResult
from pretrain.health import Heartbeat, SkipJudge, StopRequests
from pretrain.log import Log
from pretrain.run_folder import Record


@dataclass(frozen=True)
class Plan:
    """From how many steps done to how many, and what happens how often; `eval_every` 0 is never.

    make_up: evaluate before the first step what an earlier start saved and did not live to evaluate.
    """

    start: int
    stop: int
    save_every: int
    eval_every: int
    max_skips: int
    highest_lr: float
    make_up: bool = False


def train(
    engine: Engine,
    loader: Loader,
    store: CheckpointStore,
    log: Log,
    plan: Plan,
    *,
    lr_scale: Callable[[int], float],
    evaluate: Callable[[int], Record],
    facts: Callable[[], dict[str, Any]],
    requests: StopRequests,
    heartbeat: Heartbeat,
) -> int:
    """Train from `plan.start` to `plan.stop` or until asked to leave; return the exit code.

    evaluate: the held-out loss after so many steps. facts: what a checkpoint tells besides the engine's state.
    """
    judge = SkipJudge(plan.max_skips)
    if plan.make_up:
        heartbeat.at("evaluate", plan.start)
        log.evaluation(evaluate(plan.start))
    for step in range(plan.start, plan.stop):
        done = step + 1
        heartbeat.at("data", done)
        began = perf_counter()
        batches = loader.next()
        waited = perf_counter() - began

        heartbeat.at("step", done)
        result = engine.step(batches, step, lr_scale(step), partial(_votes, requests, store))
        log.step(done, result, plan.highest_lr * lr_scale(step), perf_counter() - began, waited)
        if result.skipped:
            _tell_skip(log, loader, step, judge.in_a_row + 1, plan.max_skips)
        judge.judge(done, result.skipped)
        leaving = _leaving(result, store)

        if done % plan.save_every == 0 or done == plan.stop or leaving is not None:
            heartbeat.at("save", done)
            store.save(done, engine.state(), facts())
        if plan.eval_every and (done % plan.eval_every == 0 or done == plan.stop) and leaving is None:
            heartbeat.at("evaluate", done)
            log.evaluation(evaluate(done))
        if leaving is not None:
            return _leave(leaving, store, log, done)
    heartbeat.at("save", plan.stop)
    _finish_saving(store)
    if store.failures:
        raise CannotGoOnError(
            f"all {plan.stop} steps are done, but the last checkpoint could not be written (see the save_failed"
            " events); make room or fix the disk, then start the run again: it goes on after step"
            f" {store.last_good or plan.start}"
        )
    return DONE


def _votes(requests: StopRequests, store: CheckpointStore) -> list[float]:
    """What this rank wants all to know with this step's sums."""
    preempted, interrupted = requests.poll()
    must_stop = store.lost_lease is not None or store.given_up
    return [float(preempted), float(interrupted), float(store.local_failure), float(must_stop)]


def _leaving(result: StepResult, store: CheckpointStore) -> int | None:
    """The exit code all ranks agree to leave with, or None."""
    preempted, interrupted, failures, must_stop = result.votes
    if failures:
        store.tell_failed()
    if must_stop:
        raise store.lost_lease or CannotGoOnError(
            "checkpoints could not be written several times in a row (see the save_failed events);"
            " make room or fix the disk, then start the run again"
        )
    return PREEMPTED if preempted else INTERRUPTED if interrupted else None


def _finish_saving(store: CheckpointStore) -> None:
    """Wait for the save under way. No step comes after it whose votes could tell that the lease was lost over it."""
    store.wait()
    if store.lost_lease is not None:
        raise store.lost_lease


def _leave(code: int, store: CheckpointStore, log: Log, done: int) -> int:
    _finish_saving(store)
    if store.last_good != done:
        last = "there is none" if store.last_good is None else f"the last is of step {store.last_good}"
        log.event("warning", f"leaving at step {done} without a checkpoint of it; {last}")
    why = "preempted" if code == PREEMPTED else "asked to stop"
    log.event("stop", f"{why}: left after step {done}; start it again to go on", step=done, code=code)
    return code


def _tell_skip(log: Log, loader: Loader, step: int, in_a_row: int, most: int) -> None:
    first, last = loader.last_rows()
    log.event(
        "skip",
        f"non-finite loss or gradient at step {step + 1}: update skipped on all ranks ({in_a_row} in a row, {most}"
        f" allowed); rows {first} to {last - 1} (`leviathan data explain RUN --step {step + 1}` names their documents)",
        step=step + 1,
        rows=[first, last],
    )
