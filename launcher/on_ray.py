"""The driver of a run within a Ray job: Ray Train places the ranks, and begins again when a worker or a node is lost.

`python -m launcher.on_ray FOLDER` is what a job's script becomes. Who mends what: Ray Train ends the workers of a
failed attempt and places new ones, on what nodes there are; each goes on from the newest valid checkpoint. Whether to
go on at all is decided here, by the same function as everywhere (launcher/restart.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from configs.errors import CANNOT_GO_ON, INTERRUPTED, PREEMPTED, ConfigError, LeviathanError
from configs.load import load
from data_pipeline.on_ray import check_reachable, import_ray
from launcher.config import LaunchConfig
from launcher.ray_jobs import SCRIPT
from launcher.restart import Attempt, decide
from launcher.room import Waiting
from launcher.runs import attempts_before, newest_row
from launcher.snapshot import ROOT, check_code
from launcher.supervise import REQUESTS
from launcher.watch import collateral, first_cause
from pretrain.lease import Lease
from pretrain.run import die_with_parent
from pretrain.run_folder import RunFolder

_REPEAT_S = 2.0
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # ranks choose their GPU by their number on the host, as under every other launcher
    "TRAIN_ENABLE_SHARE_CUDA_VISIBLE_DEVICES": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
}
"""Of the driver and of all that it starts on the cluster: no wait there is without an end."""


class GivenUpError(Exception):
    """No further attempt is to be made. code: of the job."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason, code)
        # not `cause`, which Ray uses in what it makes of an error
        self.reason, self.code = reason, code


class DriverProcess:
    """The driver of a run as a child of this process, with which it dies. environment: more than it inherits."""

    def __init__(self, folder: RunFolder, environment: Mapping[str, str]) -> None:
        path = folder.path.resolve()
        words = ["bash", str(path / SCRIPT), "launcher.on_ray", str(path)]
        told = {"LEVIATHAN_PARENT": str(os.getpid())}
        self._process = subprocess.Popen(words, env=os.environ | environment | told, stdin=subprocess.DEVNULL,
                                         start_new_session=True)  # fmt: skip
        self._told = time.monotonic()

    def ended(self, asked: int | None) -> int | None:
        """Its exit code once it has ended, -n for a death by signal n. asked: the signal that asked for its end."""
        code = self._process.poll()
        # again and again, and not at once: what has only begun does not listen, or dies of it
        if code is None and asked is not None and time.monotonic() - self._told > _REPEAT_S:
            self._told = time.monotonic()
            self._process.send_signal(asked)
        return code

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        self._process.kill()
        self._process.wait()


def code_of_job(code: int, asked: int | None) -> int:
    """The exit code of a job whose driver ended with a code, -n for signal n. asked: the signal that asked for that."""
    if asked is not None and code == -asked:  # it had not yet begun to listen
        return asked_code(asked)
    return 128 - code if code < 0 else code


def asked_code(asked: int | None) -> int:
    """The exit code of a run that was asked to leave: by a signal, or by somebody."""
    return INTERRUPTED if asked in (None, signal.SIGINT) else PREEMPTED


def main(arguments: list[str]) -> int:
    """Drive the run of a folder to its end; return the exit code of the job."""
    die_with_parent()
    os.umask(0o077)  # a run is its owner's alone
    folder = RunFolder(Path(arguments[0]))
    os.environ.update(ENVIRONMENT)
    try:
        if ROOT.name.startswith("code-"):
            check_code(ROOT)
        launch = load(LaunchConfig, [folder.launch])
        lease = Lease(folder.path)
        fence = lease.take()
        try:
            return _Driver(folder, launch, lease, fence).run()
        finally:
            lease.release()
    except LeviathanError as error:
        return _tell_end(folder, str(error), error.exit_code)
    except GivenUpError as error:
        return _tell_end(folder, error.reason, error.code)


