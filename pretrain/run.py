"""One rank of a run, from its folder to its exit code: `python -m pretrain.run FOLDER`. Wiring only.

The launcher says who this rank is: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR, MASTER_PORT, and, where a
supervisor watches, LEVIATHAN_ATTEMPT, _FENCE, _NONCE, _HEARTBEAT or _BEACON, and _PARENT.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from configs.errors import LeviathanError
from configs.load import load
from pretrain.config import RunConfig
from pretrain.health import Heartbeat, StopRequests
from pretrain.run_folder import RunFolder

NOTE_BYTES = 4096


def main(arguments: list[str]) -> int:
    """Run one rank; return its exit code, and leave a note of why it ended."""
    die_with_parent()
    os.umask(0o077)  # a run is its owner's alone
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    folder = RunFolder(Path(arguments[0]))
    rank = int(os.environ.get("RANK", "0"))
    code, message = 1, ""
    _reserve(folder.exit_of(rank))
    try:
        code = _run(folder, rank)
    except LeviathanError as error:
        code, message = error.exit_code, str(error)
        with contextlib.suppress(OSError):
            print(f"error: {message}", file=sys.stderr, flush=True)
    except BaseException as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        with contextlib.suppress(OSError):
            traceback.print_exc()
    note = {"rank": rank, "code": code, "message": message, "attempt": int(os.environ.get("LEVIATHAN_ATTEMPT", "0"))}
    _leave_note(folder.exit_of(rank), json.dumps(note).encode())
    return code


def _run(folder: RunFolder, rank: int) -> int:
    heartbeat = Heartbeat.from_environment(rank)
    heartbeat.at("start", 0)
    requests = StopRequests(folder.stop_request if rank == 0 else None)
    config = load(RunConfig, [folder.config])
    # torch is imported only now: a mistake in what stands above costs no seconds. What importing it and DeepSpeed makes
    # stays for good: to search all that for garbage is a tenth of a start, and would be some of every step
    gc.disable()
    from pretrain.session import Session

    session = Session(folder, config, heartbeat)
    gc.freeze()
    gc.enable()
    try:
        return session.train(requests)
    finally:
        session.close()


def _reserve(path: Path) -> None:
    """Take the room for the note of why this rank ends: the reason may be that there is none left."""
    with contextlib.suppress(OSError):
        path.with_suffix(".draft").write_bytes(b" " * NOTE_BYTES)


def _leave_note(path: Path, note: bytes) -> None:
    draft = path.with_suffix(".draft")
    with contextlib.suppress(OSError), open(draft, "r+b" if draft.exists() else "wb", buffering=0) as file:
        file.write(note.ljust(NOTE_BYTES))
        os.replace(draft, path)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that LEVIATHAN_PARENT names dies: no rank outlives it."""
    parent = os.environ.get("LEVIATHAN_PARENT")
    if parent is None or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the call above
        os._exit(1)


def leave(code: int) -> NoReturn:
    """End this process without tearing down the C++ side of torch, which now and then aborts while its gloo threads
    go (a rank that has done all its work would look as if it had died). Everything of ours is closed by now."""
    with contextlib.suppress(OSError):  # the log may lie on a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
