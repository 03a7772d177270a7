"""A real Slurm on this machine for tests: munged, slurmctld, and one slurmd for each node, all in one folder.

Nothing of it is installed or left behind: keys, sockets, state and logs lie in a temporary folder, and clients find it
by SLURM_CONF. It needs root, and Debian's slurm-wlm, whose slurmd can play several nodes of one host. With `apart` the
nodes are as far apart as real ones (tests/network.py), and can die as machines do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from tests import network
from tests.network import Network
from tests.ports import free_ports

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
_CENTRAL = ("munged", "slurmctld")
_UP_S, _DOWN_S = 30.0, 5.0
MISSED_S = 11
"""Once a job is older, Slurm gives its batch script up when the node that had it begins anew: BatchStartTimeout and
MessageTimeout together."""

_CONF = """\
ClusterName=mini
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmdPort={slurmd_port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000,bf_interval=1,bf_resolution=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout={timeout_s}
KillWait=5
MinJobAge=600
MessageTimeout=10
BatchStartTimeout=1
JobRequeue=1
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=n[1-{count}] Default=YES MaxTime=60 State=UP OverSubscribe=NO
"""


def missing() -> str | None:
    """Why no Slurm can be started here; None where one can."""
    without = [name for name in NEEDED if shutil.which(name) is None]
    return f"there is no {', '.join(without)}; install slurm-wlm and munge" if without else network.missing()


class MiniSlurm:
    """Use it in `with`: nodes n1, n2, ... are idle then, and gone afterwards.

    timeout_s: how long a node may be silent before Slurm takes it for dead; clusters usually have 300.
    """

    def __init__(self, nodes: int = 2, cpus: int = 4, apart: bool = False, timeout_s: int = 10) -> None:
        self.count, self._cpus, self._timeout_s = nodes, cpus, timeout_s
        self._network = Network(nodes) if apart else None
        self.base = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets' paths are
        self.env = {"SLURM_CONF": str(self.base / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.daemons_port = 0
        """Where the nodes' own daemons listen, once they do, if nodes are apart."""

    def __enter__(self) -> MiniSlurm:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run("scancel", "--user=root", check=False)
        if self._network is not None:
            self._network.__exit__(kind, problem, trace)
        # a node that is left is asked: it may still be ending what it started. The others keep nothing that outlasts
        # their folder, and are there until then, or the nodes would wait for them
        nodes = [daemon for name, daemon in self._daemons.items() if name not in _CENTRAL]
        for daemon in nodes:
            daemon.terminate()
        for daemon in nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(_DOWN_S)
        for daemon in self._daemons.values():
            if daemon.poll() is None:
                os.killpg(daemon.pid, signal.SIGKILL)  # slurmctld has a child that runs scripts
            daemon.wait()
        shutil.rmtree(self.base, ignore_errors=True)

    def run(self, *words: str, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        environment = os.environ | self.env
        done = subprocess.run(words, env=environment, check=check, text=True, capture_output=True, timeout=60)
        return done.stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, ..."""
        return self._of_job(job, "JobState")

    def exit_code(self, job: str) -> str:
        """Code and signal, as in `78:0`."""
        return self._of_job(job, "ExitCode")

    def restarts(self, job: str) -> int:
        """How often a job was queued again."""
        return int(self._of_job(job, "Restarts"))

    def facts(self, job: str) -> str:
        """All that Slurm knows of a job."""
        return self.run("scontrol", "show", "job", job, check=False)

    def log_of(self, name: str) -> str:
        """The end of what a daemon, `slurmctld` or a node's `n1`, has said."""
        return (self.base / "log" / f"{name}.out").read_text(errors="replace")[-4000:]

    def start_at_once(self, job: str) -> None:
        """Lift the pause that Slurm gives to a job that was queued again."""
        # nodes refuse all that was issued in the second in which they ended the job ("Job credential revoked")
        time.sleep(1.1)
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)

    @property
    def network(self) -> Network:
        """Between nodes that are apart."""
        assert self._network is not None
        return self._network

    def start_node(self, number: int) -> None:
        """Switch a node on, for the first time or again."""
        words = ("slurmd", "-D", "-N", f"n{number}")
        self._daemon(*words, name=f"n{number}", node=number if self._network is not None else None)

    def _of_job(self, job: str, fact: str) -> str:
        facts = self.run("scontrol", "show", "job", job, "-o").split()
        return next(word.split("=", 1)[1] for word in facts if word.startswith(f"{fact}="))

    def _start(self) -> None:
        for name in ("state", "log", "munge", *(f"spool/n{i}" for i in self._numbers())):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        # munge refuses a socket in a folder that only its owner may enter
        for place in (self.base, self.base / "munge"):
            place.chmod(0o755)
        munge = self.base / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        Path(self.env["SLURM_CONF"]).write_text(self._conf())
        self._daemon("munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket",
                     f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed")  # fmt: skip
        self._wait(lambda: (munge / "socket").exists(), "munged")
        if self._network is not None:
            self._network.__enter__()
        self._daemon("slurmctld", "-D", "-c")
        for number in self._numbers():
            self.start_node(number)
        self._wait(lambda: self._idle() == self.count, "all nodes")

    def _idle(self) -> int:
        return self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split().count("idle")

    def _conf(self) -> str:
        here, port = socket.gethostname().split(".")[0], free_ports(self.count + 2)
        self.daemons_port = port[1]
        apart = self._network
        where = {
            n: f"NodeHostname={here} NodeAddr=127.0.0.1 Port={port[n + 1]}"
            if apart is None
            else f"NodeHostname=n{n} NodeAddr={apart.address(n)}"
            for n in self._numbers()
        }
        nodes = [f"NodeName=n{n} {place} CPUs={self._cpus} RealMemory=8000" for n, place in where.items()]
        return _CONF.format(
            base=self.base, host=here, controller="127.0.0.1" if apart is None else apart.address(), port=port[0],
            slurmd_port=port[1], nodes="\n".join(nodes), count=self.count, timeout_s=self._timeout_s,
        )  # fmt: skip

    def _numbers(self) -> Sequence[int]:
        return range(1, self.count + 1)

    def _daemon(self, *words: str, name: str | None = None, node: int | None = None) -> None:
        name, environment = name or words[0], os.environ | self.env
        with open(self.base / "log" / f"{name}.out", "ab") as out:
            if node is not None:
                self._daemons[name] = self.network.start(node, words, environment, out)
                return
            self._daemons[name] = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + _UP_S
        while not condition():
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise RuntimeError(f"{name} ended with {daemon.returncode}: {self.log_of(name)}")
            if time.monotonic() > end:
                raise RuntimeError(f"{what} not up within {_UP_S:.0f} s: {self.log_of('slurmctld')}")
            time.sleep(0.05)
