"""Virtual time: what shares, waits and ends when, against sums that can be done by hand."""

from __future__ import annotations

import random

import pytest

from benchmarks.simulate import Clock, Door, Gate, Rounds, Shared, Use


def ends_of(works, capacity, each, begins=None):
    """When each of these pieces of work ends that share one thing."""
    clock = Clock()
    shared, ends = Shared(clock, capacity, each), {}

    def user(number, begin, work):
        yield begin
        yield Use(shared, work)
        ends[number] = clock.now

    for number, work in enumerate(works):
        clock.start(user(number, begins[number] if begins else 0.0, work))
    clock.run()
    assert shared.served == pytest.approx(sum(works))
    return [ends[number] for number in range(len(works))]


def test_who_is_alone_gets_no_more_than_one_user_may():
    assert ends_of([6.0], capacity=10.0, each=2.0) == [3.0]


def test_all_share_equally_and_who_is_done_leaves_its_share_to_the_others():
    # two at 1 a second until 2 s; then the other one alone at 2 a second, for 4 more
    assert ends_of([2.0, 6.0], capacity=2.0, each=9.0) == [2.0, 4.0]


def test_two_cores_and_four_ranks_take_twice_as_long_as_two_ranks():
    assert ends_of([1.0] * 2, capacity=2.0, each=1.0) == [1.0] * 2
    assert ends_of([1.0] * 4, capacity=2.0, each=1.0) == pytest.approx([2.0] * 4)


def test_who_comes_later_slows_down_who_is_there():
    # alone for 1 s, then half as fast: 1 + (4 - 2) / 1; the late one has 2 by then, and 1 left at 2 a second
    assert ends_of([4.0, 3.0], capacity=2.0, each=2.0, begins=[0.0, 1.0]) == pytest.approx([3.0, 3.5])


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_served_faster_than_there_is_capacity_and_all_is_served(seed):
    """Against a simulation in small steps of time, which no cleverness can have made wrong."""
    chance = random.Random(seed)
    works = [chance.uniform(0.1, 5.0) for _ in range(12)]
    begins = [chance.uniform(0.0, 6.0) for _ in works]
    capacity, each, step = chance.uniform(1.0, 4.0), chance.uniform(0.5, 4.0), 1e-3
    left, plain, now = list(works), [0.0] * len(works), 0.0
    while any(work > 0 for work in left):
        users = [n for n, work in enumerate(left) if work > 0 and begins[n] <= now]
        for number in users:
            left[number] -= step * min(each, capacity / len(users))
            plain[number] = now + step
        now += step
    assert ends_of(works, capacity, each, begins) == pytest.approx(plain, abs=0.03)


def test_a_gate_holds_all_until_the_last_one_comes():
    clock, left = Clock(), []
    gate = Gate(clock, 3)

    def one(seconds):
        yield seconds
        yield gate
        left.append(clock.now)

    for seconds in (1.0, 5.0, 3.0):
        clock.start(one(seconds))
    clock.run()
    assert left == [5.0] * 3


def test_a_gate_that_one_never_reaches_lets_nobody_through():
    clock, left = Clock(), []
    gate = Gate(clock, 2)

    def one():
        yield gate
        left.append(clock.now)

    clock.start(one())
    clock.run()
    assert left == []


def test_a_door_lets_through_who_waits_and_who_comes_later():
    clock, left = Clock(), []
    door = Door(clock)

    def opener():
        yield 2.0
        door.open()

    def one(seconds):
        yield seconds
        yield door
        left.append(clock.now)

    for process in (one(1.0), opener(), one(3.0)):
        clock.start(process)
    clock.run()
    assert left == [2.0, 3.0]


def test_rounds_of_one_company_do_not_mix():
    clock, seen = Clock(), []
    rounds = Rounds(clock, 2)

    def one(pace):
        for number in range(3):
            yield pace
            yield rounds.gate(number)
            seen.append((number, clock.now))

    clock.start(one(1.0))
    clock.start(one(2.0))
    clock.run()
    assert seen == [(0, 2.0), (0, 2.0), (1, 4.0), (1, 4.0), (2, 6.0), (2, 6.0)]


def test_a_very_long_simulation_of_equal_users_ends_all_of_them_at_once():
    """Rounding must not turn one end into thousands, each a little later."""
    ends = ends_of([0.1] * 5000, capacity=7.0, each=1.0)
    assert ends == pytest.approx([5000 * 0.1 / 7.0] * 5000)
