"""Ports for servers of tests: each is bound some seconds after it was chosen, and nobody else gets it meanwhile.

The kernel gives those from 32768 on to whoever asks for any. These are below, and each process of the tests has a part
of its own.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from itertools import count, islice

_FIRST, _PARTS, _PART = 20_000, 25, 500
"""Above the ports that Slurm, Ray and most others have by themselves."""
_TURNS = count(os.getpid())
"""What was chosen a moment ago may not be bound yet, so no port comes twice before all others have."""


def free_ports(number: int) -> list[int]:
    """So many ports that nobody has, all different."""
    found = list(islice(filter(_is_free, _of_this_process()), number))
    if len(found) < number:
        raise RuntimeError(f"of {_PART} ports only {len(found)} are free, and {number} are needed")
    return found


def _of_this_process() -> Iterator[int]:
    """Every port of this process once."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")  # gw0, gw1, ...; none where one process runs all tests
    # that of all workers is the same, and another where somebody else runs tests on this machine
    run = os.getppid() if worker else os.getpid()
    first = _FIRST + _PART * ((run + int(worker.removeprefix("gw") or 0)) % _PARTS)
    return (first + next(_TURNS) % _PART for _ in range(_PART))


def _is_free(port: int) -> bool:
    """Whether nobody listens there, at whatever address of this machine."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
