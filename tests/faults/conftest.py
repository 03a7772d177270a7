"""What tests of faults compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.run_folder import RunFolder
from tests.conftest import leviathan, write_tiny


@pytest.fixture(scope="session")
def undisturbed(shards: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The tiny run on two ranks of this machine, with nothing happening."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = leviathan("train", write_tiny(folder, shards, corpus), "--ranks", 2)
    assert done.code == 0, done.err
    return RunFolder(folder / "runs" / "tiny")
