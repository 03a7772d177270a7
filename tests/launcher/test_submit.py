"""The batch script: every value arrives exactly or is refused, and nothing of it is executed."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from launcher.config import LaunchConfig, SlurmConfig
from launcher.prepare import resolve
from launcher.submit import render, render_verb
from pretrain.run_folder import RunFolder
from tests.conftest import leviathan

NASTY = st.one_of(
    st.text(max_size=40),
    st.sampled_from([
        "a; touch pwned", "$(touch pwned)", "`touch pwned`", "a\n#SBATCH --uid=0", "a\r#SBATCH --wrap=x", "'", '"',
        "\\",
        "a b", "a\u2028b", "-",
        "---", "...", "--- a", "%a", "--uid=0", "", "*", "~", "main,debug", "a%j", "x\x00y", "${HOME}", "a&&b", "|cat",
    ]),
    st.text(alphabet="abzAZ019._:@=,+/%-", min_size=1, max_size=40),
)  # fmt: skip
FIELDS = ("partition", "account", "qos", "reservation", "constraint", "mem")


def script(tmp_path, name="tiny", **asks) -> str:
    """The script of a run that is submitted from `tmp_path`; in place of Python it only says what Python was to do."""
    launch = LaunchConfig(ranks=4, nodes=2, slurm=SlurmConfig(**{"python": "/bin/echo", **asks}))
    # a script begins with going to where it was submitted
    with contextlib.chdir(tmp_path):
        return render(RunFolder(tmp_path / name), launch, tmp_path / name / "code-0")


def tried(tmp_path, **asks) -> tuple[str, str | None]:
    """The script, and why there is none."""
    try:
        return script(tmp_path, **asks), None
    except ValueError as error:
        return "", str(error)


def options_of(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def assert_harmless(text: str, folder: Path, name: str = "tiny") -> None:
    """The script runs to its last line, which does what it should and no more, and nothing is left behind."""
    before = sorted(folder.iterdir())
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, cwd=folder, timeout=20, check=False)
    said = f"-P -m launcher.on_slurm {folder.resolve() / name}\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr
    assert sorted(folder.iterdir()) == before


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(FIELDS), value=NASTY)
def test_a_value_for_slurm_arrives_exactly_or_is_refused(tmp_path, field, value):
    text, refusal = tried(tmp_path, **{field: value})
    if refusal is not None:
        assert "batch script cannot carry" in refusal
        return
    assert options_of(text).count(f"--{field}={value}") == 1
    assert_harmless(text, tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=NASTY)
def test_an_option_of_ones_own_arrives_exactly_or_is_refused(tmp_path, value):
    text, refusal = tried(tmp_path, extra=(value,))
    if refusal is not None:
        assert any(words in refusal for words in ("cannot carry", "is no option", "has a key of its own"))
        return
    assert options_of(text)[-1] == value
    assert value.startswith("--")
    assert_harmless(text, tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NASTY)
def test_a_name_arrives_exactly_or_is_refused(tmp_path, name):
    try:
        # in quotes, or YAML would read some names as numbers
        config, _ = resolve([], [f"run.name={json.dumps(name, ensure_ascii=False)}"])
    except ConfigError:
        return
    assert config.run.name == name
    text = script(tmp_path, name=name)
    assert options_of(text).count(f"--job-name={name}") == 1
    assert_harmless(text, tmp_path, name)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(
        st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=20), max_size=3
    )
)
def test_words_before_python_are_never_read_by_a_shell(tmp_path, words):
    """The wrapper is handed to srun as it is; it does not stand in the script at all."""
    text = script(tmp_path, wrapper=tuple(words))
    assert text == script(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(NASTY, max_size=3))
def test_another_command_of_ours_begins_with_them_each_one_word(tmp_path, words):
    """It is no step of srun's; what builds an ensemble's shards needs the container as ranks do."""
    asks = SlurmConfig(wrapper=("printf", "%s\\0", *words), python="/opt/python")
    with contextlib.chdir(tmp_path):
        try:
            text = render_verb(RunFolder(tmp_path / "run"), LaunchConfig(slurm=asks), tmp_path, "data", ["data", "a b"])
        except ConfigError as error:
            text, refusal = "", str(error)
    if not text:
        assert "no script can hold the line" in refusal
        return
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(["bash"], input=text.encode(), capture_output=True, cwd=tmp_path, timeout=20, check=False)
    called = [*words, "/opt/python", "-P", "-m", "launcher", "data", "a b"]
    assert done.stdout.decode() == "".join(f"{word}\0" for word in called), done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "option", ["--uid=0", "--wrap=x", "--part=x", "--nodes=9", "--no-requeue", "--array=1-9", "-N2", "--"]
)
def test_options_that_are_the_launchers_are_refused(option):
    with pytest.raises(ValueError, match=r"has a key of its own|is no option"):
        SlurmConfig(extra=(option,))


@pytest.mark.parametrize("time", ["90", "1440", "1:30:00", "1000:00:00", "0-01", "2-00:00:00", "90:00"])
def test_times_are_those_of_sbatch(tmp_path, time):
    assert f"--time={time}" in options_of(script(tmp_path, time=time))


@pytest.mark.parametrize("time", ["1h", "", "1;2", "-5", "1:2:3:4"])
def test_other_times_are_refused(time):
    with pytest.raises(ValueError, match="is no time"):
        SlurmConfig(time=time)


@pytest.mark.parametrize("time", ["4", "00:04:00", "3:59"])
def test_a_time_without_room_to_train_is_refused(tmp_path, time):
    with pytest.raises(ConfigError, match="leaves no time to train"):
        script(tmp_path, time=time)
    assert "--signal=B:USR1@60" in options_of(script(tmp_path, time=time, before_limit_s=60))


def test_a_script_can_be_read(tmp_path):
    (tmp_path / "it's.env").write_text("export CUDA_HOME=/opt/cuda\n")
    text = script(tmp_path, partition="gpu", time="1:00:00", gpus_per_node=2, env_file=str(tmp_path / "it's.env"))
    assert options_of(text) == [
        "--job-name=tiny", "--nodes=2", "--ntasks-per-node=2", "--partition=gpu", "--time=1:00:00", "--gpus-per-node=2",
        f"--output={tmp_path}/tiny/slurm-%j.log", "--open-mode=append", "--requeue", "--signal=B:USR1@180",
    ]  # fmt: skip
    assert "\n\n\n" not in text
    assert text.splitlines()[0] == "#!/bin/bash"
    assert_harmless(text, tmp_path)


def test_an_env_file_may_read_what_is_not_set_and_must_succeed(tmp_path):
    env_file = tmp_path / "cluster.env"
    for lines, code in (('export ADDED="$SURELY_UNSET"x', 0), ("false", 1)):
        env_file.write_text(f"{lines}\n")
        text = script(tmp_path, env_file=str(env_file))
        done = subprocess.run(["bash"], input=text, text=True, capture_output=True, timeout=20, check=False)
        assert (done.returncode, "launcher.on_slurm" in done.stdout) == (code, code == 0), done.stderr


def test_an_env_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"launch\.slurm\.env_file: there is no file"):
        script(tmp_path, env_file=str(tmp_path / "none"))


def test_a_dry_run_prints_the_script_and_writes_nothing(tiny, tmp_path):
    done = leviathan("submit", "slurm", tiny, "--nodes", 2, "launch.slurm.gpus_per_node=4", "--dry-run")
    assert done.code == 0, done.err
    assert "--ntasks-per-node=4" in options_of(done.out)
    assert not (tmp_path / "runs").exists()


def test_without_slurm_it_says_where_to_go(tiny):
    done = leviathan("submit", "slurm", tiny, env={"PATH": "/nowhere"})
    assert done.code == 78
    assert done.err == "error: there is no sbatch on this machine; submit from a login node of the cluster\n"


def test_ranks_that_nodes_cannot_share_are_told(tiny):
    done = leviathan("submit", "slurm", tiny, "--nodes", 2, "--ranks", 3, "--dry-run")
    assert done.code == 78
    assert "3 ranks cannot be shared evenly by 2 nodes" in done.err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--without", "letters"], "this run joins none"),
        (["--after", "tomorrow"], "--after 'tomorrow' is no job"),
        (["model.ensemble.modules=[a,b]", "model.ensemble.fusion=uniform", "--after", "7"], "without --after"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tiny, words, reason):
    done = leviathan("submit", "slurm", tiny, *words, "--dry-run")
    assert done.code == 2
    assert reason in done.err
    assert done.err.count("\n") == 1
