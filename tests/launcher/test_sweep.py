"""A sweep: which runs it is, what they are called, and that one mistake keeps all of them from beginning."""

from __future__ import annotations

import pytest

from configs.errors import ConfigError, UsageError
from launcher.prepare import resolve, run_folder
from launcher.sweep import runs_of
from tests.conftest import leviathan

NAMED = ["run.name=base"]


def test_every_combination_is_a_run_whose_name_says_which():
    assert runs_of([], NAMED, ["optim.lr=1e-3,3e-4", "run.seed=0,1,2"]) == [
        [f"optim.lr={rate}", f"run.seed={seed}", f"run.name=base-lr-{rate}-seed-{seed}"]
        for rate in ("1e-3", "3e-4")
        for seed in (0, 1, 2)
    ]


def test_without_a_name_it_is_that_of_the_run_without_the_sweep():
    config, _ = resolve([], ["model.width=32"])
    ((_, name), _) = runs_of([], ["model.width=32"], ["optim.lr=1e-3,2e-3"])
    assert name == f"run.name={run_folder(config, []).name}-lr-1e-3"
    assert name != runs_of([], ["model.width=64"], ["optim.lr=1e-3,2e-3"])[0][1], "of another model it is another run"


def test_a_comma_within_brackets_parts_nothing():
    sweep = "model.mixers=[{name: attention}],[{name: correlation, options: {heads: 2}}, {name: attention}]"
    one, two = runs_of([], NAMED, [sweep])
    assert one == ["model.mixers=[{name: attention}]", "run.name=base-mixers-name-attention"]
    assert two[0] == "model.mixers=[{name: correlation, options: {heads: 2}}, {name: attention}]"
    for words in (one, two):
        resolve([], [*NAMED, *words])


@pytest.mark.parametrize(
    "sweep", ["optim.lr", "optim.lr=", "optim.lr=1e-3", "=1,2", "optim.lr=1e-3,,2e-3", "optim.lr=,"]
)
def test_what_names_no_values_is_told(sweep):
    with pytest.raises(UsageError, match="names no values to choose from; write for example"):
        runs_of([], NAMED, [sweep])


def test_two_values_that_would_be_one_run_are_told():
    with pytest.raises(UsageError, match=r"optim\.lr=1e-3 and optim\.lr=1e-3 would be one run, run\.name=base-lr-1e-3"):
        runs_of([], NAMED, ["optim.lr=1e-3,1e-3"])


@pytest.mark.parametrize("sweep", ["optim.lr=1e-3,fast", "optim.rate=1,2", "train.steps=10,-1"])
def test_a_mistake_in_any_value_keeps_all_from_beginning(sweep):
    with pytest.raises(ConfigError):
        runs_of([], NAMED, [sweep])


def test_the_command_prints_a_script_for_each(tiny, tmp_path):
    done = leviathan("submit", "slurm", tiny, "sweep.optim.lr=1e-3,3e-4", "sweep.run.seed=0,1", "--dry-run")
    assert done.code == 0, done.err
    names = [line.split("=")[1] for line in done.out.splitlines() if line.startswith("#SBATCH --job-name=")]
    assert names == ["tiny-lr-1e-3-seed-0", "tiny-lr-1e-3-seed-1", "tiny-lr-3e-4-seed-0", "tiny-lr-3e-4-seed-1"]
    assert not (tmp_path / "runs").exists()
    wrong = leviathan("submit", "slurm", tiny, "sweep.optim.lr=1e-3", "--dry-run")
    assert wrong.code == 2
    assert "Traceback" not in wrong.err
