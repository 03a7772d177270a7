"""The code that runs is the code that was submitted: a copy in the run folder, whose name is its hash."""

from __future__ import annotations

import compileall
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from configs.errors import ConfigError

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "data_pipeline", "launcher", "pretrain", "slurm")
_DIGITS = 16


def keep_code(folder: Path) -> Path:
    """Copy the project's packages into a run folder, if this very code is not there yet; return the copy."""
    copy = folder / code_name()
    if not copy.is_dir():
        draft = Path(tempfile.mkdtemp(prefix="code.draft-", dir=folder))
        for file in _files(ROOT):
            (draft / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, draft / file)
        # once here, not by every rank of every start; tracebacks name the copy, not the draft
        compileall.compile_dir(draft, quiet=2, stripdir=str(draft), prependdir=str(copy))
        try:
            os.replace(draft, copy)
        except OSError:  # another submission was faster
            shutil.rmtree(draft)
    check_code(copy)
    return copy


def code_name() -> str:
    """What a copy of this very code is called."""
    return f"code-{_hash(ROOT)}"


def check_code(copy: Path) -> None:
    """Raises ConfigError where a copy is no longer what its name says."""
    found = _hash(copy)
    if copy.name != f"code-{found}":
        raise ConfigError(
            f"{copy} was changed since it was submitted (its hash is now {found}); remove it and submit again"
        )


def _hash(root: Path) -> str:
    digest = hashlib.sha256()
    for file in _files(root):
        digest.update(f"{file}\0{hashlib.sha256((root / file).read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def _files(root: Path) -> list[str]:
    """Every file of the packages, by its path within `root`."""
    found = []
    for package in PACKAGES:
        for file in (root / package).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                found.append(str(file.relative_to(root)))
    return sorted(found)
