"""Real ranks for tests: processes that form one gloo group and do task after task of a script, bounded in time.

They stay until a file's tests are over (`end_all`), since starting them costs more than most of their tasks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.ports import free_ports

ROOT = Path(__file__).parents[1]


class Team:
    """Ranks of a worker module; they end when this process does."""

    def __init__(self, module: str, world: int) -> None:
        (port,) = free_ports(1)
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._processes = []
        for rank in range(world):
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
            with open(self._log(rank), "wb") as log:
                self._processes.append(
                    subprocess.Popen([sys.executable, "-m", module], env=environment, cwd=ROOT, text=True,
                                     stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)
                )  # fmt: skip

    def do(self, task: str, out: Path, timeout: float, arguments: dict[str, Any]) -> Any:
        """What rank 0 gives back for a task. Fails with every rank's output where one ends or is late."""
        end = time.monotonic() + timeout
        for rank, process in enumerate(self._processes):
            assert process.stdin is not None
            process.stdin.write(json.dumps([task, str(out), str(self._result(rank)), arguments]) + "\n")
            process.stdin.flush()
        while not all(self._result(rank).exists() for rank in range(len(self._processes))):
            codes = [process.poll() for process in self._processes]
            if any(code is not None for code in codes) or time.monotonic() > end:
                raise AssertionError(f"{task}: not done within {timeout} s, or ended with {codes}\n{self._said()}")
            time.sleep(0.02)
        results = [json.loads(self._result(rank).read_text()) for rank in range(len(self._processes))]
        for rank in range(len(self._processes)):
            self._result(rank).unlink()
        return results[0]

    def end(self) -> None:
        """Kill them: what they were asked for is done, or cannot be."""
        for process in self._processes:
            process.kill()
            process.communicate()
        shutil.rmtree(self._folder)

    def _said(self) -> str:
        return "\n".join(f"--- rank {r}\n{self._log(r).read_text()[-3000:]}" for r in range(len(self._processes)))

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.log"

    def _result(self, rank: int) -> Path:
        return self._folder / f"result{rank}.json"


_TEAMS: dict[tuple[str, int], Team] = {}


def run_ranks(module: str, task: str, world: int, out: Path, timeout: float = 100.0, **arguments: Any) -> Any:
    """Run `task` of a worker module on `world` ranks; return what rank 0 gave back. Fails with every rank's output."""
    out.mkdir(parents=True, exist_ok=True)
    team = _TEAMS.pop((module, world), None) or Team(module, world)
    try:
        result = team.do(task, out, timeout, arguments)
    except BaseException:
        team.end()
        raise
    _TEAMS[module, world] = team
    return result


def end_all() -> None:
    """End every rank that waits for a task."""
    while _TEAMS:
        _TEAMS.popitem()[1].end()


def work(tasks: dict[str, Any]) -> None:
    """What a worker module does as one rank: the tasks it is asked for; rank 0 gives back what `run_ranks` returns."""
    # here, since whoever starts ranks needs no torch
    import torch

    from pretrain.engine_deepspeed import start_distributed
    from pretrain.parallel import Ranks

    torch.set_num_threads(1)
    start_distributed(torch.device("cpu"), 60)
    first = Ranks.from_environment().first
    for line in sys.stdin:
        task, out, place, arguments = json.loads(line)
        result = tasks[task](Path(out), **arguments)
        draft = Path(place).with_suffix(".draft")
        draft.write_text(json.dumps(result if first else None))
        draft.rename(place)
