"""`leviathan ensemble`: what is done and what is left, seen from run folders alone; and supervisors side by side."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from configs.errors import CANNOT_GO_ON, DONE, INTERRUPTED, PREEMPTED, ConfigError, UsageError
from launcher import ensemble, several
from launcher.check import check_run
from launcher.ensemble import train_ensemble
from launcher.prepare import Prepared, make_ready, resolve
from launcher.runs import state_of
from launcher.several import Supervisors
from launcher.status import show_one
from launcher.texts import evaluate_run
from launcher.why import why
from pretrain.run_folder import RunFolder, read_lines
from tests.conftest import events, losses
from tests.small_ensemble import ALONE_STEPS, MODULES, STEPS, Here, trained, write_ensemble

ALL = ["duo-letters", "duo-lists", "duo"]


@pytest.fixture
def config(shards: Path, corpus: Path, tmp_path: Path) -> Path:
    return write_ensemble(tmp_path, shards, corpus)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    made = Here()
    monkeypatch.setattr(Supervisors, "train", lambda *words, **more: made.train(*words, **more))
    return made


def run_all(config: Path, *words: str, without: tuple[str, ...] = ()) -> int:
    return train_ensemble([str(config)], words, ranks=None, without=without)


def run_of(config: Path, name: str = "duo") -> RunFolder:
    return RunFolder(config.parent / "runs" / name)


# ---- phases


def test_one_command_trains_modules_then_joins_them_and_does_nothing_twice(config, here, capsys):
    assert run_all(config) == DONE
    assert here.trained == ALL
    told = capsys.readouterr().out
    assert "module 2 of 2, lists: run duo-lists" in told
    assert "phase 2 of 2: letters, lists joined: run duo" in told
    assert "duo at step 8: loss by module, and how relevant it is" in told
    newest = max(losses(run_of(config)))
    assert newest == STEPS
    assert run_all(config) == DONE
    assert here.trained == ALL
    told = capsys.readouterr().out
    assert "phase 1 of 2: done before, its modules are joined in duo" in told
    assert f"phase 2 of 2: done before, step {STEPS} of duo" in told
    assert "loss by module" in told


@pytest.mark.parametrize("killed", ALL)
def test_the_same_command_goes_on_where_it_was_ended(config, here, capsys, killed):
    here.ends = {killed: 137}
    assert run_all(config) == 137
    told = capsys.readouterr().out
    if killed == "duo":
        assert "ended with exit code 137; `leviathan why duo` says why and what to do" in told
    else:
        assert f"stopped in {killed} (exit 137); the same command goes on" in told
    here.ends, before = {}, here.trained.copy()
    assert before == ALL[: ALL.index(killed) + 1]
    assert run_all(config) == DONE
    assert here.trained == [*before, *ALL[ALL.index(killed) :]]
    told = capsys.readouterr().out
    for name in ALL[: ALL.index(killed)]:
        assert f"done before, step {ALONE_STEPS} of {name}\n" in told


def test_a_module_that_fails_for_good_is_named_and_the_others_join_without_it(config, here, capsys):
    here.ends = {"duo-lists": CANNOT_GO_ON}
    assert run_all(config) == CANNOT_GO_ON
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "error: the module lists failed (run duo-lists, exit 70): the loss is not finite; lower optim.lr; then give the"
        " same command again, or go on with the others: --without lists"
    )
    assert run_all(config, without=("lists",)) == DONE
    assert here.trained == ["duo-letters", "duo-lists", "duo"]
    assert list(run_of(config).facts()["from"]["modules"]) == ["letters"]
    # the ensemble of both is another run
    with pytest.raises(ConfigError, match=r"run duo began with another configuration \(model\.ensemble\.modules"):
        run_all(config)


def test_a_name_made_of_the_files_content_is_the_same_without_a_module(config, here):
    text = config.read_text().replace("name: duo, ", "")
    config.write_text(text)
    here.ends = {}
    assert run_all(config, without=("lists",)) == DONE
    (joint,) = {name for name in here.trained if not name.endswith("-letters")}
    assert here.trained == [f"{joint}-letters", joint]
    plan = ensemble.plan_ensemble([str(config)], [], None, ())
    assert plan.folder.name == joint


def test_on_weights_and_biases_the_runs_of_an_ensemble_are_one_group(config):
    plan = ensemble.plan_ensemble([str(config)], [], None, ())
    assert plan.config.log.wandb_group == plan.alone["lists"].log.wandb_group == "duo"
    plan = ensemble.plan_ensemble([str(config)], ["log.wandb_group=mine"], None, ())
    assert plan.alone["lists"].log.wandb_group == "mine"


def test_modules_of_another_configuration_are_not_taken_for_these(config, here):
    here.ends = {"duo": 137}
    run_all(config)
    with pytest.raises(ConfigError, match=r"run duo-letters began with another configuration \(model\.width: 16 → 32"):
        run_all(config, "model.width=32")
    # another fusion finds the same modules; more steps go on
    here.ends, here.trained = {}, []
    assert run_all(config, "model.ensemble.fusion=posterior", f"modules.steps={ALONE_STEPS + 2}") == DONE
    assert here.trained == ALL
    assert events(run_of(config, "duo-lists"), "resume") == [f"resumed from step_{ALONE_STEPS:09d}"]
    assert run_of(config).facts()["from"]["modules"]["lists"]["step"] == ALONE_STEPS + 2


def test_an_ensemble_that_began_otherwise_and_a_single_model_are_refused(config, here):
    trained(make_ready(*resolve([config], ["train.steps=1"]), run_of(config)))
    with pytest.raises(ConfigError, match="run duo has begun without modules trained alone"):
        run_all(config)
    with pytest.raises(UsageError, match="no modules; name some under model"):
        run_all(config, "model.ensemble.modules=[]", "model.ensemble.fusion=none")
    assert here.trained == []


def test_without_heldout_text_there_is_no_table_and_no_failure(config, here, capsys, monkeypatch):
    monkeypatch.setattr("pretrain.evaluate.HeldOut.__init__", lambda self, *rest: setattr(self, "rows", []))
    assert run_all(config, "eval.every=0") == DONE
    assert "no table of modules: the shards in" in capsys.readouterr().out


# ---- what other verbs say


def test_a_check_names_the_modules_and_the_command(config, capsys):
    check_run([str(config)], [], None)
    out = capsys.readouterr().out
    assert "letters, lists: two models each, fusion mhc" in out
    assert out.splitlines()[-1] == f"ready: leviathan ensemble {config}"


def test_figures_without_a_module_say_so_and_are_kept_apart(config, here, capsys):
    run_all(config)
    run, before = run_of(config), len(list(read_lines(run_of(config).evals)))
    capsys.readouterr()
    evaluate_run(str(run.path), step=None, rows=8, device="cpu", without=["letters"])
    told = capsys.readouterr().out
    assert "\nwithout letters: the relevance of the other modules adds up to 1\n" in told
    (record,) = read_lines(run.path / "evals_without.jsonl")
    assert record["without"] == ["letters"]
    for source in MODULES:
        assert record["model"][source]["relevance"] == {"letters": 0.0, "lists": pytest.approx(1.0)}
    assert len(list(read_lines(run.evals))) == before
    evaluate_run(str(run.path), step=None, rows=8, device="cpu")
    *_, whole = read_lines(run.evals)
    for source in MODULES:
        of_source = whole["model"][source]
        assert sum(of_source["relevance"].values()) == pytest.approx(1)
        assert of_source["loss"]["lists"] > 0
    with pytest.raises(UsageError, match="no module 'lists2'"):
        evaluate_run(str(run.path), step=None, rows=8, device="cpu", without=["lists2"])
    show_one(str(run.path))
    assert "letters=" in capsys.readouterr().out


def test_what_to_do_with_a_module_that_was_stopped_names_the_right_command(config, here):
    here.ends = {"duo-lists": PREEMPTED}
    run_all(config)
    run = run_of(config, "duo-lists")
    run.event("launch", "attempt 0: starting 1 rank here")
    run.event("stop", "preempted: left after step 3; start it again to go on", code=PREEMPTED, step=3)
    assert "the same `leviathan ensemble` command goes on" in why(state_of(str(run.path)))


# ---- supervisors


@pytest.fixture
def broken(config: Path) -> list[Prepared]:
    """Two runs whose ranks end at once with 78, without torch."""
    runs = []
    for name in ("one", "two"):
        whole, launch = resolve([config], [f"run.name={name}"])
        runs.append(make_ready(whole, launch, run_of(config, name)))
        runs[-1].folder.config.write_text("model: {width: -1}\n")
    return runs


def test_after_one_that_fails_none_is_started_but_those_beside_it_end(broken):
    with Supervisors(several.Terminal(highlight=False)) as supervisors:
        assert supervisors.train(broken) == {"one": 78}
        assert supervisors.train(broken, side_by_side=2) == {"one": 78, "two": 78}
        assert supervisors.asked is None


def test_a_request_to_stop_starts_nothing_more(broken):
    before = signal.getsignal(signal.SIGINT)
    with Supervisors(several.Terminal(highlight=False)) as supervisors:
        os.kill(os.getpid(), signal.SIGINT)
        assert supervisors.train(broken) == {}
        assert supervisors.asked == INTERRUPTED
    assert signal.getsignal(signal.SIGINT) == before


def test_runs_side_by_side_have_devices_of_their_own(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert several._own_devices(1, 2) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    assert several._own_devices(0, 2) == {"CUDA_VISIBLE_DEVICES": "7,5"}
    assert several._own_devices(1, 2) == {"CUDA_VISIBLE_DEVICES": "3,1"}
