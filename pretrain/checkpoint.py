"""Checkpoints: complete or invisible, verified before use, fit for any number of ranks and any ZeRO stage.

    draft folder -> each rank writes, hashes and fsyncs its file and a note of it -> rank 0 waits for all notes
    -> manifest -> fsync -> rename to step_NNNNNNNNN -> fsync of the parent

The training loop waits only for the copy into a snapshot; a thread does the rest and uses no collectives. There is no
pointer file: the truth is the newest folder whose manifest and files verify. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from configs.errors import CannotGoOnError, ConfigError, DataError
from data_pipeline.files import free_bytes, fsync_folder, human_bytes, write_whole
from pretrain.checkpoint_files import FORMAT, MANIFEST, Checkpoint, own_hash, read_manifest, verify
from pretrain.config import CheckpointConfig
from pretrain.engine import EngineState
from pretrain.faults import fault_point
from pretrain.lease import Lease
from pretrain.parallel import Ranks, min_over_ranks, same_on_all_ranks, sum_over_ranks
from pretrain.run_folder import RunFolder, step_name
from pretrain.snapshot import NotFiniteError, Snapshot, saved_dtype

NOTES_AT_ONCE = 12
"""How many ranks' notes rank 0 reads at once: what keeps a file system busy that is far away."""

_POLL_S = 0.02
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Save:
    """One save under way."""

    step: int
    draft: Path
    facts: dict[str, Any]


