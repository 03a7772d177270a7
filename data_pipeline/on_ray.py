"""Tasks of a build on a Ray cluster. The only file of the data pipeline that imports ray.

One Ray task for each slice of a build, which is about one shard: smaller ones would cost more to schedule than to do.
No more are in flight than the build asks for, so that nothing piles up. There are more of them than cores, so all
nodes work; Ray's strategy to spread tasks would only add that each has to wait for a worker of its own. A worker or a
node that dies costs the tasks it had: Ray starts them elsewhere, and since a task writes whole files under names of its
own, doing it twice changes nothing. Ray Data is not used: what it would deal to workers the plan has dealt before any
of them starts, in an order that does not depend on the cluster (docs/DATA.md has the figures).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from data_pipeline.host_memory import keep_freed_memory

OLDEST = (2, 52)
"""Ray without authentication of those who submit work is not used (CVE-2023-48022, CVE-2025-62593)."""
_RETRIES = 5
_CONNECT_S = 10.0
ROOT = Path(__file__).parents[1]


class RayTasks(Executor):
    """An executor whose workers are a cluster's."""

    def __init__(self, ray: Any) -> None:
        self._ray, self._refs = ray, set[Any]()
        # made once: every remote function that is made is sent to the cluster anew
        self._there = ray.remote(num_cpus=1, max_retries=_RETRIES)(_there)
        self.nodes = sum(node["Alive"] for node in ray.nodes())
        self.cores = int(ray.cluster_resources().get("CPU", 1))

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The future of fn(*args, **kwargs) on some node; it fails with BrokenExecutor where no node could do it."""
        ref = self._there.options(name=_name(args)).remote(os.getcwd(), fn, args, kwargs)
        self._refs.add(ref)
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        ref.future().add_done_callback(lambda done: self._settle(ref, done, future))
        return future

    def _settle(self, ref: Any, done: Future[Any], future: Future[Any]) -> None:
        self._refs.discard(ref)
        error = done.exception()
        if error is None:
            future.set_result(done.result())
        elif isinstance(error, self._ray.exceptions.RayTaskError):
            future.set_exception(error.cause or error)
        else:  # the worker's or the node's end, more often than it is tried
            broken = BrokenExecutor(str(error).splitlines()[0])
            broken.__cause__ = error
            future.set_exception(broken)

    def cancel_all(self) -> None:
        """Give up what is under way."""
        for ref in list(self._refs):
            # the cluster may be what is gone, and the error that matters is already on its way
            with contextlib.suppress(Exception):
                self._ray.cancel(ref, force=True)


@contextlib.contextmanager
def ray_executor(address: str, cores: int | None = None) -> Iterator[RayTasks]:
    """The workers of the cluster at an address, whose nodes see the project and the data under the same paths.

    `local` is a cluster of this machine, for as long as it is used, with so many cores.
    Raises ConfigError where no cluster answers there, or Ray is too old.
    """
    ray = import_ray()
    check_reachable(address)
    # a cluster that asks for a token is told the one of RAY_AUTH_TOKEN, or of ~/.ray/auth_token, by Ray itself
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    try:
        ray.init(address=address, num_cpus=cores, runtime_env={"env_vars": environment}, log_to_driver=False,
                 logging_level="error", include_dashboard=False if address == "local" else None)  # fmt: skip
    except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        raise ConfigError(f"no Ray cluster answers at {address} ({said}); check the address and its token") from None
    try:
        tasks = RayTasks(ray)
        try:
            yield tasks
        finally:
            tasks.cancel_all()
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Raises ConfigError where nobody listens: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        if address in ("local", "auto"):
            return
        raise ConfigError(f"{address!r} is no address of a Ray cluster; write HOST:PORT, such as 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); check the address, and that it runs"
        ) from None


def import_ray() -> Any:
    """Ray, if it is there and new enough. Raises ConfigError."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of what is to come
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ConfigError(f"Ray cannot be imported ({error}); pip install -c constraints.txt 'ray[default]'") from None
    if tuple(int(part) for part in ray.__version__.split(".")[:2]) < OLDEST:
        raise ConfigError(
            f"Ray {ray.__version__} runs whatever anybody on the network submits; install Ray"
            f" {'.'.join(map(str, OLDEST))} or newer"
        )
    return ray


def _there(folder: str, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """fn(*args, **kwargs) on a node, where relative paths mean what they mean to whoever builds."""
    with contextlib.suppress(OSError):  # what reads and writes in stores needs no folder that all nodes see
        os.chdir(folder)
    keep_freed_memory()
    return fn(*args, **kwargs)


def _name(arguments: tuple[Any, ...]) -> str:
    """What Ray's own pages call a task."""
    task = arguments[0] if arguments else None
    return getattr(task, "name", None) or type(task).__name__
