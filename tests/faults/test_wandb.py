"""Weights & Biases beside a real run: over a kill, and with a server that is not there. Two gloo ranks, ZeRO-1."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pretrain.metrics import read_offline_steps
from pretrain.run_folder import RunFolder, read_lines
from tests.conftest import events, leviathan, losses, start_leviathan, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
KEY = "0123456789abcdef" * 2 + "01234567"


def run_of(config: Path) -> RunFolder:
    return RunFolder(config.parent / "runs" / "tiny")


def ids(run: RunFolder) -> list[str]:
    """The run's id on W&B in the name of each offline folder, which must hold the log of that run and no other."""
    folders = sorted(run.wandb.glob("offline-run-*"))
    logs = [[log.name for log in folder.glob("run-*.wandb")] for folder in folders]
    found = [folder.name.rpartition("-")[2] for folder in folders]
    assert logs == [[f"run-{name}.wandb"] for name in found]
    return found


def assert_drawn_once(run: RunFolder, steps: int) -> None:
    """All steps stand in W&B's own files, each once (a second time is an error), with the losses of metrics.jsonl."""
    drawn = read_offline_steps(run.path)
    assert list(drawn) == list(range(1, steps + 1))
    assert {step: loss.hex() for step, loss in drawn.items()} == losses(run)


def test_a_killed_run_draws_every_step_once_and_on_one_curve(tiny):
    env = {"LEVIATHAN_FAULT": "step.before_update:1:12"}
    done = leviathan("train", tiny, "--ranks", 2, "log.wandb=offline", env=env)
    run = run_of(tiny)
    assert done.code == 0, done.err
    assert len(events(run, "restart")) == 1
    assert_drawn_once(run, 20)
    assert set(ids(run)) == {run.facts()["wandb_id"]}
    assert not events(run, "warning")


def test_steps_that_wandb_had_before_a_kill_are_done_again_and_not_drawn_again(tiny):
    env = {"LEVIATHAN_FAULT": "step.before_forward:0:13:sleep=90"}
    process = start_leviathan("train", tiny, "--ranks", 2, "log.wandb=offline", "launch.hang_s=90", env=env)
    run = run_of(tiny)
    # wandb writes a step out some seconds after the next one came; steps 11 and 12 are then in no checkpoint
    wait_until(lambda: 12 in read_offline_steps(run.path))
    (victim,) = [p for p in psutil.Process(process.pid).children() if given(p, "RANK") == "1"]
    victim.kill()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert events(run, "restart") == ["restart 1/∞ from step 10, 4 steps to redo"]
    assert sorted(row["step"] for row in read_lines(run.metrics)) == sorted([*range(1, 21), 11, 12, 13])
    assert_drawn_once(run, 20)
    assert ids(run) == [run.facts()["wandb_id"]] * 2


@pytest.fixture
def nobody() -> Iterator[str]:
    """The address of a port that refuses: it is taken, and nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def silence() -> Iterator[str]:
    """The address of a server that accepts every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        # a blocked accept() is not woken by closing what it waits for
        server.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=10)
        assert held, "nobody ever called this server: the test shows nothing"
        for connection in held:
            connection.close()


def seconds_to_the_first_step(run: RunFolder) -> float:
    launched = next(event["time"] for event in run.history() if event["event"] == "launch")
    return next(read_lines(run.metrics))["time"] - launched


@pytest.mark.parametrize("server", ["nobody", "silence"])
def test_a_server_out_of_reach_costs_no_step_and_the_run_is_logged_offline(tiny, undisturbed, server, request):
    address = request.getfixturevalue(server)
    env = {"WANDB_MODE": "online", "WANDB_BASE_URL": address, "WANDB_API_KEY": KEY}
    done = leviathan("train", tiny, "--ranks", 2, "log.wandb=online", env=env)
    run = run_of(tiny)
    assert done.code == 0, done.err
    # W&B is given up after 15 s, so on a slow machine only the order of the two shows that no step waited for it
    given_up = next(event["time"] for event in run.history() if event["event"] == "warning")
    assert next(read_lines(run.metrics))["time"] < given_up
    assert seconds_to_the_first_step(run) < seconds_to_the_first_step(undisturbed) + 45
    assert done.seconds < 90
    assert losses(run) == losses(undisturbed)
    assert_drawn_once(run, 20)
    (warning,) = events(run, "warning")
    (folder,) = run.wandb.glob("offline-run-*")
    assert re.fullmatch(r"wandb unreachable \(\d+ s\): logging offline to (\S+); later: wandb sync \1", warning)
    assert f"wandb sync {folder}" in warning
    assert warning in done.out
    # every process of the run had the address in its environment, W&B's own service too
    assert not [p.pid for p in psutil.process_iter() if given(p, "WANDB_BASE_URL") == address]
    assert not [path for path in run.path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def given(process: psutil.Process, name: str) -> str | None:
    """A variable of the environment that a process was started with; None where it has gone."""
    try:
        return process.environ().get(name)
    except psutil.Error:
        return None
