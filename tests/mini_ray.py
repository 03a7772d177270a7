"""A real Ray cluster of several nodes on this machine for tests, with a dashboard that asks for a token.

It lives in a process of its own: whoever asks it for work is a client like any other.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from tests.ports import free_ports

_CLUSTER = """
import json, sys, time
from ray.cluster_utils import Cluster
port, cpus = int(sys.argv[1]), json.loads(sys.argv[2])
# a head's agent, which starts jobs, would want the port that all heads have, and do without where another has it
head = {"num_cpus": cpus[0], "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port,
        "dashboard_agent_listen_port": 0, "object_store_memory": 80 << 20}
cluster = Cluster(initialize_head=True, head_node_args=head)
add = lambda count: cluster.add_node(num_cpus=count, object_store_memory=80 << 20)
nodes = [add(count) for count in cpus[1:]]
print(cluster.address, flush=True)
for line in sys.stdin:
    verb, _, number = line.strip().partition(" ")
    if verb == "kill":
        cluster.remove_node(nodes[int(number)], allow_graceful=False)
    elif verb == "add":
        nodes.append(add(int(number)))
    elif verb == "drain":
        import ray
        from ray._raylet import GcsClient
        node, reason = nodes[int(number)], 2
        deadline = int((time.time() + 30) * 1000)
        GcsClient(address=cluster.address).drain_node(node.node_id, reason, "a test", deadline)
    print("done", flush=True)
cluster.shutdown()
"""
_DOWN_S = 60


class MiniRay:
    """Use it in `with`. cpus: cores of each node; the first is the head.

    address: of the cluster; dashboard: of the Jobs API; env: what a client needs.
    """

    def __init__(self, *cpus: int) -> None:
        self._cpus, self._base = cpus, tempfile.TemporaryDirectory(prefix="ray-")
        token = Path(self._base.name) / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.address = self.dashboard = ""
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> MiniRay:
        (port,) = free_ports(1)
        self.dashboard = f"http://127.0.0.1:{port}"
        environment = os.environ | self.env | {
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_enable_metrics_collection": "0",
            "RAY_DISABLE_IMPORT_WARNING": "1", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        self._log = open(Path(self._base.name) / "log", "wb")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CLUSTER, str(port), json.dumps(self._cpus)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True,
        )  # fmt: skip
        self.address = self._line()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_DOWN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()
        self._base.cleanup()

    def kill(self, node: int) -> None:
        """End a node with all its processes. node: 0 is the first beside the head."""
        self._tell(f"kill {node}")

    def add(self, cpus: int) -> None:
        """Another node."""
        self._tell(f"add {cpus}")

    def drain(self, node: int) -> None:
        """Tell the cluster that a node will be taken away in half a minute, as spot instances are."""
        self._tell(f"drain {node}")

    def _tell(self, words: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()
        assert self._line() == "done"

    def _line(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.strip() == "done" or (":" in line and line.count(" ") == 0):
                return line.strip()
        raise RuntimeError(f"the cluster ended: {(Path(self._base.name) / 'log').read_text()[-3000:]}")
