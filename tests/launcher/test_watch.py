"""Who of all ranks is judged to have died first, how that is told, and who hangs."""

from __future__ import annotations

import json
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config import LaunchConfig
from launcher.watch import EXPLAINED, collateral, describe, first_cause, hang, longest_silent
from pretrain.health import PHASES, Beat
from pretrain.run_folder import RunFolder

LAUNCH = LaunchConfig(hang_s=10, start_s=600)
CODES = st.one_of(st.integers(1, 255), st.integers(-64, -1))
STEPPING = st.builds(Beat, st.floats(0, 9.9), st.integers(1, 99), st.just("step"), st.floats(0.01, 2))


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.make()
    return run


# ---- who was first


@pytest.mark.parametrize(
    ("dead", "first"),
    [
        ({0: 1, 1: -9}, 1),
        ({0: -6, 1: -9}, 1),
        ({0: -6, 1: 1}, 0),
        ({0: 65, 1: -11}, 1),
        ({0: 1, 1: 78, 2: 70}, 1),
        ({0: -6, 1: 1, 2: 65}, 2),
        ({3: 1, 5: 1}, 3),
        ({4: 75, 2: 1}, 4),
    ],
)
def test_killed_ranks_go_first_then_those_that_knew_why(dead, first):
    assert first_cause(dead) == first


@settings(max_examples=500, deadline=None)
@given(dead=st.dictionaries(st.integers(0, 9), CODES, min_size=1))
def test_the_rank_that_is_named_is_never_worse_known_than_another(dead):
    def rank_of(code):
        return 2 if code < 0 and not collateral(code) else 1 if not collateral(code) else 0

    named = first_cause(dead)
    assert rank_of(dead[named]) == max(map(rank_of, dead.values()))


@settings(max_examples=200, deadline=None)
@given(code=CODES)
def test_only_what_others_can_cause_is_collateral(code):
    alone = code in EXPLAINED if code > 0 else code != -signal.SIGABRT
    assert collateral(code) != alone


# ---- how a rank ended


def test_a_death_is_told_with_its_signal_and_where_it_was(folder):
    beat = Beat(0.1, 7, "step", 0.2)
    told = describe(folder, 1, "rank 1 (host a)", -signal.SIGKILL, beat)
    assert told.startswith("rank 1 (host a) died in phase 'step' of step 7: SIGKILL (the kernel does that when memory")
    assert describe(folder, 1, "rank 1", -signal.SIGSEGV, None) == "rank 1 died before its first sign of life: SIGSEGV"


@pytest.mark.parametrize("number", range(1, 65))
def test_no_signal_is_more_than_told(folder, number):
    assert describe(folder, 0, "rank 0", -number, None).startswith("rank 0 died before its first sign of life: ")


@pytest.mark.parametrize(
    ("code", "told"), [(65, "a shard is damaged"), (1, "rank 0 failed in phase 'data' of step 3: a")]
)
def test_a_note_is_told_and_only_a_reason_stands_by_itself(folder, code, told):
    folder.exit_of(0).write_text(json.dumps({"code": code, "message": "a shard is damaged"}))
    assert describe(folder, 0, "rank 0", code, Beat(0, 3, "data", 0.0)).startswith(told)


@pytest.mark.parametrize("note", [None, "", "{", '{"mess', "\x00\xff"])
def test_without_a_note_the_log_is_named(folder, note):
    if note is not None:
        folder.exit_of(0).write_text(note)
    told = describe(folder, 0, "rank 0", 3, None)
    assert told == f"rank 0 ended before its first sign of life with exit code 3; see {folder.log_of(0)}"


def test_a_hang_is_told_with_where_the_stacks_are(folder):
    assert hang("rank 2", 12.3, Beat(12.3, 9, "save", 0.1), folder) == (
        f"rank 2: no progress for 12 s (last: save of step 9); stacks of all ranks are in {folder.logs}"
    )
    assert "(it never began)" in hang("rank 2", 700, None, folder)


# ---- who hangs


@settings(max_examples=400, deadline=None)
@given(
    beats=st.dictionaries(st.integers(0, 7), STEPPING, min_size=1, max_size=8), frozen=st.integers(0, 7),
    late=st.floats(10.1, 500),
)  # fmt: skip
def test_among_ranks_that_step_the_frozen_one_is_always_named(beats, frozen, late):
    beats[frozen] = Beat(late, 5, "step", 0.1)
    silent = longest_silent(beats, {frozen}, 1000, LAUNCH)
    assert silent is not None
    assert (silent.rank, silent.age_s) == (frozen, late)


@settings(max_examples=400, deadline=None)
@given(
    beats=st.dictionaries(st.integers(0, 7), STEPPING, min_size=1, max_size=8), frozen=st.integers(0, 7),
    late=st.floats(10.1, 590), phase=st.sampled_from(PHASES),
)  # fmt: skip
def test_a_frozen_rank_is_named_whatever_it_did_and_whoever_is_patient(beats, frozen, late, phase):
    beats |= {8: Beat(late - 10, 1, "data", 0.1), frozen: Beat(late, 5, phase, 0.1)}
    silent = longest_silent(beats, {frozen}, 1000, LAUNCH)
    assert silent is not None
    assert silent.rank == frozen


@settings(max_examples=400, deadline=None)
@given(
    ages=st.lists(st.floats(0, 599), min_size=1, max_size=8),
    patient=st.sampled_from([Beat(1, 3, phase, 0.1) for phase in PHASES if phase != "step"] + [None]),
    steps=st.floats(0, 1),
)
def test_a_rank_that_fetches_data_lends_its_patience_to_all(ages, patient, steps):
    beats = {number: Beat(age, 5, "step", steps) for number, age in enumerate(ages)}
    assert longest_silent({**beats, 9: patient}, set(), 599, LAUNCH) is None


@settings(max_examples=400, deadline=None)
@given(beats=st.dictionaries(st.integers(0, 7), st.one_of(st.none(), st.builds(
    Beat, st.floats(0, 2000), st.integers(0, 99), st.sampled_from(PHASES), st.floats(0, 300)))),
    since=st.floats(0, 2000), frozen=st.sets(st.integers(0, 7)))  # fmt: skip
def test_who_is_named_is_the_oldest_of_those_that_are_too_old(beats, since, frozen):
    silent = longest_silent(beats, frozen, since, LAUNCH)
    ages = {number: since if beat is None else beat.age_s for number, beat in beats.items()}
    if silent is None:
        assert all(age <= 1500 for age in ages.values())
        assert all(ages[number] <= 10 for number in frozen & set(ages))
        return
    assert ages[silent.rank] == silent.age_s > 10
    if silent.rank not in frozen:
        assert silent.age_s == max(ages.values())


def test_five_usual_steps_are_no_hang():
    assert longest_silent({0: Beat(49, 5, "step", 10.0)}, set(), 100, LAUNCH) is None
    assert longest_silent({0: Beat(51, 5, "step", 10.0)}, set(), 100, LAUNCH) is not None


def test_nobody_left_hangs():
    assert longest_silent({}, {1}, 1e9, LAUNCH) is None
