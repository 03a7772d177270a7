"""What srun tells of tasks, when a job may be queued again, and who is where; jobs themselves are in tests/faults."""

from __future__ import annotations

import pytest

from launcher.on_slurm import codes_told, may_requeue


@pytest.mark.parametrize(
    ("line", "codes"),
    [
        ("srun: error: n2: task 1: Killed", {1: -9}),
        ("srun: error: n1: tasks 0-2,5: Exited with exit code 75", {0: 75, 1: 75, 2: 75, 5: 75}),
        ("srun: error: n1: task 3: Segmentation fault (core dumped)", {3: -11}),
        ("srun: error: n1: task 0: Terminated\n", {0: -15}),
        ("srun: error: n1: task 0: Aborted", {0: -6}),
        ("srun: Job step aborted: Waiting up to 32 seconds for job step to finish.", {}),
        ("srun: error: Node failure on n3", {}),
        ("error: something of a library's own", {}),
    ],
)
def test_codes_are_read_from_what_srun_tells(line, codes):
    assert codes_told(line) == codes


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
