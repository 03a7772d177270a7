"""A run that waits for room on its cluster."""

from __future__ import annotations

import pytest

from launcher import room
from launcher.room import Waiting
from pretrain.run_folder import RunFolder
from tests.conftest import events, wait_until


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.make()
    run.event("launch", "attempt 0: of an earlier job")
    return run


@pytest.fixture
def watch(folder, monkeypatch):
    monkeypatch.setattr(room, "TOLD_AFTER_S", 0.2)
    monkeypatch.setattr(room, "LOOK_S", 0.05)
    left = []
    waiting = Waiting(folder, "2 ranks", lambda: left.append(True))
    waiting.start()
    yield waiting, left
    waiting.close()
    waiting.join(10)


def test_a_wait_is_told_once_and_again_after_ranks_were_at_work(folder, watch):
    wait_until(lambda: len(events(folder, "warning")) == 1, seconds=10)
    folder.event("launch", "attempt 1")
    wait_until(lambda: watch[0].since() is None, seconds=10)
    folder.event("fault", "a node is lost")
    assert watch[0].since() is None, "ranks may still be ending"
    folder.event("restart", "restart 1")
    wait_until(lambda: len(events(folder, "warning")) == 2, seconds=10)
    assert events(folder, "warning")[0].startswith("the cluster has no room for 2 ranks; the run waits until there is")


def test_a_run_that_waits_can_be_stopped_and_one_at_work_is_left_to_its_ranks(folder, watch):
    waiting, left = watch
    folder.event("launch", "attempt 1")
    wait_until(lambda: waiting.since() is None, seconds=10)
    folder.stop_request.touch()
    waiting.join(0.5)
    assert not left
    folder.event("restart", "restart 1")
    waiting.join(10)
    assert left == [True]
