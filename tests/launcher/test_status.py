"""`leviathan status | why | logs | stop`: what a run folder says of its run, whatever became of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import UsageError
from launcher import runs
from launcher.runs import owners, read_state, tail
from launcher.status import show_all, show_log, show_one, stop
from launcher.why import guilty_rank, show_why, why
from pretrain.run_folder import RunFolder, append_line, step_name
from tests.conftest import leviathan, start_leviathan, wait_until
from tests.small_run import small_config

SIGKILL = "rank 1 (pid 7, host vm) died in phase 'step' of step 6: SIGKILL (the kernel does that when memory runs out)"
HANG = "rank 1 (pid 7, host vm): no progress for 12 s (last: step of step 6); stacks of all ranks are in runs/it/logs"
NAN = "the loss or gradient was not finite in 4 steps in a row, up to step 7; lower optim.lr"
NO_ROOM = "checkpoints could not be written several times in a row (see the save_failed events); make room, start again"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that was prepared."""
    folder = RunFolder(tmp_path / "runs" / "it")
    folder.make()
    folder.set_facts(created=time.time() - 100, name="it", steps=20, ranks=2)
    return folder


def row(folder: RunFolder, step: int, attempt: int = 0, at: float | None = None) -> None:
    figures = {"loss": 3.5 - step / 100, "lr": 1e-3, "tokens": step * 256, "tokens_per_s": 12_345.0, "step_s": 0.02}
    figures |= {"mfu": 0.1, "memory_mib": 500.0, "grad_norm": 1.0, "source_loss": {}, "data_s": 0.0}
    record = {"step": step, "attempt": attempt, "time": at or time.time(), "skipped": False, **figures}
    append_line(folder.metrics, record)


def lived(folder: RunFolder, *, steps: int = 7, saved: tuple[int, ...] = (5,)) -> None:
    """A run that was launched, took some steps and saved some checkpoints."""
    folder.event("launch", "attempt 0: starting 2 ranks on vm")
    folder.event("start", "training step 0 to 20 on 2 ranks", step=0)
    for step in range(1, steps + 1):
        row(folder, step, at=time.time() - steps + step)
    for step in saved:
        (folder.checkpoints / step_name(step)).mkdir()
        folder.event("checkpoint", f"saved {step_name(step)}", step=step)


def ended(folder: RunFolder, code: int, reason: str, **fault: object) -> None:
    """The supervisor's last words."""
    if fault:
        folder.event("fault", reason, **fault)
    folder.event("stop", f"stopped: {reason}", code=code, step=5)


def reason_of(folder: RunFolder) -> tuple[str, str]:
    state = read_state(folder, owners([folder]).get(str(folder.path)))
    return state.what, why(state)


def test_a_run_that_was_only_prepared_never_began(folder):
    what, reason = reason_of(folder)
    assert what == "never began"
    assert reason.startswith("it never began: its folder was prepared 1 min 40 s ago, and nothing started")


def test_a_run_that_was_stopped_before_any_rank_started_says_why(folder):
    folder.event("submit", "submitted as Slurm job 4", job="4")
    folder.event("stop", "stopped: node n2 has torch 2.11.0, n1 2.13.0; exclude it", code=78, step=0)
    what, reason = reason_of(folder)
    assert what == "failed"
    assert reason.endswith("at step 0 (exit 78): node n2 has torch 2.11.0, n1 2.13.0; exclude it")


def test_a_run_that_is_done_says_what_to_look_at(folder):
    lived(folder, steps=20, saved=(20,))
    folder.event("done", "trained to step 20", step=20)
    what, reason = reason_of(folder)
    assert what == "done"
    assert "it is done: it was trained to step 20" in reason
    assert "`leviathan report it`" in reason


def test_a_supervisor_that_was_killed_left_no_word(folder):
    lived(folder)
    what, reason = reason_of(folder)
    assert what == "killed"
    assert "it lost its supervisor without a word" in reason
    assert reason.endswith("the same `leviathan train` command goes on from step 5, doing 2 steps again")


@pytest.mark.parametrize(
    ("code", "cause", "begins", "says"),
    [
        (
            78,
            "run.dir is on a full disk; set another",
            "it stopped because its configuration does not fit",
            "set another",
        ),
        (
            65,
            "shard s-0003.tar is damaged; copy it",
            "it stopped because its data or a checkpoint is not valid",
            "copy it",
        ),
        (70, NAN, "it gave up", "lower optim.lr"),
        (
            70,
            f"3 attempts in a row ended without a new checkpoint; the last one: {SIGKILL}",
            "it gave up",
            "micro_rows",
        ),
        (
            70,
            f"launch.max_restarts is 0, and the run failed once more: {HANG}",
            "it gave up",
            "logs it --rank 1` shows",
        ),
        (70, "rank 1 (pid 7) failed in phase 'step' of step 6: ValueError: odd", "it gave up", "why it --verbose"),
    ],
)
def test_a_failure_is_told_with_its_cause_and_what_to_do(folder, code, cause, begins, says):
    lived(folder)
    ended(folder, code, cause, rank=1, host="vm", step=6)
    what, reason = reason_of(folder)
    assert what == "failed"
    assert reason.startswith(begins)
    assert f"(exit {code}): {cause}" in reason
    assert says in reason
    assert "\n" not in reason


