"""What `srun` starts on a node: finds out which rank it is, checks the code, and becomes that rank.

`python -m launcher.slurm_task MODULE FOLDER` becomes `python -m MODULE FOLDER`; no torch before that.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from configs.errors import LeviathanError
from launcher.network import interface_towards
from launcher.screen import cores
from launcher.snapshot import ROOT, check_code
from launcher.team import threads_of
from pretrain.run_folder import RunFolder


def main(arguments: list[str]) -> NoReturn:
    """Become the rank, or end with the reason why that cannot be."""
    # until the rank listens: a request would kill it, and the supervisor repeats requests
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    module, place = arguments
    folder, rank = RunFolder(Path(place)), int(os.environ["SLURM_PROCID"])
    try:
        if os.environ["SLURM_LOCALID"] == "0" and ROOT.name.startswith("code-"):
            check_code(ROOT)
        os.environ |= _of_this_rank(rank)
    except LeviathanError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        note = {"rank": rank, "code": error.exit_code, "message": str(error)}
        folder.exit_of(rank).write_text(json.dumps(note))
        sys.exit(error.exit_code)
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, str(folder.path)])


def _of_this_rank(rank: int) -> dict[str, str]:
    local = int(os.environ["LEVIATHAN_RANKS_OF_A_NODE"])
    interface = interface_towards(os.environ["MASTER_ADDR"])
    chosen = {name: os.environ.get(name, interface) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    # a task that Slurm has bound to cores has those to itself
    bound = cores() < (os.cpu_count() or 1)
    return (
        threads_of(1 if bound else local)
        | chosen
        | {
            "RANK": str(rank),
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "LOCAL_SIZE": str(local),
        }
    )


if __name__ == "__main__":
    main(sys.argv[1:])
