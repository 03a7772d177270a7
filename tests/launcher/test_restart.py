"""The restart policy: a pure function."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.restart import NO_PROGRESS_LIMIT, Attempt, decide


def attempts(*pairs, code=137):
    return [Attempt(began, committed, code, f"rank 1 died after {committed}") for began, committed in pairs]


def test_a_run_that_advances_goes_on_for_ever_and_at_once():
    history = attempts(*((s, s + 10) for s in range(0, 2000, 10)))
    assert decide(history).action == "retry"
    assert decide(history).wait_s == 0


def test_three_attempts_without_a_new_checkpoint_end_it_with_the_reason():
    history = attempts((0, 50), (50, 50), (50, 50), (50, 50))
    assert [decide(history[: n + 1]).action for n in range(4)] == ["retry", "retry", "retry", "give_up"]
    last = decide(history)
    assert last.code == 70
    assert last.reason == (
        "3 attempts in a row ended without a new checkpoint after step 50; the last one: rank 1 died after 50"
    )


def test_progress_in_between_starts_the_count_anew():
    assert decide(attempts((0, 0), (0, 0), (0, 10), (10, 10), (10, 10))).action == "retry"


@pytest.mark.parametrize("code", [2, 65, 70, 75, 78, 130])
def test_codes_that_no_restart_can_mend_end_it_at_once(code):
    decision = decide(attempts((0, 10), code=code))
    assert (decision.action, decision.code) == ("give_up", code)


@pytest.mark.parametrize("code", [1, 134, 137, 139, 143])
def test_deaths_and_defects_are_tried_again(code):
    assert decide(attempts((0, 10), code=code)).action == "retry"


def test_a_stated_number_of_restarts_is_kept():
    history = attempts((0, 10), (10, 20), (20, 30))
    assert decide(history, max_restarts=3).action == "retry"
    assert decide(history, max_restarts=2).action == "give_up"
    assert decide(history[:1], max_restarts=0).action == "give_up"


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from([1, 70, 75, 137])), min_size=1, max_size=12
    )
)
def test_waits_are_short_and_every_endless_failure_ends(rows):
    history = [Attempt(min(a, b), max(a, b), code, "x") for a, b, code in rows]
    decision = decide(history)
    assert 0 <= decision.wait_s <= 2 ** (NO_PROGRESS_LIMIT - 2)
    stuck = [*history, *attempts(*[(9, 9)] * NO_PROGRESS_LIMIT)]
    assert decide(stuck).action == "give_up"