def test_a_full_disk_is_told_with_what_was_needed(folder):
    lived(folder)
    folder.event("save_failed", "checkpoint step 6 failed: no space left on the disk (need 2 GB, free 1 GB)")
    ended(folder, 70, NO_ROOM, rank=0, host="vm", step=6)
    assert "; the last one: checkpoint step 6 failed: no space left on the disk (need 2 GB" in reason_of(folder)[1]


def test_being_asked_to_leave_is_no_failure(folder):
    lived(folder)
    folder.event("signal", "SIGTERM: finishing the step and saving", signal="SIGTERM")
    folder.event("stop", "preempted: left after step 7; start it again", step=7, code=75)
    ended(folder, 75, "stopped as asked")
    what, reason = reason_of(folder)
    assert what == "stopped"
    assert reason.startswith("it was preempted (SIGTERM) ")
    assert "left after step 7 (exit 75); the same `leviathan train` command goes on from step 5" in reason


@pytest.mark.parametrize(
    ("sent", "how"), [("SIGINT", "interrupted with Ctrl-C"), (None, "stopped by `leviathan stop`")]
)
def test_whoever_stopped_it_is_named(folder, sent, how):
    lived(folder)
    if sent:
        folder.event("signal", "…", signal=sent)
    ended(folder, 130, "stopped after 25 s without saving; the last checkpoint is valid")
    assert f"it was {how}" in reason_of(folder)[1]
    assert "did not finish saving in time (exit 130)" in reason_of(folder)[1]


def test_only_the_last_life_of_a_run_counts(folder):
    lived(folder)
    ended(folder, 70, NAN, rank=0, host="vm", step=6)
    folder.attempt = 1
    folder.event("launch", "attempt 1: starting 2 ranks on vm")
    folder.event("resume", "resumed from step 5", step=5)
    row(folder, 6, attempt=1)
    state = read_state(folder, None)
    assert (state.what, state.step) == ("killed", 6)


def test_the_note_of_a_rank_is_used_where_nobody_else_said_anything(folder):
    lived(folder)
    folder.exit_of(1).write_text(json.dumps({"rank": 1, "code": 65, "message": "shard x is gone", "attempt": 0}))
    folder.exit_of(0).write_text(json.dumps({"rank": 0, "code": 65, "message": "of long ago", "attempt": 7}))
    state = read_state(folder, None)
    assert "rank 1 had ended with: shard x is gone" in why(state)
    assert guilty_rank(state) == 1


def test_why_verbose_adds_events_and_the_log_of_the_guilty_rank(folder, capsys):
    lived(folder)
    ended(folder, 70, SIGKILL, rank=1, host="vm", step=6)
    folder.log_of(0).write_text("innocent\n")
    folder.log_of(1).write_text("about to \x1b[31mdie\n")
    show_why(str(folder.path), True)
    out = capsys.readouterr().out
    assert "about to \\x1b[31mdie" in out
    assert "innocent" not in out
    assert "checkpoint  saved step_000000005" in out


def test_the_table_shows_every_run_the_newest_first(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    lived(folder)
    ended(folder, 70, NAN)
    old = RunFolder(tmp_path / "runs" / "older")
    old.make()
    old.set_facts(created=1.7e9, steps=300)
    show_all(tmp_path / "runs")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "step", "loss", "tokens/s", "left", "last", "sign", "last", "event"]
    assert lines[1].split()[:7] == ["it", "failed", "(70)", "7/20", "3.4300", "12.3k", "–"]
    assert "stop: stopped: the loss or gradient was not finite" in lines[1]
    assert lines[2].split()[:7] == ["older", "never", "began", "0/300", "–", "–", "–"]
    assert all(len(line) <= 160 for line in lines)


def test_a_folder_without_runs_says_how_to_start_one(tmp_path, capsys):
    show_all(tmp_path)
    assert "start one with `leviathan train CONFIG`" in capsys.readouterr().out


def test_one_run_is_shown_in_detail(folder, capsys):
    lived(folder)
    figures = {"loss": 3.21, "perplexity": 20.0, "bits_per_byte": 1.5, "tokens": 9}
    append_line(folder.evals, {"step": 5, "attempt": 0, "time": 0, "sources": {}, "by_position": [], **figures})
    show_one(str(folder.path))
    out = capsys.readouterr().out
    for part in (
        "7/20 (35%)",
        "3.4300",
        "loss 3.2100, 1.5000 bits per byte at step 5",
        "step 5 (",
        "`leviathan why it`",
    ):
        assert part in out