def _tell_end(folder: RunFolder, cause: str, code: int) -> int:
    print(f"error: {cause}", file=sys.stderr, flush=True)
    folder.event("stop", f"stopped: {cause}", code=code, step=_saved(folder))
    return code


class _Driver:
    """One job of a run."""

    def __init__(self, folder: RunFolder, launch: LaunchConfig, lease: Lease, fence: int) -> None:
        self._folder, self._launch, self._lease, self._fence = folder, launch, lease, fence
        self._asked: int | None = None

    def run(self) -> int:
        """All attempts. Raises GivenUpError where none of them can be the last."""
        ray = import_ray()
        self._listen()
        address = os.environ.get("RAY_ADDRESS", "auto")
        check_reachable(address)
        try:
            ray.init(address=address, runtime_env={"env_vars": ENVIRONMENT}, log_to_driver=True,
                     logging_level="warning")  # fmt: skip
        except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"no Ray cluster answers at {address} ({_words_of(error)}); a driver runs within a job of one"
            ) from None
        try:
            code = self._fit(ray.get_runtime_context().get_job_id())
        finally:
            ray.shutdown()
            if self._asked is not None:
                # who starts the run again, be it Slurm, is not to be stopped by a request to this job
                self._folder.stop_request.unlink(missing_ok=True)
        if code in (PREEMPTED, INTERRUPTED):
            code = asked_code(self._asked) if self._asked is not None else code
            self._folder.event("stop", "stopped: stopped as asked", code=code, step=_saved(self._folder))
        return code

    def _fit(self, job: str) -> int:
        """What Ray Train makes of the run."""
        import ray.train
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        from launcher.ray_rank import Job, train_rank

        train: Any = ray.train  # its types are those of another version
        asks, ranks = self._launch.ray, self._launch.ranks
        number = self._folder.facts().get("job", {}).get("ray", job)
        told = Job(str(self._folder.path.resolve()), number, self._fence, attempts_before(self._folder))
        trainer = DataParallelTrainer(
            train_rank,
            train_loop_config=asdict(told),
            scaling_config=train.ScalingConfig(
                num_workers=ranks if asks.min_ranks in (None, ranks) else (asks.min_ranks, ranks),
                resources_per_worker={"CPU": asks.cpus_per_rank} | ({"GPU": 1} if asks.gpus else {}),
                use_gpu=asks.gpus, placement_strategy=asks.placement.upper(),
                elastic_resize_monitor_interval_s=asks.resize_s,
            ),
            run_config=train.RunConfig(
                name="train", storage_path=str(self._folder.path.resolve() / "ray"),
                # how often is not Ray's to say: the callback ends a run that makes no progress
                failure_config=train.FailureConfig(max_failures=-1, controller_failure_limit=-1),
                callbacks=[failures(told.folder, self._launch.max_restarts)],
            ),
        )  # fmt: skip
        ranks_wanted = f"{asks.min_ranks or ranks} ranks of {asks.cpus_per_rank:g} cores{' and a GPU' * asks.gpus}"
        waiting = Waiting(self._folder, ranks_wanted, self._leave)
        waiting.start()
        try:
            result: Any = trainer.fit()
            return int(result.return_value)
        except train.TrainingFailedError as error:
            raise _given_up(error) from None
        finally:
            waiting.close()

    def _leave(self) -> None:
        """End the run while it has no ranks: nothing is lost, and Ray Train would go on waiting."""
        code = asked_code(self._asked)
        self._folder.event("stop", "stopped: stopped as asked, while it waited for room", code=code,
                           step=_saved(self._folder))  # fmt: skip
        self._folder.stop_request.unlink(missing_ok=True)
        self._lease.release()
        os._exit(code)

    def _listen(self) -> None:
        for number in REQUESTS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass a request on, by the file that rank 0 looks for."""
        if self._asked is None:
            self._asked = number
            self._folder.event(
                "signal", f"{signal.Signals(number).name}: finishing the step and saving",
                signal=signal.Signals(number).name,
            )  # fmt: skip
            self._folder.stop_request.touch(mode=0o600)


def failures(folder: str, max_restarts: int | None) -> Any:
    """Ray Train's callback that tells of every failure and decides whether there is another attempt."""
    from ray.train import UserCallback

    class Failures(UserCallback):
        def __init__(self) -> None:
            self._history: list[Attempt] = []
            self._began = _saved(RunFolder(Path(folder)))

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            run = RunFolder(Path(folder))
            self._history = judge(run, self._history, worker_exceptions, max_restarts, self._began)
            self._began = _saved(run)

    return Failures()


