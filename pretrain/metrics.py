"""What a run tells about itself: a line for every step, and a mirror of those lines on Weights & Biases.

The local files are the truth: metrics.jsonl and evals.jsonl hold every step and every evaluation. Weights & Biases is
a mirror of them, kept by one thread that training never waits for. The only file that imports wandb, when asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import secrets
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from configs.errors import DataError
from pretrain.leveldb_log import log_records
from pretrain.run_folder import Record, RunFolder, read_lines

if TYPE_CHECKING:  # torch takes seconds to import, and the report and the tests of a mirror need none
    from pretrain.engine import StepResult

WINDOW_STEPS, PENDING_BYTES = 50, 8 << 20
QUEUE_ITEMS, TICK_S, GRACE_S = 10_000, 0.05, 5.0
SETTINGS = {
    "init_timeout": 15.0, "finish_timeout": 15.0, "x_transaction_log_flush_interval": 2.0, "silent": True,
    "console": "off", "symlink": False, "save_code": False, "disable_code": True, "disable_git": True,
    "x_disable_stats": True, "x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False,
}  # fmt: skip

URL_USER = re.compile(r"(?<=://)[^/\s@]+@")
URL_QUERY = re.compile(r"(://[^\s?#'\"]*)[?#][^\s'\"]*")
SECRET_KEY = re.compile(r"(^|_)(token|secret|password|api_?key|access_?key|credentials?)$", re.IGNORECASE)


def resident_mib() -> float:
    """Memory that this process holds in RAM, in MiB."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Meter:
    """Turns what a step gave into the line that metrics.jsonl holds."""

    def __init__(
        self, attempt: int, sources: list[str], tokens_per_step: int, flops_per_token: float, *,
        peak_flops_per_s: float | None = None, memory_mib: Callable[[], float] = resident_mib,
        figures: Callable[[Sequence[float]], dict[str, float]] = lambda measures: {}, others: int = 0,
    ) -> None:  # fmt: skip
        """tokens_per_step: of the global batch. others: tokens that steps before had beyond as many each.
        flops_per_token: of training, forward and backward. peak_flops_per_s: of all devices; None leaves MFU out.
        memory_mib: asked once a second. figures: what a model's measures say."""
        self._attempt, self._sources, self._tokens, self._figures = attempt, sources, tokens_per_step, figures
        self._others = others
        self._mfu_per_rate = flops_per_token / peak_flops_per_s if peak_flops_per_s else None
        self._memory_mib, self._memory, self._asked = memory_mib, 0.0, 0.0
        self._recent_s: deque[float] = deque(maxlen=WINDOW_STEPS)

    def row(self, step: int, result: StepResult, lr: float, step_s: float, data_s: float) -> Record:
        """The line of a completed step. step: completed steps, from 1. step_s: the whole step, data_s of it waiting
        for data. Tokens per second is over the last `WINDOW_STEPS` steps of this attempt."""
        self._recent_s.append(step_s)
        rate, now = self._tokens * len(self._recent_s) / max(sum(self._recent_s), 1e-9), time.time()
        if abs(now - self._asked) >= 1.0:
            self._memory, self._asked = self._memory_mib(), now
        return {
            "step": step, "attempt": self._attempt, "time": now, "loss": result.loss, "lr": lr,
            "grad_norm": result.grad_norm, "skipped": result.skipped, "tokens": step * self._tokens + self._others,
            "tokens_per_s": rate, "step_s": step_s, "data_s": data_s,
            "mfu": None if self._mfu_per_rate is None else rate * self._mfu_per_rate,
            "memory_mib": self._memory,
            "source_loss": {n: loss for n, loss in zip(self._sources, result.source_loss) if loss is not None},
            "model": {} if result.skipped else self._figures(result.measures),
        }  # fmt: skip


