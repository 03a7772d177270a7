"""Temporary folders: gone with their block, swept when their process died, left alone while somebody uses them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from data_pipeline.scratch import PREFIX, scratch, sweep
from tests.conftest import ROOT

HOLD = """
from data_pipeline.scratch import scratch
with scratch() as folder:
    (folder / "half.tar").write_bytes(b"half a shard")
    print(folder, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def _tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_a_folder_ends_with_its_block_also_when_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), scratch() as folder:  # noqa: PT012
        (folder / "a").write_text("x")
        sweep()
        assert (folder / "a").exists(), "it was swept while it was in use"
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_folder_is_swept_when_its_process_was_killed_and_not_before(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)},
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    held = Path(process.stdout.readline().strip())
    assert held.parent == tmp_path and held.name.startswith(PREFIX)
    with scratch():
        assert (held / "half.tar").exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (held / "half.tar").exists()
    with scratch() as other:
        assert list(tmp_path.iterdir()) == [other]


def test_what_others_have_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "of-somebody").mkdir()
    (tmp_path / "of-somebody" / "a").write_text("x")
    (tmp_path / f"{PREFIX}file").write_text("x")
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "of-somebody")
    sweep()
    assert (tmp_path / "of-somebody" / "a").exists() and (tmp_path / f"{PREFIX}file").exists()