def judge(
    run: RunFolder, history: list[Attempt], errors: dict[int, Exception], max_restarts: int | None, began: int
) -> list[Attempt]:
    """Tell why an attempt failed; the history with it. Raises GivenUpError where there is to be no other.

    errors: what workers raised, or what Ray says of those that died, by rank. began: the newest checkpoint before.
    """
    run.attempt = max(0, attempts_before(run) - 1)
    rank, cause, code, facts = _cause(errors)
    saved = _saved(run)
    if code == PREEMPTED:
        run.event("restart", f"a node goes: starting again from step {saved}", step=saved, redo=0)
        return []
    shown = 128 - code if code < 0 else code
    history = [*history, Attempt(began, saved, shown, cause)]
    run.event("fault", cause, rank=rank, **facts)
    decision = decide(history, max_restarts)
    if decision.action == "give_up":
        raise GivenUpError(decision.reason, decision.code)
    most = max_restarts if max_restarts is not None else "∞"
    row = newest_row(run)
    redo = max(0, (row["step"] if row else 0) - saved)
    origin = f"from step {saved}, {redo} steps to redo" if saved else "from the beginning: nothing was saved yet"
    run.event("restart", f"restart {len(history)}/{most} {origin}", step=saved, redo=redo)
    return history


def _cause(errors: dict[int, Exception]) -> tuple[int, str, int, dict[str, Any]]:
    """The error that made the others: rank, sentence, code and more of it."""
    from launcher.ray_rank import RankEndedError

    told: dict[int, RankEndedError] = {}
    lost: dict[int, str] = {}
    for rank, error in sorted(errors.items()):
        inner = _inner(error)
        if isinstance(inner, RankEndedError):
            told[rank] = inner
        else:
            lost[rank] = f"rank {rank}: its worker is lost ({_words_of(inner)})"
    codes = {rank: ended.code for rank, ended in told.items()}
    rank = first_cause(codes) if codes else next(iter(lost))
    if rank not in told or collateral(codes[rank]):
        saved = [other for other, code in codes.items() if code == PREEMPTED]
        rank = next(iter([*saved, *lost, rank]))
    if rank in lost:
        return rank, lost[rank], -signal.SIGKILL, {}
    ended = told[rank]
    return rank, ended.message, ended.code, {"host": ended.host, "step": ended.step}


def _inner(error: Exception) -> BaseException:
    """What a worker raised, out of what Ray Train wraps it in."""
    return getattr(error, "_base_exc", None) or error


def _words_of(error: BaseException) -> str:
    """What Ray says of a lost worker, in one line."""
    error = getattr(error, "health_check_failure", None) or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "died" in line or "dead" in line or "killed" in line]
    return (telling or lines or [type(error).__name__])[0][:300]


def _given_up(error: Exception) -> GivenUpError:
    """Why Ray Train ended the run."""
    inner: Any = getattr(error, "controller_failure", error)
    seen: list[BaseException] = []
    while isinstance(inner, BaseException) and inner not in seen:
        if isinstance(inner, GivenUpError):
            return inner
        seen.append(inner)
        inner = inner.__cause__ or getattr(inner, "error", None) or getattr(inner, "cause", None)
    return GivenUpError(f"Ray Train ended it: {_words_of(error)}", CANNOT_GO_ON)


def _saved(folder: RunFolder) -> int:
    return max(folder.committed_steps(), default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
