"""When a job may be queued again; jobs themselves are in tests/faults."""

from __future__ import annotations

from launcher.on_slurm import may_requeue


def requeues(*steps):
    return [{"event": "launch"}, *({"event": "requeue", "step": step} for step in steps)]


def test_a_run_is_queued_again_while_it_gets_on():
    assert may_requeue(requeues(), 100) is None
    assert may_requeue(requeues(5, 5, 9, 9), 100) is None
    assert may_requeue(requeues(*range(99)), 100) is None


def test_a_run_is_not_queued_again_beyond_its_budget_or_where_it_stands_still():
    assert "launch.slurm.requeues is 4" in may_requeue(requeues(1, 2, 3, 4), 4)
    assert "launch.slurm.requeues is 0" in may_requeue(requeues(), 0)
    assert "3 times in a row at step 9" in may_requeue(requeues(1, 9, 9, 9), 100)