class JsonlSink:
    """A file of JSON lines, each one write to the kernel: a kill loses none. What a full disk refuses goes later."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        size = os.fstat(self._handle).st_size
        # a line torn by a power cut must not swallow the next one
        self._pending = b"\n" if size and os.pread(self._handle, 1, size - 1) != b"\n" else b""

    def write(self, row: Record) -> None:
        """Append a line. Raises OSError once `PENDING_BYTES` of lines wait for a disk that takes none."""
        self._pending += json.dumps(row).encode() + b"\n"
        try:
            self._flush()
        except OSError:
            if len(self._pending) > PENDING_BYTES:
                raise

    def close(self) -> None:
        """Write what waits and close. Raises OSError if the disk still takes nothing: those lines are lost."""
        try:
            self._flush()
        finally:
            os.close(self._handle)

    def _flush(self) -> None:
        while self._pending:
            self._pending = self._pending[os.write(self._handle, self._pending) :]


class WandbMirror:
    """Draws a run's lines on Weights & Biases, each step once, over restarts, outages and crashes.

    The run's id there lives in run.json, so all attempts continue one curve. At the start of an attempt the mirror
    finds out which steps W&B has, sends what the local files hold beyond that, then goes on live and passes over what
    it has: a step that is done again gives the same numbers. So what W&B's own log lost in a crash comes from
    metrics.jsonl. A step's number is W&B's own step as well, so that W&B too refuses to draw one twice.
    """

    def __init__(
        self, folder: RunFolder, mode: Literal["offline", "online"], project: str, entity: str | None, config: Record,
        group: str | None = None,
    ) -> None:  # fmt: skip
        """config: the run's resolved configuration, shown on W&B with what looks secret left out. group: of runs that
        belong together there."""
        self._folder, self._mode = folder, mode
        self._project, self._entity, self._group, self._config = project, entity, group, config
        self._queue: queue.SimpleQueue[tuple[str, Record] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="wandb")
        self._id, self._online_now, self._leaving = "", False, False
        # steps that W&B had before: all up to `_upto`, and `_others`. `_shift` added to a step is W&B's own step
        self._upto, self._others, self._shift = -1, frozenset[int](), 0
        self._last, self._newest = -1, -1

    def start(self) -> None:
        """Begin in the background and return at once. A folder that cannot be written ends in a warning event."""
        try:
            if "wandb_id" not in self._folder.facts():
                self._folder.set_facts(wandb_id=secrets.token_hex(8))
            self._id = self._folder.facts()["wandb_id"]
        except OSError as problem:
            self._warn(f"no W&B for this run: run.json cannot be written ({problem})")
            return
        self._thread.start()

    def write(self, row: Record) -> None:
        """Hand over a line of metrics.jsonl. Takes some microseconds and never waits."""
        self._newest = row["step"]
        self._put("row", row)

    def write_eval(self, record: Record) -> None:
        """Hand over a line of evals.jsonl, after the row of its step."""
        self._put("eval", record)

    def close(self, timeout_s: float = 30.0) -> None:
        """Send what waits and leave, after `timeout_s` + `GRACE_S` seconds at the latest."""
        if not self._thread.is_alive():
            return
        self._queue.put(None)
        self._thread.join(timeout_s)
        self._leaving, ends = True, time.monotonic() + GRACE_S
        while self._thread.is_alive() and time.monotonic() < ends:
            # its own timeouts are longer; without the service, wandb gives up at once: an opening run goes offline
            if self._online_now:
                _kill_service()
            self._thread.join(0.2)
        if self._thread.is_alive():
            self._warn("wandb did not end; metrics.jsonl is complete, the next start sends what W&B lacks")

    def _put(self, kind: str, record: Record) -> None:
        # what finds no room is read back from the files later, see `_catch_up`
        if self._queue.qsize() < QUEUE_ITEMS and self._thread.is_alive():
            self._queue.put((kind, record))

    def _warn(self, message: str, **facts: Any) -> None:
        with contextlib.suppress(OSError):  # the disk that W&B cannot write to may be the one of the events
            self._folder.event("warning", message, **facts)

    def _work(self) -> None:
        try:
            with _hooks_kept():
                run = self._open()
            self._pump(run)
            run.finish()
        except ImportError:
            self._warn("wandb is not installed, so there is no W&B curve; `pip install wandb`, or log.wandb=off")
        except Exception as problem:
            text = redact(f"{type(problem).__name__} {problem}".strip())[:300]
            self._warn(f"wandb stopped ({text}); metrics.jsonl goes on, the next start sends what W&B lacks")
        finally:
            _stop_service()

    def _open(self) -> Any:
        """Begin or continue the run on W&B, or offline in the run folder when W&B does not answer."""
        _check_writable(self._folder.wandb)
        # wandb reports its own errors to its makers unless told not to; must be set before the import
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        # its messages about itself end on the terminal when its own log file cannot be written
        logging.getLogger("wandb").setLevel(logging.CRITICAL)
        if self._mode == "offline":
            return self._offline(wandb)
        began = time.monotonic()
        try:
            return self._online(wandb)
        except PermissionError as problem:
            state = reason = str(problem)
        except Exception as problem:
            state = f"wandb unreachable ({time.monotonic() - began:.0f} s)"
            reason = redact(str(problem) or type(problem).__name__)[:300]
        self._online_now = False
        # the service that failed would answer that the run is in use
        _kill_service()
        _stop_service()
        run = self._offline(wandb)
        place = Path(run.dir).parent
        self._warn(f"{state}: logging offline to {place}; later: wandb sync {place}", reason=reason)
        return run

    def _online(self, wandb: Any) -> Any:
        # to kill a service while it starts makes wandb wait for itself for ever
        wandb.setup(wandb.Settings(silent=True))
        self._online_now = True
        if self._leaving:
            raise TimeoutError("the run ended first")
        if not wandb.login(prompt=False, verify=False):
            raise PermissionError("no W&B key on this machine (set WANDB_API_KEY or run `wandb login`)")
        run = self._init(wandb, "online")
        # W&B's own step runs ahead of ours where files were synced with gaps between them
        self._shift = int(run.summary.get("_step", 0)) - int(run.summary.get("step", run.summary.get("_step", 0)))
        self._upto, self._others = run.starting_step - 1 - self._shift, frozenset()
        # their steps are sent now, or W&B has them; to sync them later would draw them twice
        for log in self._folder.wandb.glob("offline-run-*/run-*.wandb"):
            log.with_suffix(".wandb.synced").touch()
        return run

    def _offline(self, wandb: Any) -> Any:
        # read first: the new session's own log is empty, and its folder must not be there yet
        steps = {step for step, _ in _logged_steps(self._folder.path, "*run-*")}
        self._upto = next(n for n in range(1, len(steps) + 2) if n not in steps) - 1 or -1
        self._others, self._shift = frozenset(step for step in steps if step > self._upto), 0
        return self._init(wandb, "offline")

    def _init(self, wandb: Any, mode: str) -> Any:
        """Open a session. Prints nothing, looks at nothing but what it is given."""
        wandb.setup(wandb.Settings(silent=True))
        known = {name: value for name, value in SETTINGS.items() if name in wandb.Settings.model_fields}
        run = wandb.init(
            project=self._project, entity=self._entity, id=self._id, name=self._folder.name, resume="allow",
            group=self._group, dir=str(self._folder.path), mode=mode, config=without_secrets(self._config),
            allow_val_change=True, settings=wandb.Settings(**known),
        )  # fmt: skip
        run.define_metric("*", step_metric="step")
        return run

    def _pump(self, run: Any) -> None:
        """Send what the queue gives until the run closes; what the queue missed comes from the files."""
        while (item := self._next()) is not None:
            kind, record = item
            step = record["step"]
            if step < self._last or (step == self._last and kind == "row") or self._had(step):
                continue
            # the first of this session, or the queue was full in between
            if step > self._last + 1:
                self._catch_up(run, step if kind == "row" else step + 1)
            self._send(run, step, _flat_row(record) if kind == "row" else _flat_eval(record))
        if self._last < self._newest:
            self._catch_up(run, self._newest + 1)

    def _next(self) -> tuple[str, Record] | None:
        # a reader that waits inside get() would cost every write a system call to wake it
        while self._queue.empty():
            time.sleep(TICK_S)
        return self._queue.get()

    def _catch_up(self, run: Any, below: int) -> None:
        """Send the steps below `below` that the local files hold and W&B does not."""
        missing: dict[int, Record] = {}
        for path, flat in ((self._folder.metrics, _flat_row), (self._folder.evals, _flat_eval)):
            for record in read_lines(path):
                step = record["step"]
                if self._last < step < below and not self._had(step):
                    missing.setdefault(step, {}).update(flat(record))
        for step in sorted(missing):
            self._send(run, step, missing[step])

    def _had(self, step: int) -> bool:
        return step <= self._upto or step in self._others

    def _send(self, run: Any, step: int, data: Record) -> None:
        run.log({"step": step, **data}, step=step + self._shift)
        self._last = step


def read_offline_steps(folder: Path) -> dict[int, float]:
    """The loss of every step that a run's offline W&B files hold. folder: the run's. Raises DataError where a step
    stands twice."""
    losses: dict[int, float] = {}
    for step, loss in _logged_steps(folder, "offline-run-*"):
        if step in losses:
            raise DataError(f"step {step} stands twice in {folder}/wandb: W&B would draw the curve over itself")
        losses[step] = loss
    return dict(sorted(losses.items()))


def redact(text: str) -> str:
    """`text` without the user, password and query of any URL in it."""
    return URL_QUERY.sub(r"\1", URL_USER.sub("", text))


def without_secrets(value: Any) -> Any:
    """A configuration that may be shown: URLs redacted, values hidden whose key names a secret."""
    if isinstance(value, dict):
        return {k: "(hidden)" if SECRET_KEY.search(str(k)) else without_secrets(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(v) for v in value]
    return redact(value) if isinstance(value, str) else value


def _flat_row(row: Record) -> Record:
    flat: Record = {}
    for key, value in row.items():
        flat |= {f"{key}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return {k: v for k, v in flat.items() if v is not None}


def _flat_eval(record: Record) -> Record:
    flat = {f"eval/{k}": record[k] for k in ("loss", "perplexity", "bits_per_byte", "tokens")}
    for name, figures in record["sources"].items():
        flat |= {f"eval/{name}/{k}": v for k, v in figures.items()}
    flat |= {f"eval/position/{first}-{last}": loss for first, last, loss, _ in record["by_position"]}
    flat |= dict(_leaves("eval/model", record.get("model", {})))
    return {k: v for k, v in flat.items() if v is not None}


def _leaves(name: str, tree: Any) -> Iterator[tuple[str, float]]:
    """Every number of a tree, by its path."""
    if not isinstance(tree, dict):
        yield name, tree
        return
    for key, below in tree.items():
        yield from _leaves(f"{name}/{key}", below)


def _logged_steps(folder: Path, sessions: str) -> Iterator[tuple[int, float]]:
    """Step and loss of every row in the logs of a run's W&B sessions."""
    from wandb.proto import wandb_internal_pb2

    for log in sorted((folder / "wandb").glob(f"{sessions}/run-*.wandb")):
        for content in log_records(log.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(content)  # type: ignore[attr-defined]
            if record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                if "step" in items and "loss" in items:
                    yield int(items["step"]), float(json.loads(items["loss"]))


def _check_writable(folder: Path) -> None:
    """Raise OSError unless `folder` can be made and takes 64 KiB: wandb would go on in /tmp, or lose rows silently."""
    folder.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(bytes(65536))


@contextlib.contextmanager
def _hooks_kept() -> Iterator[None]:
    """Undo wandb's replacement of sys.exit and sys.excepthook, which prints every traceback twice."""
    kept = sys.exit, sys.excepthook
    try:
        yield
    finally:
        sys.exit, sys.excepthook = kept


def _kill_service() -> None:
    """End wandb's service process, so that whatever waits for it fails at once."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()


def _stop_service() -> None:
    """Let go of wandb's service, so that nothing of it waits when this process exits."""
    if "wandb" in sys.modules:
        # a service that has been killed cannot be told to end, or makes wandb call sys.exit with its exit code
        with contextlib.suppress(Exception, SystemExit):
            sys.modules["wandb"].teardown()
