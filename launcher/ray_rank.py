"""What Ray Train runs on each worker: one rank of a run as a child process, and its worker watching over it.

Ranks are processes of their own, so that a run is the same here as anywhere: signals reach it, a crash is an exit code,
and nothing of Ray is in its memory. Worker 0 leads: it says what the attempt is, hears the beacons of all ranks, and
tells all workers once a second what to do. All of them then do it in step, for what they ask of Ray Train is asked by
all or answered to none. What goes wrong is raised: Ray Train then ends all workers, and begins again elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import train
from ray.train.collective import broadcast_from_rank_zero

from configs.errors import DONE, INTERRUPTED, PREEMPTED, ConfigError, LeviathanError
from configs.load import load
from launcher import preflight
from launcher.beacons import Beacons
from launcher.config import LaunchConfig
from launcher.network import free_port, interface_towards
from launcher.prepare import most_ranks
from launcher.ray_jobs import SCRIPT
from launcher.runs import attempts_before
from launcher.snapshot import ROOT, check_code
from launcher.team import common_environment, forget_exits, threads_of
from launcher.watch import collateral, describe, hang, longest_silent
from pretrain.config import RunConfig
from pretrain.health import read_heartbeat
from pretrain.run_folder import RunFolder, counted

ENDED_WELL = (DONE, PREEMPTED, INTERRUPTED)
PREFLIGHT_S = 240.0
_POLL_S, _LOOK_S = 1.0, 0.1
_SETTLE_S, _STACKS_S, _END_S = 3.0, 0.5, 10.0
_DEAF_S = 2.0
_SILENT_S = 4.0
"""Beacons come every second."""


class RankEndedError(Exception):
    """A rank ended badly. code: of the process, -n for signal n, or what stands for it; message: one sentence."""

    def __init__(self, rank: int, host: str, code: int, message: str, step: int) -> None:
        super().__init__(rank, host, code, message, step)
        self.rank, self.host, self.code, self.message, self.step = rank, host, code, message, step

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Job:
    """What the driver tells every worker. folder: of the run; number: of the job; first: the driver's first attempt."""

    folder: str
    number: str
    fence: int
    first: int


def train_rank(job: dict[str, Any]) -> int:
    """Be one worker of an attempt; return the exit code of a run that ended well. job: the values of a Job."""
    worker = _Worker(Job(**job))
    try:
        return worker.run()
    except LeviathanError as error:
        raise RankEndedError(worker.rank, worker.host, error.exit_code, str(error), 0) from None
    finally:
        worker.close()


