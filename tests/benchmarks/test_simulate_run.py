"""The life of a run in virtual time, against arithmetic: what one rank takes, what more of them add."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.simulate_clusters import Local, figures, h100, large_job
from benchmarks.simulate_run import BLOCK, Habits, Job, Machine, Run, best_interval, lost_to_failures, ring
from pretrain.checkpoint import NOTES_AT_ONCE

FREE = Machine(
    name="free", ranks_per_node=4, cores=4.0, spawn_s=0.0, fan_out_s=0.0, start_core_s=0.0, start_bytes=0.0,
    start_looks=0.0, ready_core_s=0.0, meet_core_s=0.0, shard_core_s=0.0, shard_bytes=0.0, looks=1e12, look_s=1e-12,
    makes=1e12, make_s=1e-12, read=1e15, node_read=1e15, write=1e15, node_write=1e15, step_s=1.0, first_step_s=1.0,
    on_cores=True, jitter=(1.0,), reduces=(), gathers=(), hop_s=0.0, far_hop_s=0.0, near=1e15, far=1e15,
    byte_core_s=0.0, copy=1e15, save_core_s=0.0,
)  # fmt: skip
"""A machine where all but a step costs nothing."""
SMALL = Job(ranks=4, shards=10, rows=1, row_bytes=64.0, window=10.0 * BLOCK, sources=1, state_bytes=4e6)
LOCAL = Local(1.5, 2.3, 1e-6, 1e-9, 4e8, 1e4, 70.0, 3e-4)


def test_where_nothing_else_costs_anything_a_run_is_its_steps():
    out = Run(FREE, SMALL).simulate()
    assert (out.first_s, out.step_s, out.durable_s) == pytest.approx((1.0, 1.0, 0.01), abs=1e-3)


def test_cores_are_a_resource():
    """Twice as many ranks as cores: each step takes twice as long, and so does a start."""
    starting = replace(FREE, start_core_s=3.0)
    for cores, factor in ((4.0, 1.0), (2.0, 2.0), (1.0, 4.0)):
        out = Run(replace(starting, cores=cores), SMALL).simulate()
        assert (out.first_s, out.step_s) == pytest.approx((factor * 4.0, factor), rel=1e-6)


def test_a_device_of_its_own_makes_a_step_independent_of_cores():
    out = Run(replace(FREE, cores=1.0, on_cores=False), SMALL).simulate()
    assert out.step_s == pytest.approx(1.0)


def test_what_imports_read_comes_from_storage_once_a_node():
    """Sixteen ranks on four nodes: four times the bytes, from storage that gives half of them in a second."""
    machine = replace(FREE, start_bytes=1e9, read=2e9, node_read=2e9)
    out = Run(machine, replace(SMALL, ranks=16)).simulate()
    assert out.start_bytes == pytest.approx(4e9 + 16 * BLOCK)
    assert out.phases["imports"] == pytest.approx(2.0, rel=1e-6)
    assert Run(machine, SMALL).simulate().start_bytes == pytest.approx(1e9 + 4 * BLOCK)


def test_looks_that_every_rank_makes_grow_with_ranks_unless_they_are_shared():
    machine = replace(FREE, looks=1000.0, look_s=0.01)  # one process alone: 100 a second
    job = replace(SMALL, shards=1000, ranks=40, shared_looks=False)
    alone = Run(machine, replace(job, ranks=1)).simulate()
    assert alone.phases["sizes of shards"] == pytest.approx(10.0)
    each = Run(machine, job).simulate()
    assert each.phases["sizes of shards"] == pytest.approx(40.0)
    assert each.start_looks == 40_000
    shared = Run(machine, replace(job, shared_looks=True)).simulate()
    assert shared.phases["sizes of shards"] == pytest.approx(1.0)
    assert shared.start_looks == pytest.approx(1000)


def test_a_slow_rank_makes_all_wait():
    machine = replace(FREE, jitter=(1.0, 1.0, 1.0, 3.0))
    lone, many = (Run(machine, replace(SMALL, ranks=ranks, steps=60, save_at=55)).simulate() for ranks in (1, 64))
    assert lone.step_s < 2.0
    assert many.step_s == pytest.approx(3.0)


def test_training_is_blocked_by_the_copy_alone_and_a_save_takes_a_core_from_steps():
    machine = replace(FREE, cores=4.0, copy=1e6, save_core_s=2e-6)
    out = Run(machine, SMALL).simulate()
    assert out.blocked_s == pytest.approx(1.0)
    # 1e6 bytes of each of 4 ranks at 2e-6: 8 seconds of cores, beside 4 ranks that compute on 4 cores
    assert out.durable_s > 2.0


def test_a_checkpoint_is_durable_when_the_slowest_file_is():
    out = Run(replace(FREE, write=1e6, node_write=1e6), SMALL).simulate()
    assert out.durable_s == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize(("ranks", "nodes"), [(2, 1), (4, 1), (8, 2), (64, 16)])
def test_a_ring_moves_what_it_must(ranks, nodes):
    machine = replace(FREE, near=1e9, far=1e8, byte_core_s=1e-9)
    core_s, wait_s = ring(machine, ranks, 1e6, is_sum=True)
    moved = 2 * (ranks - 1) / ranks * 1e6
    assert core_s == pytest.approx(moved * 1e-9)
    assert wait_s == pytest.approx(moved / (1e9 if nodes == 1 else 1e8))
    assert ring(machine, ranks, 1e6, is_sum=False)[1] == pytest.approx(wait_s / 2)


def test_between_many_nodes_a_small_sum_takes_the_tree_and_a_gather_cannot():
    machine = replace(FREE, ranks_per_node=1, far_hop_s=1e-3)
    assert ring(machine, 1024, 8.0, is_sum=True)[1] == pytest.approx(2 * 10 * 1e-3, rel=1e-3)
    assert ring(machine, 1024, 8.0, is_sum=False)[1] == pytest.approx(1023 * 1e-3, rel=1e-3)


def test_alone_nobody_is_waited_for():
    assert ring(FREE, 1, 1e9, is_sum=True) == (0.0, 0.0)


def test_a_node_reads_a_whole_window_once_and_many_nodes_a_block_for_every_row():
    """One node needs every block of a window; among very many, hardly any two rows of a node share a block."""
    job = replace(SMALL, ranks=4, rows=8, row_bytes=512.0, window=1024.0 * BLOCK)
    steps = job.window / (512.0 * 8 * 4)
    assert Run(FREE, job).data_bytes() == pytest.approx(job.window / steps, rel=1e-3)
    many = replace(job, ranks=40_000)
    assert Run(FREE, many).data_bytes() == pytest.approx(8 * 40_000 * BLOCK, rel=0.2)


@pytest.mark.parametrize("mtbf_h", [1.0, 5.0, 100.0])
def test_what_failures_take_is_what_arithmetic_says(mtbf_h):
    """Of each life: a restart, half an interval and the save that was not durable; of each interval: what blocks."""
    mtbf, habits = 3600 * mtbf_h, Habits(interval_s=60.0, blocked_s=1.0, durable_s=5.0, restart_s=100.0)
    expected = 1.0 / 61.0 + (100.0 + 30.0 + 5.0) / mtbf
    found = lost_to_failures(habits, mtbf, horizon_s=3000 * mtbf)
    assert found == pytest.approx(expected, rel=0.12)


def test_who_never_fails_loses_what_saving_blocks():
    habits = Habits(interval_s=99.0, blocked_s=1.0, durable_s=1.0, restart_s=50.0)
    assert lost_to_failures(habits, 1e15, horizon_s=1e7) == pytest.approx(0.01, rel=0.01)


def test_who_fails_more_often_than_it_can_start_loses_everything():
    habits = Habits(interval_s=60.0, blocked_s=1.0, durable_s=5.0, restart_s=10_000.0)
    assert lost_to_failures(habits, 100.0, horizon_s=1e6) > 0.999


def test_the_best_interval_is_where_saving_less_and_more_often_both_lose_more():
    blocked, mtbf = 2.0, 20_000.0
    best = best_interval(blocked, mtbf)
    losses = [blocked / t + t / (2 * mtbf) for t in (0.8 * best, best, 1.25 * best)]
    assert losses[1] == min(losses)


def test_a_restart_takes_the_square_of_the_ranks_only_where_each_opens_every_file():
    machine = replace(h100(LOCAL), cores=1e6)

    def restores(opens_all):
        jobs = (replace(large_job(ranks, 1000), shared_looks=True, opens_all=opens_all) for ranks in (512, 1024))
        return [figures(machine, job, 1.0).again.phases["restore"] for job in jobs]

    few, many = restores(opens_all=True)
    assert many > 2 * 1024**2 / machine.looks
    assert math.log2(many / few) > 0.9
    own_few, own_many = restores(opens_all=False)
    gathers = sum(ring(machine, 1024, size, is_sum=False)[1] for size in machine.gathers)
    assert own_many < 0.1 + gathers
    assert own_few < few / 5
    assert "restore" not in figures(machine, large_job(512, 1000), 1.0).start.phases


def test_notes_of_a_save_are_read_by_some_threads_and_as_fast_as_storage_lets_them():
    for looks, seconds in ((1e12, 1200 * 0.01 / NOTES_AT_ONCE), (200.0, 1200 / 200)):
        machine = replace(FREE, looks=looks, look_s=0.01)
        out = Run(machine, replace(SMALL, ranks=1200)).simulate()
        assert out.durable_s == pytest.approx(seconds, rel=0.03)


def test_code_and_manifest_come_from_storage_once_a_node_however_many_ranks_it_has():
    machine = h100(LOCAL)

    def of(ranks, each):
        out = Run(replace(machine, ranks_per_node=each), large_job(ranks, 1000)).simulate()
        return out.start_bytes - ranks * large_job(ranks, 1000).rows * BLOCK  # every rank reads rows of its own

    assert of(512, 8) / of(64, 8) == pytest.approx(8.0)
    assert of(512, 64) / of(64, 8) == pytest.approx(1.0)
