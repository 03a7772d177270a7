"""The supervisor of one run that is ready to start: `python -m launcher.supervise FOLDER`; it dies with its parent."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from configs.errors import LeviathanError
from configs.load import load
from launcher.config import LaunchConfig
from launcher.on_local import LocalRun
from pretrain.run import die_with_parent
from pretrain.run_folder import RunFolder


def main(arguments: list[str]) -> int:
    """Run to the end; return the exit code. What happens is told in the run folder."""
    die_with_parent()
    os.umask(0o077)  # a run is its owner's alone
    folder = RunFolder(Path(arguments[0]))
    try:
        return LocalRun(folder, load(LaunchConfig, [folder.launch]), lambda: None).run()
    except LeviathanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
