"""A copy of the code is whole, found again by its name, and known where it was changed."""

from __future__ import annotations

import importlib.util
import marshal
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from configs.errors import ConfigError
from launcher.snapshot import check_code, keep_code
from tests.conftest import ROOT

JOBS_BEGIN_WITH = ("launcher.cli", "launcher.on_slurm", "launcher.supervise", "pretrain.run")
LOADED = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
packages = {name.partition(".")[0] for name in sys.argv[1:]}
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] in packages:
        print(name, module.__file__)
"""
"""Imports what it is given, and says of every module of the same packages which file it is."""


@pytest.fixture
def copy(tmp_path):
    return keep_code(tmp_path)


def test_a_copy_runs_by_itself_wherever_one_stands(copy, tmp_path):
    # the packages that are installed, or one that is missing in the copy would be taken from there unnoticed
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    words = [sys.executable, "-P", "-c", LOADED, *packages, *JOBS_BEGIN_WITH]
    elsewhere = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(copy)}}
    done = subprocess.run(words, **elsewhere, capture_output=True, text=True, timeout=60, check=True)
    loaded = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert loaded.keys() >= {*packages, *JOBS_BEGIN_WITH}
    assert loaded["launcher.cli"] == str(copy / "launcher" / "cli.py")
    assert not {name: file for name, file in loaded.items() if not Path(file).is_relative_to(copy)}
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


def test_it_is_compiled_as_it_is_made_so_that_ranks_need_not_and_tracebacks_name_it(copy):
    for file in copy.rglob("*.py"):
        compiled = Path(importlib.util.cache_from_source(str(file))).read_bytes()
        # the format of a .pyc: 16 bytes about its source, then the code
        assert marshal.loads(compiled[16:]).co_filename == str(file)