class CheckpointStore:
    """Writes and finds the checkpoints of one run. Every rank has one and calls it in the same order."""

    def __init__(
        self, folder: RunFolder, ranks: Ranks, config: CheckpointConfig, *, lease: Lease | None = None, fence: int = 0,
        attempt: int = 0,
    ) -> None:  # fmt: skip
        self._folder, self._ranks, self._config = folder, ranks, config
        self._lease, self._fence, self._attempt = lease, fence, attempt
        self._snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._failed_ranks = threading.Event()
        self.local_failure = False
        """Whether this rank's part of the last save failed; passed as a vote, so that rank 0 need not wait for it."""
        self.failures = 0
        """Saves in a row that failed (known to rank 0)."""
        self.last_good: int | None = None
        self.lost_lease: CannotGoOnError | None = None
        """Set on rank 0 when another job has taken the run over."""

    @property
    def given_up(self) -> bool:
        """Whether more saves failed in a row than the run may go on with (known to rank 0)."""
        return self.failures >= self._config.max_failures

    def check_room(self, state: EngineState) -> None:
        """Raise ConfigError, on every rank, where one checkpoint does not fit the disk."""
        need, free = self._need(state), free_bytes(self._folder.checkpoints)
        if min_over_ranks(torch.tensor([1.0 if free >= need else 0.0])).item() < 1:
            raise ConfigError(
                f"a checkpoint of this run needs {human_bytes(need)} (a fifth of it spare), but"
                f" {self._folder.checkpoints} has {human_bytes(free)} free; free some, or set run.dir to a larger disk"
            )
        keep = (self._config.keep_last + 1) * need
        if self._ranks.first and free < keep:
            self._folder.event(
                "warning", f"{human_bytes(free)} are free, but keeping {self._config.keep_last} checkpoints while the"
                f" next is written takes {human_bytes(keep)}", need=keep, free=free,
            )  # fmt: skip

    def save(self, step: int, state: EngineState, facts: dict[str, Any]) -> bool:
        """Begin to save; return once it is safe to train on. False, on every rank, where the disk has no room."""
        self.wait()
        need, free = self._need(state), free_bytes(self._folder.checkpoints)
        if min_over_ranks(torch.tensor([1.0 if free >= need else 0.0])).item() < 1:
            self._report_failure(step, f"no space on {self._folder.checkpoints}", need, free)
            return False
        draft = self._folder.checkpoints / f"{step_name(step)}.draft-{self._fence}-{self._attempt}"
        if self._ranks.first:
            # every rank has answered, so none still writes into an older draft; into this one some may already
            self._sweep(keep=draft)
        if self._snapshot is None:
            self._snapshot = Snapshot(state.fragments)
        fault_point("save.begin", step)
        self._snapshot.take(state.fragments)
        facts = facts | {
            "format": FORMAT,
            "step": step,
            "world": self._ranks.world,
            "updates": state.updates,
            "shapes": {name: list(shape) for name, shape in state.shapes.items()},
            "created": time.time(),
            "attempt": self._attempt,
            "fence": self._fence,
        }
        self.local_failure = False
        self._failed_ranks.clear()
        job = _Save(step, draft, facts)
        self._thread = threading.Thread(target=self._write, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()
        return True

    def wait(self) -> None:
        """Wait until the save under way, if any, is committed or given up."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def tell_failed(self) -> None:
        """Rank 0 learns that some rank could not write its part: do not wait for it."""
        self._failed_ranks.set()

    def newest_valid(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, the same on every rank; None where the run has not saved any.

        Folders that do not verify are told, set aside and passed over. Raises DataError where there are some and none
        is valid: a run never silently begins again.
        """
        if self._ranks.first:
            self._sweep()
        steps = same_on_all_ranks(self._folder.committed_steps() if self._ranks.first else [])
        for number, step in enumerate(steps):
            mistake = self._verify_shared(step)
            if mistake is None:
                path = self._folder.checkpoints / step_name(step)
                self.last_good = step
                if number and self._ranks.first:
                    self._folder.event(
                        "fallback", f"using {step_name(step)} instead (lost {steps[0] - step} steps)", step=step
                    )
                return Checkpoint(step, path, read_manifest(path))
            if self._ranks.first:
                self._set_aside(step, mistake)
        if steps or self._has_saved():
            raise DataError(
                f"{self._folder.checkpoints} has no valid checkpoint left"
                f" ({len(steps)} found, none verifies), so the run cannot go on from where it was; restore one from a"
                " copy, or start a new run under another run.name"
            )
        return None

    # ---- writing, in the background

    def _write(self, job: _Save) -> None:
        try:
            self._write_rank(job)
        except Exception as error:  # as below: a thread that dies of it would tell nobody
            self.local_failure = True
            with contextlib.suppress(OSError):
                (job.draft / _file(self._ranks.rank)).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                write_whole(job.draft / _note(self._ranks.rank, "failed"), json.dumps(_reason(error)).encode())
            if self._ranks.first:
                self._give_up(job, _reason(error)["text"])
            return
        if self._ranks.first:
            self._commit(job)

    def _write_rank(self, job: _Save) -> None:
        assert self._snapshot is not None
        job.draft.mkdir(mode=0o700, exist_ok=True)
        name = _file(self._ranks.rank)
        digest = self._snapshot.write(job.draft / name)
        fault_point("save.after_file", job.step)
        note = {"name": name, "bytes": self._snapshot.bytes, "sha256": digest}
        write_whole(job.draft / _note(self._ranks.rank, "done"), json.dumps(note).encode())

    def _commit(self, job: _Save) -> None:
        """Rank 0: wait for all notes, write the manifest, make the folder visible, prune."""
        try:
            notes = self._collect(job)
            fault_point("save.before_manifest", job.step)
            manifest = job.facts | {"files": notes}
            manifest["sha256"] = own_hash(manifest)
            write_whole(job.draft / MANIFEST, json.dumps(manifest).encode())
            _side_by_side(Path.unlink, list(job.draft.glob("*.done.json")))
            fsync_folder(job.draft)
            fault_point("save.before_commit", job.step)
            with self._lease.held(self._fence) if self._lease else contextlib.nullcontext():
                os.rename(job.draft, self._folder.checkpoints / step_name(job.step))
                fsync_folder(self._folder.checkpoints)
        except CannotGoOnError as error:
            self.lost_lease = error
            shutil.rmtree(job.draft, ignore_errors=True)
            return
        except Exception as error:  # whatever it was, this save is lost, and has to be counted and told
            self._give_up(job, str(error) or type(error).__name__)
            return
        fault_point("save.after_commit", job.step)
        self.failures, self.last_good = 0, job.step
        size = sum(note["bytes"] for note in notes)
        took = time.time() - job.facts["created"]
        self._folder.event(
            "checkpoint", f"saved {step_name(job.step)} ({human_bytes(size)} in {took:.1f} s)",
            step=job.step, bytes=size, seconds=took,
        )  # fmt: skip
        with contextlib.suppress(OSError):
            self._prune(job.step)

    def _collect(self, job: _Save) -> list[dict[str, Any]]:
        deadline, ranks = time.monotonic() + self._config.commit_timeout_s, range(self._ranks.world)
        notes: dict[int, dict[str, Any]] = {}
        while len(notes) < len(ranks):
            there = set(os.listdir(job.draft))
            for rank in ranks:
                if (failed := _note(rank, "failed")) in there:
                    raise OSError(_read(job.draft / failed)["text"])
            new = [rank for rank in ranks if rank not in notes and _note(rank, "done") in there]
            notes |= zip(new, _side_by_side(_read, [job.draft / _note(rank, "done") for rank in new]))
            if self._failed_ranks.is_set() and len(notes) < len(ranks):
                raise OSError("a rank could not write its file")
            if time.monotonic() > deadline:
                missing = sorted(set(ranks) - set(notes))
                raise OSError(f"no file from rank {missing} within {self._config.commit_timeout_s:.0f} s")
            time.sleep(_POLL_S)
        return [notes[rank] for rank in ranks]

    def _give_up(self, job: _Save, reason: str) -> None:
        free = free_bytes(self._folder.checkpoints)  # before the draft is gone, which is what did not fit
        with contextlib.suppress(OSError):
            shutil.rmtree(job.draft, ignore_errors=True)
        size = self._snapshot.bytes * self._ranks.world if self._snapshot else 0
        self._report_failure(job.step, reason, size, free)

    def _report_failure(self, step: int, reason: str, need: int, free: int) -> None:
        if not self._ranks.first:
            return
        self.failures += 1
        last = f"last good: step {self.last_good}" if self.last_good is not None else "none saved yet"
        with contextlib.suppress(OSError):
            self._folder.event(
                "save_failed",
                f"checkpoint step {step} failed: {reason} (need {human_bytes(need)}, free {human_bytes(free)}); {last};"
                f" training goes on ({self.failures} of {self._config.max_failures} in a row before it stops)",
                step=step,
                need=need,
                free=free,
            )

    # ---- housekeeping

    def _prune(self, newest: int) -> None:
        """Remove what need not be kept; the newest has just been committed, so at least one is always there."""
        keep_every = self._config.keep_every
        for step in self._folder.committed_steps()[self._config.keep_last :]:
            if step >= newest or (keep_every and step % keep_every == 0):
                continue
            path = self._folder.checkpoints / step_name(step)
            doomed = path.with_name(f"{path.name}.deleted")
            os.rename(path, doomed)
            fault_point("prune.middle", newest)
            shutil.rmtree(doomed, ignore_errors=True)

    def _sweep(self, keep: Path | None = None) -> None:
        """Remove what an earlier save or attempt left half-written or half-removed, but not `keep`."""
        for path in self._folder.checkpoints.glob("step_*.d*"):
            if path == keep:
                continue
            if ".draft-" in path.name:
                self._folder.event("ignored", f"ignoring incomplete checkpoint {path.name}: it was never committed")
            shutil.rmtree(path, ignore_errors=True)

    def _set_aside(self, step: int, mistake: str) -> None:
        path = self._folder.checkpoints / step_name(step)
        self._folder.event("invalid_checkpoint", f"checkpoint {path.name} invalid: {mistake}", step=step)
        number = len(list(self._folder.checkpoints.glob(f"{path.name}.invalid-*")))
        os.rename(path, path.with_name(f"{path.name}.invalid-{number}"))

    def _has_saved(self) -> bool:
        saved = (
            any(record["event"] == "checkpoint" for record in self._folder.history()) if self._ranks.first else False
        )
        return bool(same_on_all_ranks([1] if saved else []))

    def _verify_shared(self, step: int) -> str | None:
        """Ranks share the hashing; every rank learns whether all of it is right. The mistake's text is rank 0's, or
        that of the rank that found it, which tells it as an event."""
        mistake = verify(self._folder.checkpoints / step_name(step), self._ranks.rank, self._ranks.world)
        good = min_over_ranks(torch.tensor([0.0 if mistake else 1.0])).item() == 1.0
        if mistake and not self._ranks.first:
            self._folder.event("invalid_checkpoint", f"checkpoint {step_name(step)} invalid: {mistake}", step=step)
        return None if good else (mistake or "another rank found a damaged file")

    def _need(self, state: EngineState) -> int:
        mine = sum(saved_dtype(f).itemsize * f.tensor.numel() for f in state.fragments)
        total = sum_over_ranks(torch.tensor([float(mine)], dtype=torch.float64)).item()
        return int(1.2 * total) + 65536


def _file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _note(rank: int, outcome: str) -> str:
    return f"rank_{rank:05d}.{outcome}.json"


def _read(note: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(note.read_bytes())
    return content


def _side_by_side(do: Callable[[Path], _T], paths: Sequence[Path]) -> list[_T]:
    """What it does to each, some at once."""
    with ThreadPoolExecutor(NOTES_AT_ONCE) as pool:
        return list(pool.map(do, paths))


def _reason(error: Exception) -> dict[str, str]:
    if isinstance(error, NotFiniteError):
        return {"text": f"{error.args[0]} holds a value that is not finite"}
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return {"text": "no space left on the disk"}
    return {"text": str(error) or type(error).__name__}
