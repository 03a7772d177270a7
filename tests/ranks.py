"""Real ranks for tests: a script run by several processes that form one gloo group, bounded in time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_ranks(module: str, task: str, world: int, out: Path, timeout: float = 100.0, **arguments: Any) -> Any:
    """Run `task` of a worker module on `world` ranks; return what rank 0 gave back. Fails with every rank's output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(world):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        with open(out / f"rank{rank}.log", "wb") as log:
            words = [sys.executable, "-m", module, task, str(out), json.dumps(arguments)]
            processes.append(subprocess.Popen(words, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout) for process in processes]
    except subprocess.TimeoutExpired:
        codes = ["timed out"]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes):
        logs = "\n".join(f"--- rank {r}\n{(out / f'rank{r}.log').read_text()[-3000:]}" for r in range(world))
        raise AssertionError(f"{module} {task} on {world} ranks ended with {codes}\n{logs}")
    return json.loads((out / "result.json").read_text())


def work(tasks: dict[str, Any]) -> None:
    """What a worker module does as one rank: the task it is asked for; rank 0 gives back what `run_ranks` returns."""
    # here, since whoever starts ranks needs no torch
    import torch

    from pretrain.engine_deepspeed import start_distributed
    from pretrain.parallel import Ranks, finish
    from pretrain.run import leave

    torch.set_num_threads(1)
    task, out, arguments = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    start_distributed(torch.device("cpu"), 60)
    result = tasks[task](out, **arguments)
    if Ranks.from_environment().first:
        (out / "result.json").write_text(json.dumps(result))
    finish()
    leave(0)
