"""A disk that fills up while a run trains and saves: a real tmpfs, the real command line, one rank."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.checkpoint_files import verify
from pretrain.health import Beat, read_heartbeat
from pretrain.run_folder import RunFolder, read_lines
from tests.conftest import events, leviathan, start_leviathan, tmpfs, wait_until

ALONE = ("engine.name=torch", "--ranks", 1, "checkpoint.keep_last=2")
LONG = (*ALONE, "train.steps=1000000", "checkpoint.every=50", "eval.every=25", "eval.rows=4")
"""More steps than a test waits for: it ends the run when it has seen enough."""
NOT_ENOUGH = 150_000
"""Bytes that lines of metrics fit into, and no checkpoint."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB: some checkpoints of 128 kB and thousands of lines of metrics."""
    with tmpfs(tmp_path / "disk", "4m") as place:
        yield place


def fill(disk: Path) -> Path:
    """Take every block that is left."""
    filler = disk / "filler"
    with open(filler, "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    return filler


def whole(run: RunFolder) -> list[int]:
    """Steps of the checkpoints, newest first. All must verify, and nothing else may lie beside them."""
    steps = run.committed_steps()
    assert {p.name for p in run.checkpoints.iterdir()} == {f"step_{step:09d}" for step in steps}
    assert [verify(run.checkpoints / f"step_{step:09d}") for step in steps] == [None] * len(steps)
    return steps


def steps_of(run: RunFolder, kind: str) -> list[int]:
    return [event["step"] for event in run.history() if event["event"] == kind]


def heartbeat(folder: Path) -> Beat:
    """The last sign of life of the run whose temporary files lie in a folder."""
    (beats,) = folder.glob("leviathan-*")
    beat = read_heartbeat(beats, 0)
    assert beat is not None
    return beat


def interrupt(process: subprocess.Popen[str]) -> None:
    """Ctrl-C: the step is finished and saved, and the run leaves."""
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 130, out + err


def assert_told(run: RunFolder, first: int, last_good: int) -> None:
    """Every save that failed is in the history, in order, each with its step and what it needed and found."""
    failed = [event for event in run.history() if event["event"] == "save_failed"]
    assert failed[0]["step"] == first
    for number, event in enumerate(failed, 1):
        assert event["free"] < event["need"]
        assert re.search(rf"\(need \d+\.\d kB, free .*B\); last good: step {last_good};", event["message"])
        assert f"training goes on ({number} of " in event["message"]


def test_training_and_then_saving_go_on_over_a_disk_that_was_full_for_a_while(tiny, disk, tmp_path):
    env = {"TMPDIR": str(tmp_path)}
    process = start_leviathan("train", tiny, f"run.dir={disk}", *LONG, "checkpoint.max_failures=1000000", env=env)
    run = RunFolder(disk / "tiny")
    wait_until(lambda: len(steps_of(run, "checkpoint")) >= 2)
    filler, newest = fill(disk), run.committed_steps()[0]
    # one save may still have found room; what is told of the next three waits in memory, but the heartbeat goes on
    wait_until(lambda: heartbeat(tmp_path).step > newest + 4 * 50 + 20)
    kept = whole(run)
    filler.unlink()
    wait_until(lambda: run.committed_steps()[0] > kept[0] + 100)
    interrupt(process)
    assert not events(run, "fault", "restart")
    assert_told(run, kept[0] + 50, kept[0])
    failed, saved = steps_of(run, "save_failed"), steps_of(run, "checkpoint")
    assert failed == list(range(kept[0] + 50, failed[-1] + 50, 50))
    assert len(failed) >= 3
    assert next(step for step in saved if step > failed[-1]) == failed[-1] + 50
    last = whole(run)[0]
    # what the disk refused was written when there was room: no line is missing, none stands twice
    assert [row["step"] for row in read_lines(run.metrics)] == list(range(1, last + 1))
    assert [row["step"] for row in read_lines(run.evals)] == list(range(25, last, 25))


@pytest.mark.e2e
@pytest.mark.parametrize("point", ["save.begin", "save.after_file", "save.before_manifest"])
def test_a_disk_that_fills_in_the_middle_of_a_save_costs_that_save_alone(tiny, disk, point):
    env = {"LEVIATHAN_FAULT": f"{point}:0:100:sleep=2"}
    process = start_leviathan("train", tiny, f"run.dir={disk}", *LONG, "checkpoint.max_failures=1000000", env=env)
    run = RunFolder(disk / "tiny")
    file = run.checkpoints / "step_000000100.draft-1-0" / "rank_00000.safetensors"
    wait_until(lambda: 100 in run.steps() if point == "save.begin" else file.exists())
    time.sleep(0.5)
    filler = fill(disk)
    wait_until(lambda: events(run, "save_failed") != [], seconds=20)
    assert whole(run) == [50]
    filler.unlink()
    wait_until(lambda: run.committed_steps()[0] > 100)
    interrupt(process)
    assert_told(run, 100, 50)
    assert events(run, "save_failed")[0].startswith("checkpoint step 100 failed: ")
    last = whole(run)[0]
    assert list(run.steps()) == list(range(1, last + 1))


@pytest.mark.e2e
@pytest.mark.parametrize(
    "left", [pytest.param(0, id="not one block free"), pytest.param(NOT_ENOUGH, id="some blocks free")]
)
def test_after_so_many_saves_in_a_row_without_room_the_run_stops_with_70_and_the_reason(tiny, disk, left):
    process = start_leviathan("train", tiny, f"run.dir={disk}", *LONG, "checkpoint.max_failures=3")
    run = RunFolder(disk / "tiny")
    wait_until(lambda: len(steps_of(run, "checkpoint")) >= 2)
    filler = fill(disk)
    os.truncate(filler, filler.stat().st_size - left)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 70, out + err
    reason = "checkpoints could not be written several times in a row (see the save_failed events); make room"
    assert err.startswith(f"error: {reason}")
    assert err.count("\n") == 1
    kept = whole(run)
    assert not events(run, "restart")
    if left:
        assert_told(run, kept[0] + 50, kept[0])
        assert len(events(run, "save_failed")) == 3
        assert reason in events(run, "stop")[0]


@pytest.mark.e2e
def test_a_run_whose_last_state_found_no_room_is_not_done(tiny, disk):
    env = {"LEVIATHAN_FAULT": "step.before_forward:0:12:sleep=2"}
    process = start_leviathan("train", tiny, f"run.dir={disk}", *ALONE, "checkpoint.every=10", env=env)
    run = RunFolder(disk / "tiny")
    wait_until(lambda: len(run.steps()) >= 12 and steps_of(run, "checkpoint") == [10])
    filler = fill(disk)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 70, out + err
    assert err.startswith("error: all 20 steps are done, but the last checkpoint could not be written")
    assert "it goes on after step 10" in err
    filler.unlink()
    done = leviathan("train", tiny, f"run.dir={disk}", *ALONE, "checkpoint.every=10")
    assert done.code == 0, done.err
    assert events(run, "resume") == ["resumed from step_000000010"]
    assert whole(run)[0] == 20
    assert list(run.steps()) == list(range(1, 21))


def test_a_disk_without_a_block_is_told_before_a_run_begins(tiny, disk):
    fill(disk)
    done = leviathan("train", tiny, f"run.dir={disk}", *ALONE)
    assert done.code == 78
    assert done.err.count("\n") == 1
    assert done.err.startswith(f"error: {disk}/tiny")
    assert "No space left on device; free some" in done.err
