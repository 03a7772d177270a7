"""The loop of training: what it asks of its parts and when, and that a run in two parts is the run in one go."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import DONE, INTERRUPTED, PREEMPTED, CannotGoOnError
from launcher.prepare import prepare
from pretrain.checkpoint_files import newest_readable
from pretrain.engine import StepResult
from pretrain.health import Heartbeat
from pretrain.run_folder import read_lines
from pretrain.session import Session
from pretrain.trainer import Plan, train
from tests.conftest import events, losses
from tests.small_run import small_config, train_small

ROWS = 8
LOST = CannotGoOnError("another job has it")


class Parts:
    """What train() works with, in one object that writes down what it is asked.

    changes: by step, attributes that become something else in the middle of it. others: by step, the votes of another
    rank (preempted, interrupted, a save failed, must stop). skips: steps that are not finite.
    """

    def __init__(self, changes=None, others=None, skips=()):
        self.told, self.done = [], 0
        self.changes, self.others, self.skips = changes or {}, others or {}, skips
        self.asked = (False, False)
        self.lost_lease, self.last_good, self.failures = None, None, 0
        self.local_failure = self.given_up = False
        self.disk, self.saving = "works", None
        """What becomes of saves, and the one under way: its step and what becomes of it once somebody waits."""

    def run(self, start=0, stop=10, save_every=100, eval_every=0, max_skips=2, make_up=False):
        self.done = start
        log = SimpleNamespace(step=self.line, evaluation=self.evaluation, event=self.event)
        return train(
            self, self, self, log, Plan(start, stop, save_every, eval_every, max_skips, 0.5, make_up),
            lr_scale=lambda step: 1 / (step + 1), evaluate=self.evaluate, facts=lambda: {"done": self.done},
            requests=self, heartbeat=self,
        )  # fmt: skip

    def of(self, kind):
        """What was told of one kind, without the kind."""
        return [entry[1:] for entry in self.told if entry[0] == kind]

    # engine and loader

    def next(self):
        return ["batch", self.done]

    def last_rows(self):
        return ROWS * (self.done - 1), ROWS * self.done

    def step(self, batches, step, lr_scale, votes):
        assert batches == ["batch", step]
        self.done = step + 1
        self.told.append(("step", step, lr_scale))
        vars(self).update(self.changes.get(self.done, {}))
        sums = [a + b for a, b in zip(votes(), self.others.get(self.done, (0, 0, 0, 0)), strict=True)]
        skipped = self.done in self.skips
        return StepResult(2.0, None if skipped else 1.0, skipped, 64, [2.0], sums)

    def state(self):
        return f"state after {self.done}"

    # store

    def save(self, step, state, facts):
        self.wait()
        assert (state, facts) == (f"state after {step}", {"done": step})
        self.told.append(("save", step))
        self.saving = (step, self.disk) if self.disk != "is full" else None
        self.failures += self.disk == "is full"
        return self.disk != "is full"

    def wait(self):
        self.told.append(("wait",))
        step, outcome = self.saving or (None, None)
        if outcome == "works":
            self.last_good, self.failures = step, 0
        elif outcome == "fails":
            self.failures += 1
        elif outcome == "is another's":
            self.lost_lease = LOST
        self.saving = None

    def tell_failed(self):
        self.told.append(("tell_failed", self.done))

    # log, evaluation, requests, heartbeat

    def line(self, step, result, lr, step_s, data_s):
        self.told.append(("line", step, lr))
        assert 0 <= data_s <= step_s

    def event(self, kind, message, **facts):
        self.told.append((kind, message, facts))

    def evaluate(self, step):
        self.told.append(("evaluate", step))
        return {"step": step}

    def evaluation(self, record):
        self.told.append(("evaluation", record["step"]))

    def poll(self):
        return self.asked

    def at(self, phase, step):
        self.told.append(("at", phase, step))


# ---- a run that nothing happens to


def test_a_run_is_its_steps_in_order_each_with_its_rate_and_its_line():
    parts = Parts()
    assert parts.run(3, 7) == DONE
    assert parts.of("step") == [(step, 1 / (step + 1)) for step in range(3, 7)]
    assert parts.of("line") == [(done, 0.5 / done) for done in range(4, 8)]


@pytest.mark.parametrize("stop", [8, 10])
def test_an_evaluation_that_an_earlier_start_did_not_come_to_is_made_up_before_the_first_step(stop):
    parts = Parts()
    assert parts.run(8, stop, eval_every=4, make_up=True) == DONE
    assert parts.told[:3] == [("at", "evaluate", 8), ("evaluate", 8), ("evaluation", 8)]
    assert [step for step, _ in parts.of("step")] == list(range(8, stop))


@given(start=st.integers(0, 20), steps=st.integers(0, 20), save_every=st.integers(1, 25), eval_every=st.integers(0, 25))
def test_every_nth_step_and_the_last_are_saved_and_evaluated_once(start, steps, save_every, eval_every):
    parts, stop = Parts(), start + steps
    assert parts.run(start, stop, save_every, eval_every) == DONE
    done = range(start + 1, stop + 1)
    assert parts.of("save") == [(n,) for n in done if n % save_every == 0 or n == stop]
    evaluated = [(n,) for n in done if eval_every and (n % eval_every == 0 or n == stop)]
    assert parts.of("evaluate") == parts.of("evaluation") == evaluated
    assert parts.told[-1] == ("wait",), "what is under way at the end is waited for"


def test_phases_are_told_before_they_begin():
    parts = Parts()
    parts.run(0, 2, save_every=1, eval_every=2)
    assert [entry for entry in parts.told if entry[0] in ("at", "step", "save", "evaluate")] == [
        ("at", "data", 1), ("at", "step", 1), ("step", 0, 1.0), ("at", "save", 1), ("save", 1),
        ("at", "data", 2), ("at", "step", 2), ("step", 1, 0.5), ("at", "save", 2), ("save", 2),
        ("at", "evaluate", 2), ("evaluate", 2), ("at", "save", 2),
    ]  # fmt: skip


# ---- leaving


@pytest.mark.parametrize(
    ("asked", "code", "why"),
    [((True, False), PREEMPTED, "preempted"), ((False, True), INTERRUPTED, "asked to stop"),
     ((True, True), PREEMPTED, "preempted")],
)  # fmt: skip
@pytest.mark.parametrize("save_every", [2, 100])
def test_asked_to_leave_it_finishes_and_saves_the_step_and_evaluates_nothing(asked, code, why, save_every):
    parts = Parts({4: {"asked": asked}})
    assert parts.run(0, 10, save_every, eval_every=4) == code
    assert [done for done, _ in parts.of("line")] == [1, 2, 3, 4]
    assert parts.of("save") == ([(2,), (4,)] if save_every == 2 else [(4,)])
    assert parts.of("evaluate") == parts.of("warning") == []
    assert parts.last_good == 4, "the save is waited for"
    ((message, facts),) = parts.of("stop")
    assert message.startswith(f"{why}: left after step 4;")
    assert facts == {"step": 4, "code": code}


@pytest.mark.parametrize(("votes", "code"), [((1, 0, 0, 0), PREEMPTED), ((0, 1, 0, 0), INTERRUPTED)])
def test_all_leave_when_another_rank_alone_was_asked(votes, code):
    parts = Parts(others={3: votes})
    assert parts.run() == code
    assert parts.of("save") == [(3,)]


@pytest.mark.parametrize("disk", ["is full", "fails"])
@pytest.mark.parametrize(("save_every", "last"), [(2, "the last is of step 2"), (100, "there is none")])
def test_leaving_without_a_checkpoint_of_the_step_is_told_with_the_last_there_is(disk, save_every, last):
    parts = Parts({4: {"asked": (True, False), "disk": disk}})
    assert parts.run(save_every=save_every) == PREEMPTED
    assert parts.of("warning") == [(f"leaving at step 4 without a checkpoint of it; {last}", {})]
    assert parts.told[-1][0] == "stop"


# ---- what ends a run


def test_a_lease_that_was_lost_ends_it_at_once_with_the_stores_own_reason():
    parts = Parts({4: {"lost_lease": LOST}})
    with pytest.raises(CannotGoOnError, match="another job has it"):
        parts.run(save_every=4)
    assert parts.of("save") == [], "what belongs to another job is not written to"


@pytest.mark.parametrize("asked", [(False, False), (True, False)])
def test_a_lease_that_was_lost_over_the_last_save_is_no_good_end(asked):
    parts = Parts({10: {"disk": "is another's", "asked": asked}})
    with pytest.raises(CannotGoOnError, match="another job has it"):
        parts.run()
    assert parts.of("warning") == parts.of("stop") == []


@pytest.mark.parametrize("parts", [Parts({4: {"given_up": True}}), Parts(others={4: (0, 0, 0, 1)})])
def test_a_store_that_gave_up_ends_it_and_another_ranks_vote_is_enough(parts):
    with pytest.raises(CannotGoOnError, match="could not be written several times in a row"):
        parts.run()
    assert len(parts.of("step")) == 4


@pytest.mark.parametrize("disk", ["is full", "fails"])
def test_a_run_whose_last_state_could_not_be_saved_is_not_done(disk):
    with pytest.raises(CannotGoOnError, match="last checkpoint could not be written"):
        Parts({8: {"disk": disk}}).run(save_every=4)


def test_a_failed_save_in_between_ends_nothing():
    parts = Parts({4: {"disk": "is full"}, 5: {"disk": "fails"}, 7: {"disk": "works"}})
    assert parts.run(save_every=2) == DONE
    assert parts.of("save") == [(2,), (4,), (6,), (8,), (10,)]
    assert parts.last_good == 10


@pytest.mark.parametrize(
    "parts", [Parts({3: {"local_failure": True}, 4: {"local_failure": False}}), Parts(others={3: (0, 0, 1, 0)})]
)
def test_a_failure_on_any_rank_is_told_to_the_store_so_that_it_does_not_wait(parts):
    assert parts.run() == DONE
    assert parts.of("tell_failed") == [(3,)]


# ---- steps that are skipped


def test_a_skipped_step_is_told_with_its_rows_and_how_many_are_allowed():
    parts = Parts(skips={3, 4, 6})
    assert parts.run() == DONE
    told = parts.of("skip")
    assert [facts for _, facts in told] == [{"step": n, "rows": [8 * n - 8, 8 * n]} for n in (3, 4, 6)]
    assert "at step 4: update skipped on all ranks (2 in a row, 2 allowed); rows 24 to 31 (" in told[1][0]
    assert "(1 in a row, 2 allowed)" in told[2][0], "a good step in between forgives"
    assert [done for done, _ in parts.of("line")] == list(range(1, 11))


def test_more_skips_in_a_row_than_allowed_end_it_and_save_nothing_more():
    parts = Parts(skips={3, 4, 5, 6})
    with pytest.raises(CannotGoOnError, match="in 3 steps in a row, up to step 5"):
        parts.run(save_every=5)
    assert len(parts.of("skip")) == 3
    assert parts.of("save") == []


# ---- the real thing


def test_a_run_that_is_extended_goes_on_as_if_it_had_never_ended(shards, corpus, tmp_path):
    words = ("optim.schedule=constant", "eval.every=4", "eval.rows=4")
    whole = train_small(small_config(tmp_path, shards, corpus, "whole"), *words)
    config = small_config(tmp_path, shards, corpus, "parts")
    train_small(config, *words, "train.steps=7")
    parts = train_small(config, *words)
    assert events(parts, "change") == ["configuration changed: train.steps: 7 → 12"]
    assert events(parts, "resume") == ["resumed from step_000000007"]
    assert (parts.committed_steps(), whole.committed_steps()) == ([12, 10, 7, 5], [12, 10, 5])
    assert list(losses(parts)) == list(range(1, 13))
    assert losses(parts) == losses(whole)
    files = [[note["sha256"] for note in newest_readable(run).facts["files"]] for run in (parts, whole)]
    assert files[0] == files[1], "weights and moments are the same to the bit"


def test_a_run_that_was_asked_to_leave_where_it_evaluates_has_every_figure_in_the_end(tmp_path, shards, corpus):
    config = small_config(tmp_path, shards, corpus)
    words = ("eval.every=4", "checkpoint.every=4")
    undisturbed = train_small(config, "run.name=undisturbed", *words)
    for stop in (4, 12):
        assert _train_until(config, stop, "run.name=it", *words) == PREEMPTED
    run = train_small(config, "run.name=it", *words)
    told = [
        [{key: record[key] for key in ("step", "loss")} for record in read_lines(each.evals)]
        for each in (undisturbed, run)
    ]
    assert [record["step"] for record in told[0]] == [4, 8, 12]
    assert told[1] == told[0]
    again = train_small(config, "run.name=it", *words)
    assert len(list(read_lines(again.evals))) == 3, "what is there is not made again"


def _train_until(config, step, *words):
    """The exit code of a run that is asked to leave in a step."""
    prepared = prepare([config], ["engine.name=torch", *words], ranks=1, branch=(), allow=[])
    session = Session(prepared.folder, prepared.config, Heartbeat(None))
    asked = SimpleNamespace(poll=lambda: (session.loader.rows_consumed >= ROWS * step, False))
    code = session.train(asked)
    session.close()
    return code