class _Worker:
    """One worker. Those whose rank is not below the world of the attempt are spare: they wait with the others."""

    def __init__(self, job: Job) -> None:
        context = train.get_context()
        self._job, self._folder = job, RunFolder(Path(job.folder))
        self._launch: LaunchConfig
        self.rank, self._workers = context.get_world_rank(), context.get_world_size()
        self._local, self._here = context.get_local_rank(), context.get_local_world_size()
        self._node = context.get_node_rank()
        self.host = socket.gethostname()
        self._beacons: Beacons | None = None
        self._heartbeats = Path(tempfile.mkdtemp(prefix="leviathan-"))
        self._child: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._well_since: float | None = None
        self._preempted = False

    def run(self) -> int:
        """One attempt, from the first word of worker 0 to the end of every rank."""
        self._launch = load(LaunchConfig, [self._folder.launch])
        if self._local == 0 and ROOT.name.startswith("code-"):
            check_code(ROOT)
        plan = broadcast_from_rank_zero(self._plan() if self.rank == 0 else None)
        self._folder.attempt = plan["attempt"]
        if plan["nodes"]:
            self._preflight(plan)
        began = time.monotonic()
        if self.rank < plan["world"]:
            self._child = self._start("pretrain.run", f"rank_{self.rank:05d}.log", self._environment(plan))
        while True:
            # both are asked by all workers at every turn, or all wait for one who did not
            self._notice(train.get_preemption_info())
            order = broadcast_from_rank_zero(self._order(plan, began) if self.rank == 0 else None)
            if order["over"]:
                return self._end(order["code"])
            if order["hung"] is not None:
                self._show_stacks(order)
            self._look(_POLL_S)

    def close(self) -> None:
        """Leave no process behind."""
        self._end_child()
        if self._beacons is not None:
            self._beacons.close()
        shutil.rmtree(self._heartbeats, ignore_errors=True)

    def _end_child(self) -> None:
        if self._child is not None and self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()

    # ---- worker 0 leads

    def _plan(self) -> dict[str, Any]:
        """What this attempt is: its number, how many ranks, and where they meet."""
        config, folder = load(RunConfig, [self._folder.config]), self._folder
        folder.attempt = attempts_before(folder)
        world = most_ranks(config, self._workers)
        forget_exits(folder, self._launch.ranks)
        hosts = _hosts_of_workers()
        address = ray.util.get_node_ip_address()
        self._beacons = Beacons(address, world)
        spare = f", {self._workers - world} spare" if self._workers > world else ""
        folder.event(
            "launch", f"attempt {folder.attempt}: starting {counted(world, 'rank')}{spare} on {', '.join(hosts)}"
            f" (Ray job {self._job.number})", world=world, job=self._job.number,
        )  # fmt: skip
        first = self._launch.preflight and folder.attempt == self._job.first
        if first:
            shutil.rmtree(preflight.folder_of(folder), ignore_errors=True)
        return {
            "attempt": folder.attempt, "world": world, "address": address, "port": free_port(address),
            "rank_port": free_port(address), "beacon": self._beacons.next_attempt(),
            "nonce": common_environment(world, 0, 0)["LEVIATHAN_NONCE"], "nodes": len(hosts) if first else 0,
        }  # fmt: skip

    def _order(self, plan: dict[str, Any], began: float) -> dict[str, Any]:
        """What all workers do now: go on, leave, or show the stacks of ranks because one hangs."""
        codes = self._codes(plan["world"])
        if len(codes) == plan["world"]:
            return {"over": True, "code": codes[0], "hung": None}
        assert self._beacons is not None
        beats = {number: beat for number, beat in self._beacons.beats().items() if number not in codes}
        frozen = self._beacons.silent(_SILENT_S) & set(beats)
        silent = longest_silent(beats, frozen, time.monotonic() - began, self._launch)
        hung = None if silent is None else min(frozen, default=silent.rank)
        age = 0.0 if silent is None else silent.age_s
        return {"over": False, "code": None, "hung": hung, "age_s": age}

    def _codes(self, world: int) -> dict[int, int]:
        """Exit codes of the ranks of this attempt that ended well, as they noted them."""
        codes = {}
        for number in range(world):
            try:
                note = json.loads(self._folder.exit_of(number).read_bytes())
            except (OSError, ValueError):
                continue
            if note.get("attempt") == self._folder.attempt and note["code"] in ENDED_WELL:
                codes[number] = int(note["code"])
        return codes

    # ---- every worker

    def _notice(self, info: Any) -> None:
        """A node is to be taken away: all ranks finish their step, save, and leave."""
        if info is None:
            return
        if not self._preempted and self.rank == 0:
            self._folder.event(
                "signal", f"a node is to be taken away (ranks {', '.join(map(str, info.preempted_ranks))}): saving"
            )  # fmt: skip
        self._preempted = True
        child = self._child
        # what has only begun would die of it, and this is asked again
        if child is not None and child.poll() is None and time.monotonic() - self._started > _DEAF_S:
            child.send_signal(signal.SIGUSR1)

    def _look(self, seconds: float) -> None:
        """Watch the rank of this worker for a while. Raises RankEndedError where it ends badly."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            code = None if self._child is None else self._child.poll()
            if code is not None and code not in ENDED_WELL:
                self._fail(code)
            if code is not None:
                self._well_since = self._well_since or time.monotonic()
                if time.monotonic() - self._well_since > self._launch.start_s:
                    cause = f"rank {self.rank} has ended, and others have not within {self._launch.start_s:.0f} s"
                    raise RankEndedError(self.rank, self.host, 1, cause, 0)
            time.sleep(_LOOK_S)

    def _fail(self, code: int) -> None:
        """Tell Ray Train, and so the driver, how the rank ended."""
        if collateral(code):
            time.sleep(_SETTLE_S)  # it may fail because another did, whose word is to be first
        beat = read_heartbeat(self._heartbeats, self.rank)
        who = f"rank {self.rank} (host {self.host}, Ray job {self._job.number})"
        cause = describe(self._folder, self.rank, who, code, beat)
        raise RankEndedError(self.rank, self.host, code, cause, beat.step if beat else 0)

    def _show_stacks(self, order: dict[str, Any]) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGUSR2)
        time.sleep(_STACKS_S)
        if self.rank == order["hung"]:
            who = f"rank {self.rank} (host {self.host}, Ray job {self._job.number})"
            cause = hang(who, order["age_s"], read_heartbeat(self._heartbeats, self.rank), self._folder)
            raise RankEndedError(self.rank, self.host, -signal.SIGKILL, cause, 0)

    def _end(self, code: int) -> int:
        """All ranks have ended well: with the run, or because somebody asked, or because a node is to go."""
        if self._child is not None:
            try:
                self._child.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._end_child()
        if code == PREEMPTED and self._preempted:
            raise RankEndedError(self.rank, self.host, PREEMPTED, "saved, since a node is to be taken away", 0)
        return code

    def _preflight(self, plan: dict[str, Any]) -> None:
        """Let every node measure itself. Raises ConfigError where one is not fit."""
        if self._local == 0:
            environment = self._meeting(plan, "port") | {
                "RANK": str(self._node), "WORLD_SIZE": str(plan["nodes"]), "LOCAL_RANK": "0", "LOCAL_SIZE": "1",
            }  # fmt: skip
            child = self._child = self._start("launcher.preflight", f"preflight_{self._node:05d}.log", environment)
            try:
                child.wait(PREFLIGHT_S)
            except subprocess.TimeoutExpired:
                self._end_child()
            self._child = None
        broadcast_from_rank_zero(None)
        if self.rank == 0:
            hosts = [f"number {number}" for number in range(plan["nodes"])]
            reports, silent = preflight.collect(self._folder, hosts)
            reports = [report | {"node": report["host"]} for report in reports]
            findings = [*silent, *preflight.judge(reports)]
            preflight.settle(self._folder, reports, findings, "take it out of the cluster or mend it")

    def _start(self, module: str, log: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """A child process, which dies with this one."""
        self._started = time.monotonic()
        with open(self._folder.logs / log, "ab") as out:
            return subprocess.Popen(
                ["bash", str(self._folder.path / SCRIPT), module, str(self._folder.path)],
                env=os.environ | environment | {"LEVIATHAN_PARENT": str(os.getpid())},
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _environment(self, plan: dict[str, Any]) -> dict[str, str]:
        """What tells the child which rank it is."""
        here = min(self._here, plan["world"] - (self.rank - self._local))
        return (
            threads_of(here)
            | common_environment(plan["world"], plan["attempt"], self._job.fence)
            | self._meeting(plan, "rank_port")
            | {
                "RANK": str(self.rank),
                "LOCAL_RANK": str(self._local),
                "LOCAL_SIZE": str(here),
                "LEVIATHAN_HEARTBEAT": str(self._heartbeats),
            }
        )

    def _meeting(self, plan: dict[str, Any], port: str) -> dict[str, str]:
        interface = interface_towards(plan["address"])
        chosen = {name: os.environ.get(name, interface) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
        return chosen | {
            "MASTER_ADDR": plan["address"], "MASTER_PORT": str(plan[port]), "LEVIATHAN_NONCE": plan["nonce"],
            "LEVIATHAN_BEACON": plan["beacon"],
        }  # fmt: skip


def _hosts_of_workers() -> list[str]:
    """The hosts that Ray has placed the workers on, told apart by address, as Ray Train does."""
    group = ray.util.get_current_placement_group()
    used = set(ray.util.placement_group_table(group)["bundles_to_node_id"].values()) if group is not None else set()
    named = {node["NodeManagerAddress"]: node["NodeManagerHostname"] for node in ray.nodes() if node["NodeID"] in used}
    if not named:
        raise ConfigError("Ray Train has placed its workers nowhere that it tells; is this Ray newer than was tested?")
    return sorted(named.values())
