"""Temporary folders that do not outlive their process by long: the next one on the machine removes what was left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "leviathan-drafts-"


@contextlib.contextmanager
def scratch(where: Path | None = None) -> Iterator[Path]:
    """A new folder in `where`, else in $TMPDIR or where the system keeps such files, while the block lasts."""
    sweep(where)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=where))
    handle = os.open(folder, os.O_RDONLY)
    try:
        # the lock ends with the process, however that ends, and says that the folder is nobody's
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def sweep(where: Path | None = None) -> None:
    """Remove the folders of processes that are gone."""
    for folder in Path(where or tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                # one that holds nothing may just be begun, and not yet be locked
                if any(folder.iterdir()):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)