def hold(folder: RunFolder, host: str, renewals: int, age_s: float) -> None:
    """A lease as a process on `host` writes it."""
    path = folder.path / "lease.json"
    held = {"fence": 3, "renewals": renewals, "host": host, "pid": 42, "started": 1.0, "since": 1.7e9}
    path.write_text(json.dumps(held))
    os.utime(path, (time.time() - age_s, time.time() - age_s))


def test_a_lease_of_another_host_counts_while_it_is_renewed(folder, monkeypatch):
    monkeypatch.setattr(runs, "RENEW_S", 0.3)
    hold(folder, "node-9", 7, age_s=2)
    assert reason_of(folder)[0] == "running"
    assert "process 42 on node-9" in reason_of(folder)[1]
    hold(folder, "node-9", 7, age_s=100)
    began = time.monotonic()
    assert owners([folder]) == {}, "watched, and not renewed"
    assert time.monotonic() - began < 2
    monkeypatch.setattr(runs.time, "sleep", lambda seconds: hold(folder, "node-9", 8, age_s=100))
    assert owners([folder])[str(folder.path)].host == "node-9"


def test_a_lease_of_long_ago_or_of_a_dead_process_here_is_nobodys(folder):
    hold(folder, "node-9", 7, age_s=10_000)
    assert owners([folder]) == {}
    hold(folder, socket.gethostname(), 7, age_s=1)
    assert owners([folder]) == {}, "process 42 began at another time"


def test_the_end_of_a_long_file_is_read_without_the_rest(folder):
    with open(folder.metrics, "w") as file:
        for step in range(5000):
            file.write(json.dumps({"step": step, "filling": "x" * 50}) + "\n")
        file.write('{"torn": ')
    rows = tail(folder.metrics)
    assert rows[-1]["step"] == 4999
    assert 100 < len(rows) < 1500


def test_logs_of_a_rank_are_shown_harmless_and_an_unknown_rank_is_a_sentence(folder, capsys):
    folder.log_of(0).write_text("".join(f"line {n} \x1b[2J\n" for n in range(300)))
    show_log(str(folder.path), 0, lines=2, follow=False)
    assert capsys.readouterr().out == "line 298 \\x1b[2J\nline 299 \\x1b[2J\n"
    show_log(str(folder.path), 0, lines=0, follow=True)
    assert capsys.readouterr().out.count("\n") == 300
    with pytest.raises(UsageError, match="has no log of rank 3; it has ranks 0 to 0"):
        show_log(str(folder.path), 3, lines=2, follow=False)


def test_stopping_what_does_not_run_is_refused(folder):
    with pytest.raises(UsageError, match=r"it is not running \(it never began\), so there is nothing to stop"):
        stop(str(folder.path), 5)
    lived(folder)
    ended(folder, 75, "stopped as asked")
    with pytest.raises(UsageError, match=r"it is not running \(it stopped .* ago\)"):
        stop(str(folder.path), 5)


# ---- a run that really runs


@pytest.fixture(scope="module")
def running(
    shards: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, RunFolder, subprocess.Popen[str]]]:
    """A configuration and the run of it that goes on for hours."""
    config = small_config(tmp_path_factory.mktemp("running"), shards, corpus, "endless")
    folder = RunFolder(config.parent / "runs" / "endless")
    process = start_leviathan("train", config, "train.steps=1000000", "checkpoint.every=1000")
    try:
        wait_until(lambda: folder.metrics.exists() and folder.metrics.stat().st_size > 0)
        yield config, folder, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_run_that_runs_is_seen_and_its_folder_is_closed_to_others(running):
    config, folder, process = running
    what, reason = reason_of(folder)
    assert what == "running"
    assert reason.startswith(f"endless is running (process {process.pid} here), at step ")
    before = folder.config.read_bytes(), folder.launch.read_bytes(), len(folder.history())
    second = leviathan("train", config, "train.steps=5")
    assert second.code == 78
    assert second.err.startswith(f"error: run folder {folder.path} is in use by process {process.pid} on ")
    assert second.err.count("\n") == 1
    after = folder.config.read_bytes(), folder.launch.read_bytes(), len(folder.history())
    assert after == before, "whoever is refused changes nothing"


def test_stop_has_a_run_finish_its_step_save_and_leave(running):
    _, folder, process = running
    follower = start_leviathan("logs", folder.path, "--follow")
    done = leviathan("stop", folder.path, "--timeout", 60)
    assert (done.code, done.err) == (0, "")
    assert process.wait(20) == 130
    follower.communicate(timeout=20)
    assert follower.returncode == 0, "whoever follows a log is let go when the run ends"
    step = max(folder.steps())
    assert folder.committed_steps()[0] == step
    assert f"endless has left after step {step:,}" in done.out
    assert f"saved {step_name(step)}" in done.out
    what, reason = reason_of(folder)
    assert what == "stopped"
    assert "endless was stopped by `leviathan stop`" in reason
    assert [event["message"] for event in folder.history()][-1] == "stopped: stopped as asked"
