"""The whole `leviathan ensemble`, ended by force in every phase: the same command goes on and nothing is changed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from configs.errors import DONE, INTERRUPTED
from pretrain.checkpoint_files import newest_readable
from pretrain.run_folder import RunFolder
from tests.conftest import events, leviathan, losses, start_leviathan, wait_until
from tests.small_ensemble import ALONE_STEPS, MODULES, STEPS, write_ensemble

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
ALL = [*(f"duo-{module}" for module in MODULES), "duo"]
LETTERS, LISTS, DUO = ALL
HELD = ",".join(["step.before_update:0:4:sleep=60"] * 6)
"""In whatever attempt: one rank waits in the middle of the fifth step until it is killed."""


@pytest.fixture(scope="module")
def undisturbed(shards, corpus, tmp_path_factory):
    """The same ensemble with nothing happening."""
    place = tmp_path_factory.mktemp("undisturbed")
    done = leviathan("ensemble", write_ensemble(place, shards, corpus, "deepspeed"), timeout=300)
    assert done.code == DONE, done.err + done.out
    return place


def run_of(place: Path, name: str) -> RunFolder:
    return RunFolder(place / "runs" / name)


def final_state(run: RunFolder) -> tuple[int, list[str]]:
    found = newest_readable(run)
    return found.step, [note["sha256"] for note in found.facts["files"]]


def assert_same(place: Path, reference: Path) -> None:
    for name, steps in zip(ALL, (ALONE_STEPS, ALONE_STEPS, STEPS)):
        run, other = run_of(place, name), run_of(reference, name)
        assert losses(run) == losses(other), name
        assert len(losses(run)) == steps
        assert final_state(run) == final_state(other)


def kill_when(place: Path, config: Path, moment: Callable[[], bool], faults: str = "", *words: str) -> None:
    """Start the command and kill it with SIGKILL at a moment; nothing that it started is left."""
    process = start_leviathan("ensemble", config, *words, env={"LEVIATHAN_FAULT": faults})
    try:
        wait_until(moment, 150)
        process.kill()
        process.wait()
    finally:
        process.kill()
    wait_until(lambda: not descendants(place), 20)


def descendants(place: Path) -> list[str]:
    """Supervisors and ranks of runs in this place."""
    lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(place / "runs") in line]


def test_killed_in_every_phase_the_same_command_ends_with_the_same_bits(shards, corpus, tmp_path, undisturbed):
    config = write_ensemble(tmp_path, shards, corpus, "deepspeed")
    letters, lists, duo = (run_of(tmp_path, name) for name in ALL)
    kill_when(tmp_path, config, lambda: len(losses(letters)) >= 4, HELD)
    assert not lists.path.exists() or not losses(lists)
    kill_when(tmp_path, config, lambda: bool(events(letters, "done")))
    kill_when(tmp_path, config, lambda: len(losses(lists)) >= 4, HELD)
    kill_when(tmp_path, config, lambda: bool(events(duo, "fault")), "restore.middle:1:0")
    assert not duo.committed_steps()
    # a step is done before the save that began ahead of it is durable
    kill_when(tmp_path, config, lambda: len(losses(duo)) >= 4 and bool(duo.committed_steps()), HELD)
    done = leviathan("ensemble", config, timeout=200)
    assert done.code == DONE, done.err + done.out
    assert "phase 1 of 2: done before" in done.out
    assert_same(tmp_path, undisturbed)
    # nothing was done twice: one start from nothing, and only what was lost was done again
    assert [len(events(run, "done")) for run in (letters, lists, duo)] == [1, 1, 1]
    assert events(duo, "resume") == ["resumed from step_000000003"]


@pytest.mark.parametrize("side_by_side", [1, 2])
def test_ctrl_c_saves_what_runs_and_the_same_command_goes_on(shards, corpus, tmp_path, side_by_side):
    config = write_ensemble(tmp_path, shards, corpus)
    words = ("ensemble", config, f"modules.side_by_side={side_by_side}", f"modules.steps={10 * ALONE_STEPS}")
    process = start_leviathan(*words, env={"LEVIATHAN_FAULT": "step.before_update:0:4:sleep=3"})
    wait_until(lambda: len(losses(run_of(tmp_path, LETTERS))) >= 4 or process.poll() is not None, 100)
    assert process.poll() is None, process.communicate()
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == INTERRUPTED, out + err
    assert "stopped in duo-letters (exit 130); the same command goes on" in out
    assert not losses(run_of(tmp_path, DUO))
    assert bool(losses(run_of(tmp_path, LISTS))) == (side_by_side == 2)
    done = leviathan(*words)
    assert done.code == DONE, done.err + done.out
    for name in (LETTERS, LISTS):
        assert sorted(losses(run_of(tmp_path, name))) == list(range(1, 10 * ALONE_STEPS + 1))
        if side_by_side == 2:
            assert f"{name}  start" in done.out, "every line says whose it is"
    assert len(losses(run_of(tmp_path, DUO))) == STEPS


def test_a_module_that_cannot_go_on_is_named_and_left_out(shards, corpus, tmp_path):
    config = write_ensemble(tmp_path, shards, corpus)
    nan = ",".join(["step.before_update:0:2:nan"] * 9)
    done = leviathan("ensemble", config, "train.max_skips=0", env={"LEVIATHAN_FAULT": nan})
    assert done.code == 70
    (line,) = done.err.splitlines()
    assert line.startswith("error: the module letters failed (run duo-letters, exit 70): ")
    assert line.endswith("go on with the others: --without letters")
    done = leviathan("ensemble", config, "--without", "letters")
    assert done.code == DONE, done.err
    assert not run_of(tmp_path, LETTERS).committed_steps()
    assert len(losses(run_of(tmp_path, DUO))) == STEPS


def test_a_mixture_of_all_models_begins_from_one_seed_and_survives_a_kill_in_every_phase(shards, corpus, tmp_path):
    """`fusion: btx`, over two DeepSpeed ranks."""
    words = ("model.ensemble.fusion=btx", "modules.seed_steps=4")
    places = [tmp_path / "undisturbed", tmp_path / "killed"]
    for place in places:
        place.mkdir()
    reference, killed = (write_ensemble(place, shards, corpus, "deepspeed") for place in places)
    done = leviathan("ensemble", reference, *words, timeout=300)
    assert done.code == DONE, done.err + done.out
    assert "phase 1 of 3: the seed of all modules" in done.out
    names = ["duo-seed", *ALL]
    # no phase that is done before has a step of this number: only the one that is meant waits in it
    for name, step in ((names[0], 3), (LISTS, None), (DUO, STEPS - 1)):
        run, faults = run_of(places[1], name), HELD.replace(":0:4:", f":0:{step}:") if step else ""
        kill_when(places[1], killed, lambda run=run: bool(losses(run)), faults, *words)
    done = leviathan("ensemble", killed, *words, timeout=200)
    assert done.code == DONE, done.err + done.out
    assert "phase 1 of 3: done before" not in done.out, "a joint run that has begun needs no seed"
    for name in names:
        assert final_state(run_of(places[1], name)) == final_state(run_of(places[0], name)), name
        assert losses(run_of(places[1], name)) == losses(run_of(places[0], name)), name
