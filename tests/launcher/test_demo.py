"""The demo's proof can fail: two runs that differ in the least are told apart, and a run that nothing befell proves
nothing."""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launcher import demo
from launcher.prepare import resolve
from pretrain.checkpoint_files import MANIFEST, own_hash, verify
from pretrain.config import total_steps
from pretrain.run_folder import RunFolder, append_line, read_lines, step_name
from tests.small_run import small_config, train_small

STEPS = 12


@pytest.fixture(scope="module")
def trained(shards: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that nothing happened to."""
    return train_small(small_config(tmp_path_factory.mktemp("demo"), shards, corpus, "control"))


@pytest.fixture
def control(trained: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(trained.path, tmp_path / "control")
    return RunFolder(tmp_path / "control")


@pytest.fixture
def killed(control: RunFolder, tmp_path: Path) -> RunFolder:
    """The same run, with what a supervisor tells when a rank dies; steps 6 and 7 are there twice."""
    shutil.copytree(control.path, tmp_path / "killed")
    run = RunFolder(tmp_path / "killed")
    rows = list(read_lines(run.metrics))
    write(run.metrics, rows[:7] + [row | {"attempt": 1} for row in rows[5:]])
    run.event("fault", "rank 1 (pid 7, host here) died in phase 'step' of step 8: SIGKILL", rank=1, step=8)
    run.event("restart", "restart 1/∞ from step 5, 3 steps to redo", step=5, redo=3)
    return run


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def prove(killed: RunFolder, control: RunFolder) -> str:
    """What is printed."""
    screen = Console(file=io.StringIO(), width=1000)
    demo._prove(screen, killed, control, STEPS)
    return screen.file.getvalue()


def change_row(run: RunFolder, step: int, change: Callable[[dict], dict | None]) -> None:
    """Change the last line of a step; None takes it away."""
    rows = list(read_lines(run.metrics))
    last = max(n for n, row in enumerate(rows) if row["step"] == step)
    changed = change(rows[last])
    write(run.metrics, [*rows[:last], *([] if changed is None else [changed]), *rows[last + 1 :]])


def test_runs_that_are_equal_are_a_proof_and_it_is_recorded(killed, control):
    told = prove(killed, control)
    (proof,) = (event for event in killed.history() if event["event"] == "proof")
    assert proof["message"] in told
    assert "rank 1 was killed, the run went on from step 5 by itself and did 3 steps again" in proof["message"]
    last = control.steps()[STEPS]["loss"].hex()
    assert f"all {STEPS} losses equal the control's to the last bit (step {STEPS}: {last})" in proof["message"]
    assert not [event for event in control.history() if event["event"] == "proof"]


@pytest.mark.parametrize("whose", ["killed", "control"])
@pytest.mark.parametrize("step", [1, 7, STEPS])
def test_a_loss_that_differs_in_its_last_bit_is_found(killed, control, whose, step):
    run = {"killed": killed, "control": control}[whose]
    change_row(run, step, lambda row: row | {"loss": math.nextafter(row["loss"], 9.0)})
    refused(killed, control, f"the losses differ from the control's, first at step {step}")


@pytest.mark.parametrize("whose", ["killed", "control", "both"])
def test_a_step_that_is_missing_is_found(killed, control, whose):
    for run in {"killed": [killed], "control": [control], "both": [killed, control]}[whose]:
        change_row(run, STEPS, lambda row: None)
    refused(killed, control, "the losses differ from the control's")


def test_a_bit_of_the_final_state_is_found_although_its_manifest_agrees(killed, control):
    path = killed.checkpoints / step_name(STEPS)
    manifest = json.loads((path / MANIFEST).read_bytes())
    data = bytearray((path / manifest["files"][0]["name"]).read_bytes())
    data[-1] ^= 1
    (path / manifest["files"][0]["name"]).write_bytes(data)
    assert verify(path) is not None
    manifest["files"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    manifest.pop("sha256")
    (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": own_hash(manifest)}))
    assert verify(path) is None
    refused(killed, control, "the final state differs from the control's although no loss does")


@pytest.mark.parametrize("absent", ["fault", "restart"])
def test_a_run_that_nothing_befell_proves_nothing(killed, control, absent):
    write(killed.events, [event for event in killed.history() if event["event"] != absent])
    refused(killed, control, "no rank died: there is nothing to prove")


def refused(killed: RunFolder, control: RunFolder, sentence: str) -> None:
    with pytest.raises(demo.DemoFailedError) as told:
        prove(killed, control)
    assert str(told.value).startswith(sentence)
    assert told.value.exit_code == 1
    assert not [event for event in killed.history() if event["event"] == "proof"]


def test_the_demo_kills_a_rank_where_only_the_joint_run_comes_to():
    config, launch = resolve([demo.CONFIG], [])
    assert config.modules.steps < config.modules.steps + demo.LATER < total_steps(config)
    assert (config.modules.steps + demo.LATER) % config.checkpoint.every, "some steps are done again"
    assert set(config.model.ensemble.modules) == set(config.data.sources)
    assert launch.ranks == 2


def test_the_picture_is_of_the_newest_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, pictures = RunFolder(tmp_path), []
    for share in (0.25, 0.75):
        of_python = {"relevance": {"python": share, "cpp": 1 - share}, "loss": {"python": 2.0, "cpp": 3.0}}
        append_line(run.evals, {"step": 1, "sources": {"python": {}}, "model": {"python": of_python}})
        demo._draw(run)
        pictures.append((tmp_path / "relevance.png").read_bytes())
    assert pictures[0].startswith(b"\x89PNG")
    assert pictures[0] != pictures[1]


def test_a_part_that_fails_ends_the_demo(capfd):
    screen = Console(file=io.StringIO(), width=1000)
    with pytest.raises(demo.DemoFailedError, match=r"`leviathan train nothing\.yaml` ended with 2"):
        demo._part(screen, "2. train", "train", "nothing.yaml")
    assert "no configuration file 'nothing.yaml'" in capfd.readouterr().err
