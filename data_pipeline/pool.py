"""Run tasks in this process, in worker processes, or wherever an executor sends them, a bounded number at a time."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from configs.errors import LeviathanError
from data_pipeline.host_memory import keep_freed_memory
from data_pipeline.tasks import Outcome, Task, run

T = TypeVar("T", bound=Task)


class InProcess(Executor):
    """An executor that does each task when it is submitted."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The finished future of fn(*args, **kwargs)."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def executor_of(workers: int) -> Iterator[Executor]:
    """This process for one worker, else so many new processes; however the block ends, none of them stays behind."""
    if workers == 1:
        yield InProcess()
        return
    # never fork: threads of this process (torch has some) would leave locks behind that nobody opens
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)[::-1]
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(theirs,))
    try:
        yield pool
    except BaseException:
        ours.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        ours.close()
        theirs.close()


def run_all(tasks: Iterable[T], executor: Executor, in_flight: int) -> Iterator[tuple[T, Outcome]]:
    """Each task and what came of it, as they finish. `tasks` is asked for the next one only when there is room for it.

    Raises LeviathanError when a worker process died.
    """
    waiting = iter(tasks)
    running: dict[Future[Outcome], T] = {}
    try:
        while True:
            for task in islice(waiting, in_flight - len(running)):
                running[executor.submit(run, task)] = task
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in [future for future in running if future in done]:
                outcome = future.result()
                yield running.pop(future), outcome
    except BrokenExecutor:
        raise LeviathanError(_died(list(running.values()))) from None
    finally:
        for future in running:
            future.cancel()


def _died(tasks: Sequence[Task]) -> str:
    doing = f" at {' or '.join(task.what for task in tasks)}" if tasks else ""
    return (
        f"a worker process died{doing} (killed, or out of memory); build again, finished slices are kept;"
        " if it happens again, use fewer workers"
    )


def _begin_worker(parent: Connection) -> None:
    """Leave Ctrl-C to the parent, keep memory for the next task, and end at once when the parent ends or lets go."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        parent.recv_bytes()
    os._exit(1)
