"""Rests of a rank at a named place; what kills or stops one is part of the tests of whole runs."""

from __future__ import annotations

import threading
import time

import pytest

from pretrain import faults


@pytest.fixture
def arm(monkeypatch):
    """A function that arms faults in this process as in rank 0 of an attempt, with shorter rests."""
    monkeypatch.setattr(faults, "_ARRIVES_S", 0.5)
    monkeypatch.setenv("RANK", "0")

    def arm(text, attempt=0):
        monkeypatch.setenv("LEVIATHAN_FAULT", text)
        monkeypatch.setenv("LEVIATHAN_ATTEMPT", str(attempt))
        faults.armed.cache_clear()

    yield arm
    faults.armed.cache_clear()


def rested(step):
    """Seconds that a rank spends at a place of a step."""
    began = time.monotonic()
    faults.fault_point("step.before_forward", step)
    return time.monotonic() - began


def test_a_rank_rests_until_there_is_a_file_and_a_little_longer(arm, tmp_path):
    arm(f"step.before_forward:0:12:until={tmp_path / 'go'}")
    assert rested(11) < 0.5
    threading.Timer(0.3, (tmp_path / "go").touch).start()
    assert 0.8 <= rested(12) < 30


def test_a_rank_whose_file_never_comes_goes_on_in_the_end(arm, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "_REST_S", 0.5)
    arm(f"step.before_forward:0:12:until={tmp_path / 'never'}")
    assert 0.5 <= rested(12) < 30


def test_each_attempt_rests_until_there_is_a_file_of_its_own(arm, tmp_path):
    files = [tmp_path / "first", tmp_path / "second"]
    text = ",".join(f"step.before_forward:0:{step}:until={file}" for step, file in zip((3, 5), files))
    for attempt, (step, file) in enumerate(zip((3, 5), files)):
        arm(text, attempt)
        threading.Timer(0.3, file.touch).start()
        assert 0.8 <= rested(step) < 30
        assert rested(8 - step) < 0.5, "the place of the other attempt"
