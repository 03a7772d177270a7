"""A copy of the code is whole, found again by its name, and known where it was changed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from configs.errors import ConfigError
from launcher.snapshot import check_code, keep_code


@pytest.fixture
def copy(tmp_path):
    return keep_code(tmp_path)


def test_a_copy_runs_by_itself_wherever_one_stands(copy, tmp_path):
    words = [sys.executable, "-P", "-c", "import launcher.cli, pretrain, sys; print(launcher.cli.__file__)"]
    elsewhere = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(copy)}}
    done = subprocess.run(words, **elsewhere, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str(copy / "launcher" / "cli.py")
    assert (copy / "configs" / "base.yaml").is_file()
    assert (copy / "slurm" / "job.sbatch").is_file()


def test_the_same_code_is_kept_once(copy, tmp_path):
    assert keep_code(tmp_path) == copy
    assert [path.name for path in tmp_path.iterdir()] == [copy.name]


@pytest.mark.parametrize("change", ["edit", "remove", "add", "rename"])
def test_a_copy_that_was_changed_is_refused(copy, tmp_path, change):
    file = copy / "pretrain" / "trainer.py"
    if change == "edit":
        file.write_text(file.read_text() + "\n")
    elif change == "remove":
        file.unlink()
    elif change == "add":
        (copy / "pretrain" / "more.py").write_text("")
    else:
        file.rename(file.with_name("trainers.py"))
    with pytest.raises(ConfigError, match="was changed since it was submitted"):
        check_code(copy)
    with pytest.raises(ConfigError, match="was changed since it was submitted"):
        keep_code(tmp_path)


def test_what_python_compiles_beside_it_changes_nothing(copy):
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(copy / "configs")], timeout=60, check=True)
    check_code(copy)
