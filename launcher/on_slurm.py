"""A run within a Slurm job: the batch step supervises, one `srun` starts the ranks, the queue is asked again in time.

`python -m launcher.on_slurm FOLDER` is what the batch script becomes. Who mends what: a rank that dies is started again
by the supervisor, within the allocation; a node that dies, by Slurm, which queues the job again (--requeue); a time
limit that comes near (USR1) is met by saving and `scontrol requeue`, and nodes where Slurm lets nothing start by the
latter. No other end of a run is ever queued again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from configs.errors import CANNOT_GO_ON, PREEMPTED, ConfigError, LeviathanError
from configs.load import load
from launcher import preflight, slurm
from launcher.beacons import Beacons
from launcher.config import LaunchConfig
from launcher.network import address_of_first, free_port, own_address_towards
from launcher.restart import NO_PROGRESS_LIMIT
from launcher.snapshot import ROOT, check_code
from launcher.srun import Step
from launcher.supervise import Supervisor
from launcher.team import Team, common_environment, forget_exits
from pretrain.health import Beat
from pretrain.run_folder import Record, RunFolder

_QUEUE_S, _ASK_S, _ASK_AGAIN_S = 60.0, 300.0, 5.0
_LEAVE_S = 30.0
"""Of the time before a limit: to end ranks in, and to be queued again."""
PREFLIGHT_S = 240.0
_CALLS = 32
_SILENT_S = 4.0
"""Beacons come every second."""


class SlurmTeam(Team):
    """The tasks of one `srun` in this job's allocation, dealt in order: as many to each node as to the next."""

    def __init__(self, folder: RunFolder, launch: LaunchConfig, job: str) -> None:
        super().__init__(folder, launch)
        self._job, self._nodes = job, slurm.nodes(os.environ["SLURM_JOB_NODELIST"])
        self._hosts = [node.name for node in self._nodes]
        if len(self._hosts) != launch.nodes:
            raise ConfigError(
                f"job {job} has {len(self._hosts)} nodes and the run wants {launch.nodes}; submit it again"
            )
        self._address = address_of_first([node.address for node in self._nodes])
        self._beacons = Beacons(own_address_towards(self._address), self.world)
        self._step: Step | None = None

    @property
    def place(self) -> str:
        start = self.start_of_job[1]
        restarts = f", start {start}" if start > 1 else ""
        return f"{', '.join(self._hosts)} (Slurm job {self._job}{restarts})"

    @property
    def start_of_job(self) -> tuple[str, int]:
        """Slurm counts how often it has queued a job again."""
        return f"slurm {self._job}", 1 + int(os.environ.get("SLURM_RESTART_COUNT", "0"))

    def missing(self) -> str | None:
        """Nodes that do not answer: Slurm takes a dead one for alive for minutes, and `srun` fails there."""
        gone = self._gone()
        return f"node {', '.join(gone)} does not answer" if gone else None

    def _gone(self) -> list[str]:
        with ThreadPoolExecutor(_CALLS) as pool:
            return [node.name for node, there in zip(self._nodes, pool.map(slurm.answers, self._nodes)) if not there]

    def _unanswered(self) -> list[preflight.Finding]:
        message = f"does not answer {socket.gethostname()}, from where `srun` is to start ranks there"
        return [preflight.Finding(host, message, True) for host in self._gone()]

    def measure(self) -> tuple[list[preflight.Report], list[preflight.Finding]]:
        """What every node finds of itself and of its way to the others, and what is wrong with which."""
        hosts, each = self._hosts, 1
        gone = self._unanswered()
        if gone:  # `srun` would end the others too, and all would look alike
            return [], gone
        shutil.rmtree(preflight.folder_of(self.folder), ignore_errors=True)
        for number in range(len(hosts)):
            preflight.log_of(self.folder, number).unlink(missing_ok=True)
        words = self._words("launcher.preflight", each, preflight.LOG, wait_s=preflight.WAIT_S)
        environment = os.environ | self._meeting(each) | {"WORLD_SIZE": str(len(hosts))}
        environment["LEVIATHAN_BEACON"] = self._beacons.next_attempt()
        step = Step(self._job, words, environment)
        try:
            step.wait(PREFLIGHT_S)
        finally:
            step.end()
            slurm.kill_steps(self._job)
        if step.said and not any(preflight.log_of(self.folder, number).exists() for number in range(len(hosts))):
            raise ConfigError(f"nothing was started on any node ({step.said[-1]}); ask for what srun lacks")
        reports, findings = preflight.collect(self.folder, hosts)
        findings += self._unanswered()  # who died meanwhile
        waited = preflight.kept_waiting(self.folder) if reports else False
        findings += preflight.judge(reports, bool(findings), waited)
        # a login node, with a firewall around it, will not be who watches
        if "SLURMD_NODENAME" in os.environ:
            heard = {hosts[number] for number, beat in self._beacons.beats().items() if beat is not None}
            unheard = [report["node"] for report in reports if report["node"] not in heard]
            findings += [preflight.unheard(host, hosts[0]) for host in unheard]
        return reports, findings

    def preflight(self) -> None:
        """Let every node measure itself, and tell what was found. Raises ConfigError where one is not fit."""
        reports, findings = self.measure()
        preflight.settle(self.folder, reports, findings, "exclude it (launch.slurm.extra=[--exclude=NODE]) or mend it")

    def start(self, attempt: int, fence: int) -> None:
        if self._step is not None:
            # a node that was out of reach when ranks were to end may be back by now, with its own
            with contextlib.suppress(LeviathanError):
                slurm.kill_steps(self._job)
        forget_exits(self.folder, self.world)
        each = self.world // self.launch.nodes
        environment = os.environ | common_environment(self.world, attempt, fence) | self._meeting(each)
        environment["LEVIATHAN_BEACON"] = self._beacons.next_attempt()
        words = self._words("pretrain.run", each, "rank")
        self._step = Step(self._job, words, environment, lambda line: self.folder.event("warning", line))

    def patience(self, number: int) -> float:
        """As long as Slurm leaves."""
        return patience(self.launch, number)

    def _meeting(self, each: int) -> dict[str, str]:
        """Where processes find each other, `each` of them on a node."""
        return {
            "MASTER_ADDR": self._address,
            "MASTER_PORT": str(free_port(self._address)),
            "LEVIATHAN_RANKS_OF_A_NODE": str(each),
        }

    def _words(self, module: str, each: int, log: str, wait_s: int = 0) -> list[str]:
        """Of `srun`, for `each` processes of a module on every node, whose logs begin with `log`. wait_s: how long the
        others may go on after the first has ended; 0: as long as they like."""
        launch, asks = self.launch, self.launch.slurm
        logs = str(self.folder.logs.resolve()).replace("%", "%%")
        words = [f"--wait={wait_s}", "--distribution=block", f"--nodes={launch.nodes}",
                 f"--ntasks={launch.nodes * each}", f"--ntasks-per-node={each}",
                 f"--output={logs}/{log}_%5t.log"]  # fmt: skip
        if asks.cpus_per_rank is not None:
            words.append(f"--cpus-per-task={asks.cpus_per_rank}")
        if asks.gpus_per_node is not None:
            words.append("--gpu-bind=none")
        return [*words, *asks.wrapper, sys.executable, "-P", "-m", "launcher.slurm_task", module, str(self.folder.path)]

    def ended(self) -> dict[int, int]:
        assert self._step is not None
        code, told = self._step.poll(), dict(self._step.codes)
        if code is None:
            return told
        # those that srun told nothing of ended well, unless it failed as a whole
        rest = 0 if code == 0 or told else code
        return dict.fromkeys(range(self.world), rest) | told

    def beats(self) -> dict[int, Beat | None]:
        return self._beacons.beats()

    def frozen(self) -> set[int]:
        # what its last word says of its phase is worth nothing then: it may be a second older than the end
        return self._beacons.silent(_SILENT_S)

    def host(self, number: int) -> str:
        return self._hosts[number // (self.world // self.launch.nodes)]

    def who(self, number: int) -> str:
        return f"rank {number} (host {self.host(number)}, Slurm job {self._job})"

    def send(self, number: int) -> None:
        # srun forwards both of these to all tasks; it takes others for itself
        if self._step is not None:
            self._step.send(signal.SIGUSR2 if number == signal.SIGUSR2 else signal.SIGUSR1)

    def end(self) -> None:
        if self._step is not None:
            self._step.end()

    def close(self) -> None:
        self._beacons.close()


def patience(launch: LaunchConfig, number: int) -> float:
    """Seconds for a run to save in after a signal. USR1 comes so long before the time limit; what ends a job comes with
    Slurm's own KillWait."""
    before_limit_s = launch.slurm.before_limit_s - _LEAVE_S if number == signal.SIGUSR1 else 0.0
    return max(launch.grace_s, before_limit_s)


def may_requeue(history: Sequence[Record], job: str, step: int, most: int) -> str | None:
    """Why a job may not be queued again; None where it may. step: what is saved by now. most: how often at all."""
    steps = [event["step"] for event in history if event["event"] == "requeue" and event.get("job") == job]
    if len(steps) >= most:
        return f"job {job} was queued again {len(steps)} times, and launch.slurm.requeues is {most}"
    if len(steps) >= NO_PROGRESS_LIMIT and set(steps[-NO_PROGRESS_LIMIT:]) == {step}:
        return (
            f"job {job} was queued again {NO_PROGRESS_LIMIT} times in a row at step {step} and saved nothing since;"
            " set a longer launch.slurm.time, save more often, or exclude a node where nothing starts"
        )
    return None


def main(arguments: list[str]) -> int:
    """Supervise the run of a folder in this job; return the exit code of the job."""
    return as_job(arguments, _supervise)


def _supervise(folder: RunFolder, launch: LaunchConfig, job: str) -> tuple[int, int | None]:
    team = SlurmTeam(folder, launch, job)
    supervisor = Supervisor(team)
    supervisor.listen()
    if launch.preflight:
        team.preflight()
    return supervisor.run(), supervisor.asked


def as_job(arguments: list[str], drive: Callable[[RunFolder, LaunchConfig, str], tuple[int, int | None]]) -> int:
    """The exit code of this job, whose batch step drives the run of a folder; it is queued again where time is over,
    and where its nodes are of no more use to it.

    drive: of the folder, what it asks for and the job's number; returns the run's exit code and which signal asked it
    to leave, if one did.
    """
    os.umask(0o077)  # a run is its owner's alone
    folder, job = RunFolder(Path(arguments[0])), slurm.inside()
    try:
        if job is None:
            raise ConfigError("this is no Slurm job; use `leviathan submit slurm`")
        if ROOT.name.startswith("code-"):
            check_code(ROOT)
        launch = load(LaunchConfig, [folder.launch])
        try:
            code, asked = drive(folder, launch, job)
        except slurm.AllocationLostError as error:
            folder.event("warning", str(error))
            return queue_again(folder, launch, job)
        return queue_again(folder, launch, job) if code == PREEMPTED and asked == signal.SIGUSR1 else code
    except LeviathanError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        folder.event("stop", f"stopped: {error}", code=error.exit_code, step=max(folder.committed_steps(), default=0))
        return error.exit_code


def queue_again(folder: RunFolder, launch: LaunchConfig, job: str) -> int:
    """Put this job, whose run has saved, into the queue again, unless that was enough; return its exit code."""
    step = max(folder.committed_steps(), default=0)
    reason = may_requeue(folder.history(), job, step, launch.slurm.requeues)
    if reason is not None:
        folder.event("stop", f"stopped: {reason}", code=CANNOT_GO_ON, step=step)
        return CANNOT_GO_ON
    folder.event(
        "requeue", f"job {job} is queued again by {socket.gethostname()}; it goes on from step {step}", step=step,
        job=job,
    )  # fmt: skip
    refused = _ask_queue(job)
    if refused is not None:
        cause = (
            f"{refused}, and has not while there was time; the run goes on from step {step} when it is submitted again"
        )
        folder.event("stop", f"stopped: {cause}", code=PREEMPTED, step=step)
        return PREEMPTED
    # Slurm ends this job meanwhile: to leave first would look like its own end. All is done here, and who still took
    # its TERM for a request to save would be waited for until its KILL
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_QUEUE_S)
    return PREEMPTED


def _ask_queue(job: str) -> slurm.SlurmError | None:
    """Have Slurm queue this job again, which its controller may be away for; why not, where it never would."""
    end = time.monotonic() + _ASK_S
    if over := os.environ.get("SLURM_JOB_END_TIME", ""):  # what is not queued by then has ended for good
        end = min(end, time.monotonic() + max(0.0, float(over) - time.time() - _LEAVE_S))
    while True:
        try:
            slurm.requeue(job)
            return None
        except slurm.SlurmError as error:
            if time.monotonic() > end:
                return error
        time.sleep(_ASK_AGAIN_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
