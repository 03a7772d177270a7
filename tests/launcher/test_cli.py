"""The command line itself: what it lists, how fast it answers, what it says to words it does not know."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from launcher import cli
from tests.conftest import ROOT, leviathan

VERBS = (
    "doctor", "data", "check", "mixers", "train", "ensemble", "submit", "status", "logs", "stop", "why", "eval",
    "generate", "report",
)  # fmt: skip
LATER = ("compare", "plan", "drill", "export")


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_lists_every_verb_and_none_that_does_not_work_yet():
    before = cpu_of_children()
    done = leviathan("--help")
    assert cpu_of_children() - before <= 1.0
    assert done.code == 0
    for verb in VERBS:
        assert f" {verb} " in done.out
    for verb in LATER:
        assert f" {verb} " not in done.out


def test_help_imports_no_torch_and_nothing_else_that_is_heavy():
    words = [sys.executable, "-X", "importtime", "-m", "launcher", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "deepspeed", "pyarrow", "matplotlib", "wandb", "ray"}


@pytest.mark.parametrize(
    "words",
    [(verb,) for verb in VERBS]
    + [("data", verb) for verb in ("build", "check", "show", "explain", "cluster")]
    + [("mixers", verb) for verb in ("check", "new")],
)
def test_every_verb_explains_itself(words):
    done = CliRunner().invoke(cli.app, [*words, "--help"], prog_name="leviathan")
    assert done.exit_code == 0
    assert f"Usage: leviathan {' '.join(words)}" in done.output


def test_no_verb_at_all_shows_the_help():
    for words in ((), ("data",)):
        done = leviathan(*words)
        assert done.code == 0
        assert "Usage: leviathan" in done.out


def test_the_version_is_told():
    assert leviathan("--version").out.startswith("leviathan 0.")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("trian",), "No such command 'trian'. Did you mean 'train'?; see `leviathan --help`"),
        (("data", "chekc", "x"), "No such command 'chekc'. Did you mean 'check'?; see `leviathan data --help`"),
        (
            ("train", "x", "--rnks", "2"),
            "No such option: --rnks (Possible options: --ranks); see `leviathan train --help`",
        ),
        (("generate", "x"), "Missing option '--prompt'; see `leviathan generate --help`"),
        (("train",), "Missing argument 'CONFIG | KEY=VALUE'; see `leviathan train --help`"),
        (("eval", "x", "--rows", "few"), "--rows few is no number of rows; write for example 256, or all"),
        (("doctor", "now"), "a configuration is looked at with --nodes alone; leave 'now' out"),
    ],
)
def test_words_it_does_not_know_are_one_line_and_exit_2(words, told):
    done = leviathan(*words)
    assert (done.code, done.err) == (2, f"error: {told}\n")


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m launcher mixers | head -c 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_the_table_of_mixers_is_made_from_the_mixers_themselves():
    done = leviathan("mixers")
    assert done.code == 0
    names = {path.stem for path in (ROOT / "pretrain/mixers").glob("*.py")} - {"__init__"}
    for name in names:
        assert f"\n{name} " in done.out
    assert "y = softmax(q k^T / sqrt(E)) v" in done.out
    assert "isolates" in done.out
